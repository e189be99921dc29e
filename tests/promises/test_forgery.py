"""Any role of a database can send any NOTIFY: none moves a stream's position or keeps a real event away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.client import Response, eventually, open_stream
from tests.support.postgres import connect, execute
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
FAR_AHEAD = 2**62


@pytest.fixture
def url(logged_url: str) -> str:
    return logged_url


@pytest.fixture
def nobody_special(url: str) -> Iterator[Any]:
    """A connection of a role that may do nothing but connect; it listens to channel a, as anybody may."""
    execute(url, "CREATE ROLE forger LOGIN")
    connection = connect(url.replace("postgres@", "forger@"))
    try:
        run(connection, "LISTEN a")
        yield connection
    finally:
        connection.close()
        execute(url, "DROP ROLE forger")


def run(connection: Any, query: str, *args: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(query, args)


def heard(connection: Any) -> str:
    """Return the next payload that the forger hears."""

    def polled() -> bool:
        connection.poll()
        return bool(connection.notifies)

    eventually(polled)
    payload: str = connection.notifies.pop(0).payload
    return payload


def publish(url: str, channel: str, data: str) -> str:
    query = "SELECT flask_pg_sse.publish_v1(%s, ARRAY['{}'::json], ARRAY[%s])"
    return str(execute(url, query, (channel, data))[0][0])


def logged_event(stream: Response) -> tuple[str | None, str | None]:
    while (message := stream.event()).event == "sse-cursor":
        assert int(message.id or 0) < FAR_AHEAD
    assert message.event == "message", message
    return message.id, message.data


def parts(payload: str) -> tuple[str, dict[str, Any], str]:
    """Return the mark and version of a wire form, its head, and its data."""
    head, _, data = payload.partition("\n")
    return head[:2], json.loads(head[2:]), data


def joined(mark: str, head: dict[str, Any], data: str | None) -> str:
    text = mark + json.dumps(head, separators=(",", ":"), ensure_ascii=False)
    return text if data is None else f"{text}\n{data}"


def forgeries(genuine: str) -> Iterator[tuple[str, str]]:
    mark, head, data = parts(genuine)
    yield "the same again", genuine
    yield "other data under a spent id", joined(mark, head, "forged")
    yield "other fields under a spent id", joined(mark, {**head, "event": "forged"}, data)
    for name, log_id in (("far ahead", FAR_AHEAD), ("the next", head["i"] + 1), ("an older one", head["i"] - 1)):
        yield f"id {name}", joined(mark, {**head, "i": log_id}, "forged")
        yield f"id {name}, without signature", joined(mark, {"i": log_id}, "forged")
        yield f"id {name}, large", joined(mark, {**head, "i": log_id, "f": True}, None)
    yield "large, under a spent id", joined(mark, {**head, "f": True}, None)
    yield "large, without an id", joined(mark, {"f": True}, None)
    yield "a signature that is no text", joined(mark, {**head, "i": FAR_AHEAD, "s": 7}, "forged")


def forge_beats(connection: Any) -> None:
    for beat in range(200):
        message = json.dumps({"beat": str(beat), "head": FAR_AHEAD})
        run(connection, "SELECT pg_notify('flask_pg_sse', %s)", message)
    for payload in ("rubbish", "[]", "7", '{"head": "x"}'):
        run(connection, "SELECT pg_notify('flask_pg_sse', %s)", payload)


@pytest.mark.slow
def test_forged_events_and_beats_move_no_position_and_keep_nothing_away(
    url: str, nobody_special: Any, start_server: Start
) -> None:
    server = start_server(url, FLASK_SSE_HEARTBEAT="0.3")
    # Three that differ in what they hear: the real channel, that and the forger's, the forger's alone.
    with (
        open_stream(server.port, "a") as on_a,
        open_stream(server.port, "a", "b") as on_both,
        open_stream(server.port, "b") as on_b,
    ):
        log_id = publish(url, "a", "real 0")
        assert logged_event(on_a) == logged_event(on_both) == (log_id, "real 0")
        for number, (name, payload) in enumerate(forgeries(heard(nobody_special)), 1):
            for channel in ("a", "b"):
                run(nobody_special, "SELECT pg_notify(%s, %s)", channel, payload)
            forge_beats(nobody_special)
            real = publish(url, "a", f"real {number}")
            assert logged_event(on_a) == logged_event(on_both) == (real, f"real {number}"), name
            other = publish(url, "b", f"other {number}")
            assert logged_event(on_both) == logged_event(on_b) == (other, f"other {number}"), name

        # After a reconnect, too, the listener does not believe that it has events which it has not.
        execute(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'flask_pg_sse listener' AND datname = current_database()",
        )
        missed = publish(url, "a", "while nobody listened")
        assert logged_event(on_a) == logged_event(on_both) == (missed, "while nobody listened")
        position = missed
    with open_stream(server.port, "a", headers={"Last-Event-ID": position}) as stream:
        last = publish(url, "a", "last")
        assert logged_event(stream) == (last, "last")


@pytest.mark.parametrize("size", [3, 9000], ids=["small", "large"])
def test_a_spent_signature_on_a_channel_where_it_is_new_is_no_event_of_the_log(
    url: str, nobody_special: Any, start_server: Start, size: int
) -> None:
    """A worker that listens to b alone has never heard of an event on a, so its id is news there.

    Nobody gets it, with or without its text, neither the stream that is open nor one that comes back and is served from
    the worker's memory.
    """
    server = start_server(url)
    with open_stream(server.port, "b") as on_b:
        first = publish(url, "b", "first")
        assert logged_event(on_b) == (first, "first")
        on_a = "x" * size
        publish(url, "a", on_a)
        genuine = heard(nobody_special)
        mark, head, data = parts(genuine)
        assert data == ("" if size > 7999 else on_a)
        for forged in (genuine, joined(mark, head, "forged"), joined(mark, {**head, "f": True}, None)):
            run(nobody_special, "SELECT pg_notify('b', %s)", forged)
        last = publish(url, "b", "last")
        assert logged_event(on_b) == (last, "last")
    with open_stream(server.port, "b", headers={"Last-Event-ID": first}) as again:
        assert logged_event(again) == (last, "last")
    with open_stream(server.port, "a", headers={"Last-Event-ID": first}) as again:
        assert logged_event(again)[1] == on_a
