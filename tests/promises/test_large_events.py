"""Events larger than a NOTIFY: fetched from the log, once, and in their place among the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from flask import Flask

from flask_pg_sse import PayloadTooLarge, notify, notify_many
from tests.promises.test_turns import LATE, asking
from tests.support.client import open_stream
from tests.support.crowd import Crowd, Reader, brief, calls_after, install, logged, publish
from tests.support.postgres import connect, execute
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]
SIZE = 5_000_000


def text(size: int, seed: str = "") -> str:
    """Return text of so many bytes in UTF-8, of characters of one to four bytes, with line ends."""
    line = seed + 'plain, äöü, 漢字, 🙂, \x85\u2028 and "quoted" \\ \' % {}\n'
    whole = line * (size // len(line.encode()) + 1)
    cut = whole.encode()[:size].decode(errors="ignore")
    return cut + "x" * (size - len(cut.encode()))


def post(server: WebServer, channel: str, data: str, **options: Any) -> None:
    server.post(f"/notify/{channel}", json.dumps({"data": data, **options}).encode())


@pytest.mark.slow
def test_large_events_come_in_their_place(database_url: str, start_server: Start) -> None:
    """Among small ones of the same and of other channels, for streams on both channels and on one."""
    install(database_url)
    server = start_server(database_url, FLASK_SSE_HEARTBEAT="300")  # which would bring a cursor
    large = [text(SIZE), text(SIZE, "again ")]
    with Crowd(server.port) as crowd:
        [both] = crowd.open(1, "a", "b")
        [only_a] = crowd.open(1, "a")
        [only_b] = crowd.open(1, "b")
        notifier = connect(database_url)
        with notifier.cursor() as cursor:
            for round, data in enumerate(large):
                for number in range(20):
                    cursor.execute("SELECT flask_pg_sse.notify(%s, %s)", ("ab"[number % 2], f"{round} {number}"))
                if round:
                    cursor.execute("SELECT flask_pg_sse.notify('a', %s)", (data,))
                else:
                    post(server, "a", data)
                for number in range(20, 40):
                    cursor.execute("SELECT flask_pg_sse.notify(%s, %s)", ("ab"[number % 2], f"{round} {number}"))
        notifier.close()
        streams: list[Reader] = [both, only_a, only_b]
        expected = [logged(database_url, reader.channels) for reader in streams]
        assert list(map(len, expected)) == [82, 42, 40]
        assert [data for _, data in expected[1] if len(data) > 20] == [brief(data) for data in large]
        crowd.read_until(lambda: [len(reader.events) for reader in streams] == [82, 42, 40])
        assert [reader.events for reader in streams] == expected
        assert [name for reader in streams for name, _, _ in reader.control] == ["sse-open"] * 3


def test_nothing_overtakes_a_large_event_on_any_channel(database_url: str, start_server: Start) -> None:
    """When a stream on another channel has a later event, a stream on its channel has it already, or gets it next."""
    install(database_url)
    server = start_server(database_url)
    with Crowd(server.port) as crowd:
        [both] = crowd.open(1, "a", "b")
        [other] = crowd.open(1, "b")
        publish(database_url, ("a", text(SIZE)), ("b", "after"))
        crowd.read_until(lambda: other.events and both.events)
        assert [data for _, data in both.events[:1]] == [brief(text(SIZE))]
        crowd.read_until(lambda: len(both.events) == 2)
        assert both.events[1] == other.events[0]


@pytest.mark.slow
def test_a_large_event_is_read_once_for_all_its_streams(database_url: str, start_server: Start) -> None:
    install(database_url)
    server = start_server(database_url)
    with Crowd(server.port) as crowd:
        crowd.open(20, "a")
        for number in range(3):
            large = text(SIZE if not number else 500_000, str(number))
            publish(database_url, ("a", f"before {number}"), ("a", large), ("a", f"after {number}"))
            crowd.read_until(lambda: all(len(reader.events) == 3 * number + 3 for reader in crowd.readers))  # noqa: B023
        expected = logged(database_url, ["a"])
        assert all(reader.events == expected for reader in crowd.readers)
    # At the listener's start twice, for its commands too; and for each of the large ones, and what came after it.
    assert calls_after(database_url, server)["page_v1"] == 2 + 3 * 2


@pytest.mark.slow
def test_large_events_are_read_once_for_all_that_fall_behind(database_url: str, start_server: Start) -> None:
    """Where the second comes while the first is under way, the streams read on from the log."""
    install(database_url)
    server = start_server(database_url, "-c", "python:tests.support.apps.small_buffers")
    with Crowd(server.port) as crowd:
        behind = crowd.open(20, "a", receive_buffer=65536)
        [other] = crowd.open(1, "b")
        for reader in behind:
            reader.reading = False
        publish(database_url, *(("a", text(1_000_000, str(number))) for number in range(5)), ("a", "last"))
        publish(database_url, ("b", "after"))
        crowd.read_until(lambda: other.events)
        for reader in behind:
            reader.reading = True
        expected = logged(database_url, ["a"])
        crowd.read_until(lambda: all(len(reader.events) == 6 for reader in behind), 90)  # 100 MB in pieces of 4 kB
        assert all(reader.events == expected for reader in behind)
    # The listener's pages; then each stream finds four large events, whose bytes one stream reads for all. They are
    # read again for those that come when all the others have gone on, as on a busy machine some do; if not shared, for
    # all.
    assert calls_after(database_url, server)["page_v1"] <= 2 + 6 + 20 * 4 + 6 * 4


@pytest.mark.slow
def test_streams_with_other_channels_share_a_large_event_and_no_more(database_url: str, start_server: Start) -> None:
    """One stream is sending it and holds it in memory; another stream gets that copy, and then its own events."""
    install(database_url)
    server = start_server(database_url, "-c", "python:tests.support.apps.small_buffers")
    publish(database_url, ("a", "first"))
    [(first, _)] = logged(database_url, ["a"])
    publish(database_url, ("a", text(SIZE)), ("b", "one"), ("c", "two"), ("b", "three"))
    with Crowd(server.port) as crowd:
        slow = crowd.add("a", last_event_id=first, receive_buffer=4096)
        crowd.read_until(lambda: slow.received > 100_000, every=0)
        slow.reading = False
        others = [crowd.add(*channels, last_event_id=first) for channels in ("ab", "abc", "a", "ca")]
        expected = [logged(database_url, reader.channels, first) for reader in others]
        crowd.read_until(lambda: list(map(len, expected)) == [len(reader.events) for reader in others])
        assert [reader.events for reader in others] == expected
        slow.reading = True
        crowd.read_until(lambda: slow.events)
        assert slow.events == logged(database_url, ["a"], first)


@pytest.mark.slow
def test_a_stream_resumes_before_and_behind_a_large_event(database_url: str, start_server: Start) -> None:
    install(database_url)
    server = start_server(database_url)
    publish(database_url, ("a", "0"), ("a", "1"), ("a", text(SIZE)), ("b", "2"), ("a", text(70_000)), ("a", "3"))
    everything = logged(database_url, ["a"])
    with Crowd(server.port) as crowd:
        readers = [crowd.add("a", last_event_id=log_id) for log_id, _ in everything]
        crowd.read_until(lambda: [len(reader.events) for reader in readers] == [4, 3, 2, 1, 0])
        publish(database_url, ("a", "4"), ("a", text(SIZE)), ("a", "5"))
        crowd.read_until(lambda: [len(reader.events) for reader in readers] == [7, 6, 5, 4, 3])
        everything = logged(database_url, ["a"])
        assert [reader.events for reader in readers] == [everything[missed:] for missed in range(1, 6)]


@pytest.mark.slow
def test_a_client_cut_in_the_midst_of_a_large_event_gets_it_again_whole(database_url: str, start_server: Start) -> None:
    install(database_url)
    server = start_server(database_url, "-c", "python:tests.support.apps.small_buffers")
    with Crowd(server.port) as crowd:
        [cut] = crowd.open(1, "a", receive_buffer=4096)
        publish(database_url, ("a", "first"), ("a", text(SIZE)), ("a", "last"))
        crowd.read_until(lambda: cut.received > 200_000, every=0)
        assert len(cut.events) == 1 and cut.last_event_id is not None
        cut.sock.close()
        crowd.readers.remove(cut)
        again = crowd.add("a", last_event_id=cut.last_event_id)
        crowd.read_until(lambda: len(again.events) == 2)
        assert cut.events + again.events == logged(database_url, ["a"])


def test_the_largest_that_fits_a_notify_and_the_smallest_that_does_not(database_url: str, start_server: Start) -> None:
    install(database_url)
    server = start_server(database_url)
    listening = connect(database_url)
    with open_stream(server.port, "a") as stream, listening.cursor() as cursor:

        def payload(data: str) -> str:
            cursor.execute("SELECT flask_pg_sse.notify('a', %s)", (data,))
            assert stream.event().data == data
            listening.poll()
            return str(listening.notifies.pop().payload)

        cursor.execute("LISTEN a")
        # The log decides before it knows the id and the signature, and leaves room for the longest.
        room = 7999 - 50 - len("{}")
        for fill in ("x" * room, "é" * (room // 2) + "x" * (room % 2)):
            fits = payload(fill)
            assert 7990 < len(fits.encode()) <= 7999 and fits.endswith(fill)
            fetched = payload(fill + "x")
            assert len(fetched.encode()) < 100 and '"f": true' in fetched
    listening.close()


@pytest.mark.slow
def test_a_large_event_in_the_callers_transaction(database_url: str, make_app: MakeApp, start_server: Start) -> None:
    install(database_url)
    server = start_server(database_url)
    app = make_app(database_url)
    engine = sqlalchemy.create_engine(database_url)
    plain = psycopg2.connect(database_url)
    large = [text(SIZE // 5, name) for name in "pqrs"]
    with Crowd(server.port) as crowd, app.app_context():
        [reader] = crowd.open(1, "a")
        notify("a", large[0], connection=plain)
        plain.rollback()
        notify("a", large[1], connection=plain)
        notify("a", "small", connection=plain)
        plain.commit()
        with engine.begin() as connection:
            savepoint = connection.begin_nested()
            notify("a", large[2], connection=connection)
            savepoint.rollback()
            notify("a", large[3], connection=connection)
        notify_many("a", large)
        expected = [large[1], "small", large[3], *large]
        crowd.read_until(lambda: len(reader.events) == len(expected))
        assert [data for _, data in reader.events] == list(map(brief, expected))
        assert reader.events == logged(database_url, ["a"])
    plain.close()
    engine.dispose()


def test_what_cannot_be_fetched_may_not_be_large(database_url: str, make_app: MakeApp) -> None:
    with make_app(database_url).app_context(), pytest.raises(PayloadTooLarge):
        notify("a", "x" * 20_000)  # no log
    install(database_url)
    with make_app(database_url).app_context():
        with pytest.raises(PayloadTooLarge) as raised:
            notify("a", "x" * 20_000, durable=False)
        assert raised.value.size == 20_000 and raised.value.limit >= 7800
        notify("a", "x" * 20_000)
    with make_app(database_url, SSE_EVENT_LOG=False).app_context(), pytest.raises(PayloadTooLarge):
        notify("a", "x" * 20_000)
    assert [(len(data),) for (data,) in execute(database_url, "SELECT data FROM flask_pg_sse.event")] == [(20_000,)]


@pytest.mark.slow
def test_other_routes_answer_while_a_large_event_is_fetched_and_sent(database_url: str, start_server: Start) -> None:
    """They wait for the parsing and the encoding of one event, not for the database or a client."""
    install(database_url)
    server = start_server(database_url)
    with Crowd(server.port) as crowd:
        slow = crowd.open(5, "a", receive_buffer=4096)
        [quick] = crowd.open(1, "a")
        for reader in slow:
            reader.reading = False
        with asking(server, "/ping") as took:
            publish(database_url, *(("a", text(SIZE, str(number))) for number in range(3)))
            crowd.read_until(lambda: len(quick.events) == 3, 60)
            answered = len(took.times)
            crowd.read_until(lambda: len(took.times) > answered + 20, 60)
        print(f"requests took {took} s of CPU")
        assert took.most < LATE


@pytest.mark.slow
def test_large_data_that_hold_nul_are_large_too(database_url: str, start_server: Start) -> None:
    """They stand in another column of the log: PostgreSQL's text cannot hold NUL."""
    install(database_url)
    server = start_server(database_url, "-c", "python:tests.support.apps.small_buffers")
    with open_stream(server.port, "a") as stream:
        opening = int(execute(database_url, "SELECT flask_pg_sse.head_v1()")[0][0])
        data = "a\0b" * 500_000
        post(server, "a", data)
        assert stream.event().data == data
    [(channel, id)] = execute(database_url, "SELECT channel, id FROM flask_pg_sse.event")
    assert (channel, id > opening) == ("a", True)
    # A page does not bring it by the way: it is announced first, and read once for all.
    page = "SELECT fields, data, size FROM flask_pg_sse.page_v1('{a}', %s, 65536, 0) WHERE id IS NOT NULL"
    [(fields, empty, size)] = execute(database_url, page, (opening,))
    assert not fields and empty is None and size > len(data)
    with open_stream(server.port, "a", headers={"Last-Event-ID": str(opening)}) as stream:
        assert stream.event().data == data
