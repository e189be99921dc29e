"""LISTEN and UNLISTEN on the one connection: batched, confirmed, lingering; lost and found again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import psycopg2
import pytest

from flask_pg_sse.engine.backoff import Backoff
from flask_pg_sse.engine.base import Item
from flask_pg_sse.engine.listener import ANSWER_WITHIN
from flask_pg_sse.engine.postgres.codec import pg_name
from flask_pg_sse.engine.postgres.connect import connect
from flask_pg_sse.engine.postgres.control import DisconnectCommands
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.engine.postgres.installation import InstallationLookup
from flask_pg_sse.engine.postgres.listener import PostgresListener
from flask_pg_sse.errors import DatabaseUnavailable
from tests.support.client import eventually
from tests.support.link import Link, through
from tests.support.model import IdleSink
from tests.support.postgres import connect as plain_connect
from tests.support.postgres import execute
from tools import postgres

Turns = list[list[Item]]
Make = Callable[..., tuple[PostgresListener, Turns, list[float]]]


def new_listener(url: str, sink: IdleSink, **options: Any) -> PostgresListener:
    commands = DisconnectCommands(lambda: (), sink.control)
    return PostgresListener(to_dsn(url, "test"), sink, InstallationLookup("auto"), commands, **options)


@pytest.fixture
def make_listener() -> Iterator[Make]:
    """Make started listeners, with the turns that they delivered and the times of their gaps."""
    made: list[PostgresListener] = []

    def make(url: str, **options: Any) -> tuple[PostgresListener, Turns, list[float]]:
        turns: Turns = []
        gaps: list[float] = []

        class Sink(IdleSink):
            def deliver(self, turn: Sequence[Item], position: int) -> None:
                if turn:
                    turns.append(list(turn))

            def gap(self, reason: str, position: int) -> None:
                gaps.append(time.monotonic())

        listener = new_listener(url, Sink(), **options)
        listener.start()
        made.append(listener)
        return listener, turns, gaps

    yield make
    for listener in made:
        listener.stop(5)


def events(turns: Turns) -> list[tuple[str, bytes]]:
    return [(channel, data) for turn in list(turns) for channel, data, _ in turn]


def listener_pid(url: str) -> int:
    query = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE application_name = 'flask_pg_sse listener' AND datname = current_database()"
    )
    found: list[tuple[int]] = []

    def one() -> bool:  # a session that was ended tells its client so a moment before it is gone
        found[:] = execute(url, query)
        return len(found) == 1

    eventually(one, 10, "one session listens")
    return int(found[0][0])


def test_listen_is_confirmed_before_the_ticket_says_so(database_url: str, make_listener: Make) -> None:
    listener, turns, _ = make_listener(database_url)
    for number in range(20):
        channel = f"room-{number}"
        assert listener.subscribe([channel]).wait(10)
        # Sent after the confirmation: it may not be missed.
        execute(database_url, "SELECT pg_notify(%s, %s)", (channel, str(number)))
    eventually(lambda: len(events(turns)) == 20)
    assert events(turns) == [(f"room-{n}", f"data: {n}\n\n".encode()) for n in range(20)]


def test_two_thousand_channels_cost_few_round_trips(
    database_url: str, make_listener: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask while the listener is busy with a round-trip, as 2,000 streams do that connect at once."""
    statements: list[str] = []
    go_on = threading.Event()
    real = PostgresListener._execute

    def counting(self: PostgresListener, connection: Any, query: str, *rest: Any) -> Any:
        if "LISTEN" in query:
            statements.append(query)
        if "first" in query:
            go_on.wait(20)
        return real(self, connection, query, *rest)

    monkeypatch.setattr(PostgresListener, "_execute", counting)
    listener, turns, _ = make_listener(database_url, linger=0.0)
    first = listener.subscribe(["first"])
    eventually(lambda: any("first" in query for query in statements))
    del statements[:]
    tickets = [listener.subscribe([f"room-{n}"]) for n in range(2000)]
    go_on.set()
    assert all(ticket.wait(20) for ticket in [first, *tickets])
    assert len(statements) <= 5, statements
    assert sum(query.count("LISTEN") for query in statements) == 2000
    execute(database_url, "NOTIFY \"room-1999\", 'there'")
    eventually(lambda: events(turns))

    del statements[:]
    listener.unsubscribe([f"room-{number}" for number in range(2000)])
    eventually(lambda: listener._listens.listened() == ["first"])
    assert len([query for query in statements if "UNLISTEN" in query]) <= 5


