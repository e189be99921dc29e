"""The change of a stream from the log to live: the same races every time, held open by the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse import notify, sse_cursor, sse_url
from flask_pg_sse.engine.base import Page
from flask_pg_sse.engine.postgres.history import History
from flask_pg_sse.engine.postgres.listener import PostgresListener
from flask_pg_sse.engine.postgres.receiver import Receiver
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.testing import Received, Stream, stream
from tests.support.client import eventually
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(logged_url: str, make_app: MakeApp) -> Iterator[Flask]:
    app = make_app(logged_url)
    with app.app_context():
        yield app


def send(channel: str, data: str, **options: Any) -> int:
    log_id = notify(channel, data, **options)
    assert log_id is not None
    return log_id


def listen(app: Flask, *channels: str, after: object = None) -> Stream:
    with app.test_request_context():
        url = sse_url(channels)
    return stream(app.test_client(), url if after is None else f"{url}&last_event_id={after}", timeout=30)


def take(events: Iterator[Received], count: int) -> list[tuple[str, str]]:
    """Return id and data of the next events, which are none of the package's own."""
    taken = [next(events) for _ in range(count)]
    assert all(one.event == "message" for one in taken), taken
    return [(one.id, one.data) for one in taken]


def opened(events: Iterator[Received]) -> Received:
    first = next(events)
    assert first.event == "sse-open"
    return first


def hub_of(app: Flask) -> Hub:
    hub: Hub = app.extensions["pg_sse"].runtime.worker.streams[0]
    return hub


def test_what_is_committed_between_the_cursor_and_the_stream_arrives(app: Flask) -> None:
    send("a", "the page has it")
    cursor = sse_cursor()
    missed = send("a", "after the page"), send("b", "on the other channel")
    with closing(listen(app, "a", "b", after=cursor)) as events:
        assert opened(events).id == str(cursor)
        live = send("a", "live")
        assert take(events, 3) == [
            (str(missed[0]), "after the page"), (str(missed[1]), "on the other channel"), (str(live), "live"),
        ]  # fmt: skip


def test_a_stream_that_is_cut_before_its_first_event_comes_back_to_it(app: Flask) -> None:
    send("a", "before")
    with closing(listen(app, "a")) as events:
        position = opened(events).id
    missed = send("a", "while it was away")
    with closing(listen(app, "a", after=position)) as events:
        opened(events)
        assert take(events, 1) == [(str(missed), "while it was away")]


@pytest.mark.parametrize("heard", ["before the page is read", "before the join", "after the join"])
def test_an_event_that_comes_by_the_log_and_by_notify_arrives_once(
    app: Flask, monkeypatch: pytest.MonkeyPatch, heard: str
) -> None:
    """The page that is read has it or not, and the listener brings it before or after the stream is live."""
    with closing(listen(app, "a")) as events:
        position = opened(events).id
    hub = hub_of(app)
    sent: list[int] = []
    gate = threading.Event()
    read, hand_over = History.page, Receiver.hand_over

    def read_while_one_is_committed(self: History, *args: Any) -> Page:
        page = None
        if heard == "before the join" and not sent:
            page = read(self, *args)
        if not sent:
            sent.append(send("a", "at the seam"))
            if heard != "after the join":
                eventually(lambda: hub.position >= sent[0])
        return page or read(self, *args)

    def hand_over_later(self: Receiver, connection: Any) -> bool:
        gate.wait(20)
        return hand_over(self, connection)

    first = send("a", "missed")
    eventually(lambda: hub.position >= first)
    # What the hub remembers would do without the log: have it forget.
    hub._history.end("a")
    monkeypatch.setattr(hub._history, "fill", lambda *args: None)
    monkeypatch.setattr(History, "page", read_while_one_is_committed)
    if heard == "after the join":
        monkeypatch.setattr(Receiver, "hand_over", hand_over_later)
    with closing(listen(app, "a", after=position)) as events:
        opened(events)
        assert take(events, 2) == [(str(first), "missed"), (str(sent[0]), "at the seam")]
        gate.set()
        last = send("a", "live")
        assert take(events, 1) == [(str(last), "live")]


