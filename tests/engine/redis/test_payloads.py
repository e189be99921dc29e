"""What a payload of Redis is on a stream: any text, and the JSON of sse_relay_server and of flask-sse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.engine.redis.codec import Decoder, from_payload, to_payload
from flask_pg_sse.errors import InvalidEvent
from flask_pg_sse.event import Event

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")).filter(
    lambda text: not text.startswith("sse-")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["data", "type", "id", "event", "x"]), inner),
)


@given(
    st.builds(
        Event,
        TEXT | JSON.map(json.dumps),
        event=st.none() | LINE.filter(bool),
        id=st.none() | LINE,
        retry=st.none() | st.integers(100, 3_600_000),
        comment=st.none() | TEXT,
    )
)
def test_what_is_sent_is_what_is_read(event: Event) -> None:
    assert from_payload(to_payload(event)) == event


@pytest.mark.parametrize(
    ("payload", "block"),
    [
        ("hello", b"data: hello\n\n"),
        ("", b"data: \n\n"),
        ("two\nlines", b"data: two\ndata: lines\n\n"),
        ("[1, 2]", b"data: [1, 2]\n\n"),
        ("{}", b"data: {}\n\n"),
        ('{"data": "x", "unknown": 1}', b'data: {"data": "x", "unknown": 1}\n\n'),
        ("\x1e1{}\nx", b"data: \x1e1{}\ndata: x\n\n"),  # the wire form is PostgreSQL's
        # sse_relay_server's
        ('{"event": "E", "id": 1, "data": "{\\"m\\": 1}"}', b'event: E\nid: 1\ndata: {"m": 1}\n\n'),
        ('{"data": {"m": 1}, "comment": "c", "sep": "\\n"}', b': c\ndata: {"m": 1}\n\n'),
        ('{"event": "E", "data": "x", "retry": 5000}', b"retry: 5000\nevent: E\ndata: x\n\n"),
        ('{"comment": "only"}', b": only\n"),
        ('{"event": "E"}', None),
        ('{"event": "E", "data": null}', None),
        # flask-sse's, which has `type`, and any JSON as data
        ('{"data": [1], "type": "T", "id": "5", "retry": 900}', b"retry: 900\nevent: T\nid: 5\ndata: [1]\n\n"),
        ('{"data": "a\\nb", "type": "T"}', b"event: T\ndata: a\ndata: b\n\n"),
        ('{"data": null}', b"data: null\n\n"),
        ('{"data": false, "type": "T"}', b"event: T\ndata: false\n\n"),
        ('{"type": "T"}', None),
        # of both kinds, or of neither
        ('{"type": "T", "event": "E", "data": "x"}', b'data: {"type": "T", "event": "E", "data": "x"}\n\n'),
    ],
)
def test_payloads_of_others(payload: str, block: bytes | None) -> None:
    assert Decoder().decode(payload.encode()) == block


@pytest.mark.parametrize("payload", [b"\xff", b'{"data": "x", "id": "a\\nb"}', b'{"data": "x", "type": "sse-end"}'])
def test_a_payload_that_is_no_event_is_counted_and_dropped(payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    decoder = Decoder()
    assert [decoder.decode(payload) for _ in range(3)] == [None] * 3
    assert decoder.dropped.count == 3
    assert [text[:27] for text in caplog.messages] == ["Dropped a payload of Redis "]


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["data", "type", "id", "retry", "event", "comment", "sep"]), JSON))
def test_no_object_breaks_the_reader(fields: dict[str, Any]) -> None:
    try:
        from_payload(json.dumps(fields))
    except InvalidEvent:
        return