def test_unlisten_lingers_and_a_returning_stream_needs_no_round_trip(database_url: str, make_listener: Make) -> None:
    listener, turns, _ = make_listener(database_url, linger=60.0)
    assert listener.subscribe(["orders"]).wait(10)
    listener.unsubscribe(["orders"])
    assert listener.subscribe(["orders"]).wait(0), "LISTEN still stood"
    execute(database_url, "NOTIFY orders, 'x'")
    eventually(lambda: events(turns))


def test_channels_are_freed_when_nobody_wants_them(database_url: str, make_listener: Make) -> None:
    listener, _, _ = make_listener(database_url, linger=0.05)
    assert listener.subscribe(["a", "b", "ü" * 100]).wait(10)
    listener.unsubscribe(["a", "ü" * 100])
    eventually(lambda: listener._listens.listened() == ["b"])
    assert listener._listens._listens.keys() == {"b"}
    assert not listener._listens._idle_since and not listener._listens._ending and not listener._listens._queue


def test_a_stream_that_comes_during_an_unlisten_gets_a_listen_of_its_own(
    database_url: str, make_listener: Make
) -> None:
    """Many threads take and leave one channel without any linger; every holder of a ticket hears."""
    listener, turns, _ = make_listener(database_url, linger=0.0)
    deaf: list[str] = []

    def churn(name: str) -> None:
        sender = plain_connect(database_url)
        for number in range(40):
            assert listener.subscribe(["busy"]).wait(10)
            text = f"{name}-{number}"
            sender.cursor().execute("SELECT pg_notify('busy', %s)", (text,))
            block = ("busy", f"data: {text}\n\n".encode())
            try:
                eventually(lambda block=block: block in events(turns), 20)  # type: ignore[misc]
            except AssertionError:
                deaf.append(text)
            listener.unsubscribe(["busy"])
        sender.close()

    threads = [threading.Thread(target=churn, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not deaf


def test_long_names_travel_under_a_hash(database_url: str, make_listener: Make) -> None:
    listener, turns, _ = make_listener(database_url)
    long = "kitchen-" + "é" * 100
    assert listener.subscribe([long, long[:70]]).wait(10)
    # The package's own form of a notification arrives, and one that others send by the hash does not.
    execute(database_url, "SELECT pg_notify(%s, 'raw')", (pg_name(long),))
    execute(database_url, "SELECT pg_notify(%s, chr(30) || '1{}' || chr(10) || 'x')", (pg_name(long),))
    eventually(lambda: events(turns))
    assert events(turns) == [(long, b"data: x\n\n")]


@pytest.mark.parametrize("name", ['a"b', "a'b", "a;DROP TABLE x", '"; UNLISTEN *; --', "a\\b", "Ä €", "%s", "a b", "*"])
def test_names_are_quoted(database_url: str, make_listener: Make, name: str) -> None:
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe([name, "bystander"]).wait(10)
    execute(database_url, "SELECT pg_notify(%s, 'x'), pg_notify('bystander', 'y')", (name,))
    eventually(lambda: len(events(turns)) == 2)
    assert events(turns) == [(name, b"data: x\n\n"), ("bystander", b"data: y\n\n")]


def test_a_killed_backend_is_replaced_and_the_gap_told(database_url: str, make_listener: Make) -> None:
    listener, turns, gaps = make_listener(database_url)
    assert listener.subscribe(["orders", "other"]).wait(10)
    for round in range(3):
        pid = listener_pid(database_url)
        execute(database_url, "SELECT pg_terminate_backend(%s)", (pid,))
        eventually(lambda: len(gaps) == round + 1)  # noqa: B023
        execute(database_url, "NOTIFY orders, 'after'")
        eventually(lambda: len(events(turns)) == round + 1)  # noqa: B023
        assert listener_pid(database_url) != pid


def test_what_arrived_before_the_connection_broke_is_delivered(database_url: str, make_listener: Make) -> None:
    """A notification and the server's farewell may come in one read."""
    listener, turns, gaps = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    for number in range(10):
        sender = plain_connect(database_url)
        pid = listener_pid(database_url)
        sender.cursor().execute("SELECT pg_notify('orders', %s)", (str(number),))
        eventually(lambda: ("orders", f"data: {number}\n\n".encode()) in events(turns))  # noqa: B023
        sender.cursor().execute("SELECT pg_terminate_backend(%s)", (pid,))
        sender.close()
        eventually(lambda: len(gaps) == number + 1)  # noqa: B023


def test_postgres_stopped_and_started(own_postgres: postgres.Server, make_listener: Make) -> None:
    listener, turns, gaps = make_listener(own_postgres.url())
    assert listener.subscribe(["orders"]).wait(10)
    modes: tuple[postgres.StopMode, ...] = ("fast", "immediate")
    for mode in modes:
        own_postgres.stop(mode)
        eventually(lambda: not listener._listens.listened())
        late = listener.subscribe(["late"])
        assert not late.wait(0.1)
        count = len(gaps)
        own_postgres.start()
        eventually(lambda: len(gaps) == count + 1)  # noqa: B023
        assert late.wait(10), "everybody who waited is served"
        before = len(events(turns))
        execute(own_postgres.url(), "NOTIFY orders, 'x'")
        execute(own_postgres.url(), "NOTIFY late, 'y'")
        eventually(lambda: len(events(turns)) == before + 2)  # noqa: B023


def test_nothing_piles_up_while_postgres_is_away(own_postgres: postgres.Server, make_listener: Make) -> None:
    listener, _, _ = make_listener(own_postgres.url())
    assert listener.subscribe(["kept"]).wait(10)
    own_postgres.stop()
    eventually(lambda: not listener._listens.listened())
    for number in range(1000):
        assert not listener.subscribe([f"room-{number}"]).wait(0)
        listener.unsubscribe([f"room-{number}"])
    assert listener._listens._listens.keys() == {"kept"}
    assert not listener._listens._queue
    own_postgres.start()


@pytest.mark.parametrize("reloading", [False, True], ids=["quiet", "a page reloads"])
def test_the_listener_notices_that_the_server_does_not_answer(
    database_url: str, make_listener: Make, monkeypatch: pytest.MonkeyPatch, reloading: bool
) -> None:
    """A half-open connection: the server's process is stopped, so that nothing comes and nothing breaks."""
    listener, turns, gaps = make_listener(database_url, beat_every=0.1)
    assert listener.subscribe(["orders"]).wait(10)
    pid = listener_pid(database_url)
    monkeypatch.setattr("flask_pg_sse.engine.postgres.listener.ANSWER_WITHIN", 0.3)
    os.kill(pid, signal.SIGSTOP)

    def noticed() -> bool:
        if reloading:  # it wakes the listener, and is no sign of life of the server
            listener.subscribe(["orders"])
            listener.unsubscribe(["orders"])
        return bool(gaps)

    try:
        listener.unsubscribe(["orders"])
        eventually(noticed)
    finally:
        ticket = listener.subscribe(["orders"])
        os.kill(pid, signal.SIGCONT)
    monkeypatch.setattr("flask_pg_sse.engine.postgres.listener.ANSWER_WITHIN", ANSWER_WITHIN)
    # Without the wait the listener may have connected again while no stream wanted the channel: what is sent before its
    # LISTEN is confirmed may rightly be missed.
    assert ticket.wait(20)
    execute(database_url, "NOTIFY orders, 'x'")
    eventually(lambda: events(turns))


def test_idle_session_timeouts_of_the_server_do_not_end_the_listener(database_url: str, make_listener: Make) -> None:
    name = database_url.rsplit("/", 1)[1]
    without = f"{database_url}?options=-cidle_session_timeout%3D0%20-cstatement_timeout%3D0"
    execute(database_url, f"ALTER DATABASE {name} SET idle_session_timeout = '1s'")
    execute(database_url, f"ALTER DATABASE {name} SET statement_timeout = '500ms'")
    listener, _, gaps = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    pid = listener_pid(without)
    with closing(plain_connect(database_url)) as idle:  # proof that the settings bite
        with pytest.raises(psycopg2.errors.QueryCanceled):
            idle.cursor().execute("SELECT pg_sleep(60)")
        there = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: execute(without, there, (idle.info.backend_pid,)) == [(0,)], 20, "it is ended")
    assert listener_pid(without) == pid
    assert not gaps


def test_binary_rubbish_and_forged_payloads_end_nothing(database_url: str, make_listener: Make) -> None:
    listener, turns, gaps = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    payloads = [
        "\x1e", "\x1e1", "\x1e1{", '\x1e1{"event":"sse-end"}\nx', "\x1e9{}\nx", "\x1e1[]\nx", '\x1e1{"n":{}}',
        '{"event": "sse-end"}', '{"event": "a\\nb"}', '{"data": "\\ud800"}', '{"retry": -1}', '{"id": [1]}',
        '{"data": ' * 800, "[" * 7999, "\x01\x02\x7f", '{"event": 1e400}',
    ]  # fmt: skip
    for payload in payloads:
        execute(database_url, "SELECT pg_notify('orders', %s)", (payload,))
    execute(database_url, "SELECT pg_notify('orders', %s)", ("x" * 7999,))
    eventually(lambda: ("orders", b"data: " + b"x" * 7999 + b"\n\n") in events(turns))
    assert not gaps
    for _, block in events(turns):
        assert b"event: sse-" not in block
    with pytest.raises(psycopg2.Error):
        execute(database_url, "SELECT pg_notify('orders', %s)", ("x" * 8000,))


def test_malformed_payloads_are_logged_once_a_minute(
    database_url: str, make_listener: Make, caplog: pytest.LogCaptureFixture
) -> None:
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    for _ in range(50):
        execute(database_url, "SELECT pg_notify('orders', %s)", ('{"event": "sse-end", "data": "hunter2"}',))
    execute(database_url, "NOTIFY orders, 'end'")
    eventually(lambda: events(turns))
    said = [record for record in caplog.records if "NOTIFY payload" in record.message]
    assert len(said) == 1
    assert "hunter2" not in caplog.text
    assert listener._receiver.decoder.dropped.count == 50


def test_turns_are_bounded(database_url: str, make_listener: Make) -> None:
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    execute(database_url, "SELECT pg_notify('orders', n || repeat('x', 1000)) FROM generate_series(1, 3000) AS n")
    eventually(lambda: len(events(turns)) == 3000, 20)
    assert [int(block[6:].split(b"x")[0]) for _, block in events(turns)] == list(range(1, 3001))
    assert len(turns) > 10
    assert max(sum(len(block) for _, block, _ in turn) for turn in turns) < 3 * 65536


def test_turns_are_bounded_behind_a_statement_too(
    database_url: str, make_listener: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg2 collects all that arrives while it waits for the answer to a LISTEN."""
    go_on = threading.Event()
    real = PostgresListener._execute

    def waiting(self: PostgresListener, connection: Any, query: str, *rest: Any) -> Any:
        if "second" in query:
            go_on.wait(20)
        return real(self, connection, query, *rest)

    monkeypatch.setattr(PostgresListener, "_execute", waiting)
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    ticket = listener.subscribe(["second"])
    execute(database_url, "SELECT pg_notify('orders', n || repeat('x', 1000)) FROM generate_series(1, 3000) AS n")
    go_on.set()
    assert ticket.wait(20)
    eventually(lambda: len(events(turns)) == 3000, 20)
    assert [int(block[6:].split(b"x")[0]) for _, block in events(turns)] == list(range(1, 3001))
    assert max(sum(len(block) for _, block, _ in turn) for turn in turns) < 2 * 65536


def test_events_do_not_wait_until_subscribers_stop_coming(
    database_url: str, make_listener: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PostgresListener._execute

    def far_away(self: PostgresListener, connection: Any, query: str, *rest: Any) -> Any:
        threading.Event().wait(0.02)  # the way to a distant server
        return real(self, connection, query, *rest)

    monkeypatch.setattr(PostgresListener, "_execute", far_away)
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    stop = threading.Event()

    def keep_coming() -> None:
        number = 0
        while not stop.wait(0.002):
            listener.subscribe([f"room-{number}"])
            number += 1

    coming = threading.Thread(target=keep_coming)
    coming.start()
    try:
        execute(database_url, "NOTIFY orders, 'x'")
        eventually(lambda: events(turns), 20)
    finally:
        stop.set()
        coming.join()


def test_a_stop_in_the_midst_of_a_flood_is_a_stop(database_url: str, make_listener: Make) -> None:
    listener, turns, _ = make_listener(database_url)
    assert listener.subscribe(["orders"]).wait(10)
    stop = threading.Event()

    def flood() -> None:
        connection = plain_connect(database_url)
        while not stop.is_set():
            query = "SELECT pg_notify('orders', n || repeat('x', 1000)) FROM generate_series(1, 1000) AS n"
            connection.cursor().execute(query)
        connection.close()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        eventually(lambda: len(turns) > 20)
        listener.stop(20)
        assert listener._ended.is_set()
    finally:
        stop.set()
        flooding.join()


def test_a_name_that_the_database_cannot_write_harms_no_other(
    postgres_server: postgres.Server, make_listener: Make
) -> None:
    execute(postgres_server.url(), "CREATE DATABASE latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = postgres_server.url("latin1")
    listener, turns, gaps = make_listener(url)
    try:
        assert listener.subscribe(["orders"]).wait(10)
        tickets = [listener.subscribe([name]) for name in ("room-€", "café", "room-\u4e2d", "plain")]
        assert [ticket.wait(10) for ticket in tickets] == [False, True, False, True]
        execute(url, "SELECT pg_notify(channel, 'x') FROM unnest(%s) AS channel", (["orders", "café", "plain"],))
        eventually(lambda: len(events(turns)) == 3)
        assert not gaps
    finally:
        listener.stop(5)
        execute(postgres_server.url(), "DROP DATABASE latin1 WITH (FORCE)")


def test_a_callback_that_fails_does_not_end_the_listener(database_url: str) -> None:
    calls: list[Any] = []

    class Sink(IdleSink):
        def deliver(self, turn: Sequence[Item], position: int) -> None:
            calls.append(turn)
            if len(calls) == 1:
                raise RuntimeError("a bug")

    listener = new_listener(database_url, Sink())
    listener.start()
    try:
        assert listener.subscribe(["orders"]).wait(10)
        execute(database_url, "NOTIFY orders, 'first'")
        eventually(lambda: calls)

        def delivered() -> bool:
            execute(database_url, "NOTIFY orders, 'more'")
            return len(calls) > 1

        eventually(delivered)
    finally:
        listener.stop(5)


def test_hosts_are_resolved_by_us_and_tried_in_turn(own_postgres: postgres.Server) -> None:
    """libpq would resolve names with a call that stops all greenlets; it gets addresses only."""
    port = own_postgres.port
    url = f"postgresql://postgres@localhost:1,nowhere.invalid:5,localhost:{port}/postgres?connect_timeout=3"
    connection = connect(to_dsn(url, "test"), "test")
    parameters = connection.info.dsn_parameters
    assert (parameters["host"], parameters["hostaddr"], parameters["port"]) == ("localhost", "127.0.0.1", str(port))
    connection.close()
    standby = connect(to_dsn(f"{own_postgres.url()}?target_session_attrs=prefer-standby", "test"), "test")
    standby.close()


def test_backoff_grows_to_its_most_and_is_spread() -> None:
    backoff = Backoff(0.1, 5.0)
    delays = [backoff.next() for _ in range(200)]
    assert 0.05 <= delays[0] <= 0.1
    assert all(2.5 <= delay <= 5.0 for delay in delays[6:])
    assert len(set(delays)) == 200
    backoff.reset()
    assert backoff.next() <= 0.1


class Refusing(threading.Thread):
    """A server that is still starting, in a cluster whose messages are French in Latin-1."""

    SAYS = "le système de base de données se lance"

    def __init__(self) -> None:
        super().__init__(name="refusing")
        self.refused = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client:
                    while len(client.recv(8192)) == 8:  # a request for encryption
                        client.sendall(b"N")
                    fields = b"SFATAL\0VFATAL\0C57P03\0M" + self.SAYS.encode("latin-1") + b"\0\0"
                    client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)
                self.refused += 1

    def __enter__(self) -> Refusing:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()


def test_a_refusal_in_another_encoding_is_one_like_others(
    database_url: str, postgres_server: postgres.Server, make_listener: Make
) -> None:
    with Refusing() as refusing, Link(refusing.port) as line:
        url = through(line, database_url)
        with pytest.raises(DatabaseUnavailable, match=r"le syst.me de base de donn.es se lance"):
            connect(to_dsn(url, "test"), "the test")
        listener, turns, _ = make_listener(url)
        eventually(lambda: refusing.refused >= 3)
        line.lead_to(postgres_server.port)
        assert listener.subscribe(["orders"]).wait(20)
        execute(database_url, "NOTIFY orders, 'x'")
        eventually(lambda: events(turns) == [("orders", b"data: x\n\n")])
        listener.stop(5)