def test_a_stream_that_is_ahead_of_its_worker_gets_nothing_twice(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker was faster: the client has events that this one's listener has not heard of yet."""
    gate = threading.Event()
    hand_over = Receiver.hand_over

    def hand_over_later(self: Receiver, connection: Any) -> bool:
        gate.wait(20)
        return hand_over(self, connection)

    with closing(listen(app, "a")) as stays:
        position = int(opened(stays).id)
        monkeypatch.setattr(Receiver, "hand_over", hand_over_later)
        ids = [send("a", str(number)) for number in range(4)]
        assert hub_of(app).position == position
        with closing(listen(app, "a", after=ids[1])) as behind, closing(listen(app, "a", after=ids[3])) as ahead:
            opened(behind), opened(ahead)
            assert take(behind, 2) == [(str(ids[2]), "2"), (str(ids[3]), "3")]
            gate.set()
            assert take(stays, 4) == [(str(log_id), str(number)) for number, log_id in enumerate(ids)]
            last = send("a", "live")
            for events in (behind, ahead, stays):
                assert take(events, 1) == [(str(last), "live")]


def test_nothing_is_remembered_of_a_channel_before_its_listen_stands(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams ask the log for each other's channels; one of them may still wait for its LISTEN."""
    gate, reached = threading.Event(), threading.Event()
    execute_on = PostgresListener._execute

    def listen_later(self: PostgresListener, connection: Any, query: str, *rest: Any) -> Any:
        if query == 'LISTEN "late"':
            reached.set()
            gate.wait(20)
        return execute_on(self, connection, query, *rest)

    monkeypatch.setattr(PostgresListener, "_execute", listen_later)
    cursor = sse_cursor()
    got: list[tuple[str, str]] = []

    def late() -> None:
        with app.app_context(), closing(listen(app, "late", after=cursor)) as events:
            opened(events)
            got.extend(take(events, 2))

    with closing(listen(app, "early")) as events:
        opened(events)
        thread = threading.Thread(target=late)
        thread.start()
        try:
            assert reached.wait(10)
            eventually(lambda: "late" in hub_of(app)._sets.of_channel)
            # As a stream leaves it that PostgreSQL's absence caught while it asked the log.
            app.extensions["pg_sse"].runtime.worker.streams[1]._unfilled.add((), "late")
            with closing(listen(app, "early", after=cursor)) as again:
                opened(again)
                send("early", "goes on")
                missed = send("late", "nobody listens yet")
        finally:
            gate.set()
        last = send("late", "live")
        thread.join()
    assert got == [(str(missed), "nobody listens yet"), (str(last), "live")]


def test_an_id_of_the_senders_own_is_followed_by_the_logs(app: Flask) -> None:
    with closing(listen(app, "a")) as events:
        position = opened(events).id
        log_id = send("a", "with an id of its own", id="1")
        event, cursor = next(events), next(events)
        assert (event.id, event.data) == ("1", "with an id of its own")
        assert (cursor.event, cursor.id, cursor.json) == ("sse-cursor", str(log_id), {})
    with closing(listen(app, "a", after=position)) as events:
        opened(events)
        assert [(one.event, one.id) for one in (next(events), next(events))] == [
            ("message", "1"), ("sse-cursor", str(log_id)),
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["raw", "ephemeral"])
def test_an_id_on_an_event_that_is_not_logged_does_not_cost_the_position(
    app: Flask, logged_url: str, kind: str
) -> None:
    """Senders of the older projects write `id: 1` on every event, by plain NOTIFY."""

    def send_one(data: str) -> None:
        if kind == "raw":
            execute(logged_url, "SELECT pg_notify('a', json_build_object('id', 1, 'data', %s)::text)", (data,))
        else:
            assert notify("a", data, id=1, durable=False) is None

    with closing(listen(app, "a")) as events:
        position = opened(events).id
        send_one("first")
        event, cursor = next(events), next(events)
        assert (event.id, event.data) == ("1", "first")
        assert (cursor.event, cursor.id) == ("sse-cursor", position)
        log_id = send("a", "logged")
        assert take(events, 1) == [(str(log_id), "logged")]
        send_one("second")
        event, cursor = next(events), next(events)
        assert (event.id, cursor.event, cursor.id) == ("1", "sse-cursor", str(log_id))
    missed = send("a", "while it was away")
    with closing(listen(app, "a", after=cursor.id)) as events:
        opened(events)
        assert take(events, 1) == [(str(missed), "while it was away")]


def test_an_ephemeral_event_has_no_id_and_is_not_replayed(app: Flask) -> None:
    with closing(listen(app, "a")) as events:
        position = opened(events).id
        assert notify("a", "typing", durable=False) is None
        assert take(events, 1) == [(position, "typing")]
    log_id = send("a", "kept")
    with closing(listen(app, "a", after=position)) as events:
        opened(events)
        assert take(events, 1) == [(str(log_id), "kept")]


def test_streams_that_share_a_large_event_go_on_from_it_each_on_its_own_channels(app: Flask) -> None:
    """The log's answer about one stream's channels beyond that event does not hold for the other's channels."""
    cursor = sse_cursor()
    large = "x" * 200_000
    ids = [send("a", large), send("b", "on b alone")]
    with closing(listen(app, "a", after=cursor)) as only_a, closing(listen(app, "a", "b", after=cursor)) as both:
        response = iter_raw(app, "a", after=cursor)
        with closing(response):
            next(response)  # the first line
            next(response)  # in the middle of the large event: it is still held
            opened(both)
            assert take(both, 2) == [(str(ids[0]), large), (str(ids[1]), "on b alone")]
        opened(only_a)
        assert take(only_a, 1) == [(str(ids[0]), large)]


def iter_raw(app: Flask, channel: str, after: object) -> Generator[bytes, None, None]:
    """Yield a stream's pieces as the server gets them."""
    response = app.test_client().get(f"/sse?channel={channel}&last_event_id={after}")
    try:
        yield from response.iter_encoded()
    finally:
        response.close()


@pytest.mark.parametrize("asked", ["nonsense", "7", "9223372036854775807"])
def test_whoever_is_cut_before_the_reset_still_gets_it(app: Flask, asked: str) -> None:
    """Wherever the first bytes end: who has seen no sse-reset has no id with which it would not come the next time."""
    send("a", "missed")
    pieces = iter_raw(app, "a", after=asked)
    with closing(pieces):
        assert next(pieces).startswith(b"retry: ")
        first = next(pieces)
    opening, rest = first.split(b"\n\n", 1)
    assert b"event: sse-open" in opening and rest.startswith(b"event: sse-reset")
    ids = [line.removeprefix(b"id: ").decode() for line in opening.split(b"\n") if line.startswith(b"id: ")]
    with closing(listen(app, "a", after=ids[0] if ids else asked)) as events:
        assert next(events).event == "sse-open"
        assert next(events).event == "sse-reset"
