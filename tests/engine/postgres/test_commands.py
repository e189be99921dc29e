"""Commands between processes: each is obeyed once, no clock decides about it, and a copy of it does nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from itsdangerous import URLSafeSerializer

from flask_pg_sse import disconnect, notify, schema_sql, sse_url
from flask_pg_sse.engine.base import ControlMessage, Disconnect
from flask_pg_sse.engine.postgres import control
from flask_pg_sse.engine.postgres.control import DisconnectCommands, Snapshot
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.engine.postgres.engine import PostgresEngine
from flask_pg_sse.engine.postgres.listener import PostgresListener
from flask_pg_sse.event import Event
from flask_pg_sse.testing import stream
from flask_pg_sse.tokens import sign_disconnect
from tests.support.client import eventually
from tests.support.engines import Process
from tests.support.link import Link, through
from tests.support.log import run
from tests.support.postgres import connect, execute

Start = Callable[..., Process]
COMMAND = Disconnect("a subject", "a channel")
TELL_ALL = "SELECT pg_notify('flask_pg_sse', %s)"


@pytest.fixture(params=[False, True], ids=["without the log", "with the log"])
def url(request: pytest.FixtureRequest, database_url: str) -> str:
    if request.param:
        execute(database_url, schema_sql())
    return database_url


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an engine, with a beat every tenth of a second."""
    started: list[PostgresEngine] = []

    def start(url: str, **options: Any) -> Process:
        dsn = to_dsn(url, "the test")
        options = {"event_log": "auto", "retention": 86400, "longest_silence": 0.1, **options}
        engine = PostgresEngine(lambda: (dsn, dsn), keys=lambda: ["a key"], **options)
        started.append(engine)
        return Process(engine, "a")

    yield start
    for engine in started:
        engine.stop(5)


@pytest.fixture
def line(database_url: str) -> Iterator[Link]:
    with Link(urlsplit(database_url).port or 0) as line:
        yield line


def commands_of(process: Process) -> Any:
    return process.engine._listener._control._commands  # type: ignore[attr-defined]


def heard_payloads(connection: Any) -> list[str]:
    connection.poll()
    return [one.payload for one in connection.notifies if "beat" not in one.payload]


def forms(payload: str) -> list[str]:
    """Return a command word for word, and what is signed in it as a command that is not of the log."""
    if not payload.startswith("\x1e"):
        return [payload]
    return [payload, json.dumps({"disconnect": payload.partition("\n")[2]})]


def tell_and_wait(process: Process, connection: Any, payloads: list[str]) -> None:
    """Send commands, and wait until the process has read them."""
    for payload in payloads:
        run(connection, TELL_ALL, (payload,))
    before = len(process.sink.items)
    run(connection, "NOTIFY a, 'behind them'")
    process.sink.wait(before + 1)


def test_a_copy_does_nothing_whenever_it_comes(url: str, start: Start) -> None:
    """At once; when its nonce is forgotten; in a process that came later; while an older transaction goes on."""
    first = start(url)
    with closing(connect(url)) as stranger, closing(connect(url)) as long:
        run(stranger, "LISTEN flask_pg_sse")
        run(long, "BEGIN; SELECT txid_current()")
        first.engine.control(COMMAND)
        payloads = forms(eventually(lambda: heard_payloads(stranger))[0])
        eventually(lambda: first.sink.messages == [COMMAND])
        tell_and_wait(first, stranger, payloads)
        eventually(
            lambda: not commands_of(first)._done, 10, "the nonce is forgotten though another transaction goes on"
        )
        tell_and_wait(first, stranger, payloads)
        later = start(url)
        tell_and_wait(later, stranger, payloads)
        run(long, "COMMIT")
        tell_and_wait(first, stranger, payloads)
        tell_and_wait(later, stranger, payloads)
    assert first.sink.messages == [COMMAND] and later.sink.messages == []
    first.engine.control(COMMAND)
    eventually(lambda: (first.sink.messages, later.sink.messages) == ([COMMAND] * 2, [COMMAND]), 20, "a new one counts")


def test_a_transaction_that_goes_on_is_no_copy(url: str, start: Start) -> None:
    """A command's transaction may be long: beats that come back meanwhile do not make it old."""
    hearing, sending = start(url), start(url)
    pool = sending.engine._own._pools[0]  # type: ignore[attr-defined]
    real = pool.in_transaction

    def slowly(query: Callable[[int], Any]) -> None:
        def after_beats(transaction: int) -> Any:
            beats = hearing.engine._listener._control.returned  # type: ignore[attr-defined]
            eventually(lambda: hearing.engine._listener._control.returned > beats + 2)  # type: ignore[attr-defined]
            return query(transaction)

        real(after_beats)

    sending.engine._own.sending.in_transaction = slowly  # type: ignore[attr-defined]
    sending.engine.control(COMMAND)
    eventually(lambda: hearing.sink.messages == [COMMAND])


@pytest.mark.parametrize("log_of_sender", [False, "auto"])
@pytest.mark.parametrize("log_of_hearer", [False, "auto"])
def test_apps_with_and_without_the_log_hear_each_other(
    logged_url: str, start: Start, log_of_sender: bool | str, log_of_hearer: bool | str
) -> None:
    hearing = start(logged_url, event_log=log_of_hearer)
    sending = start(logged_url, event_log=log_of_sender)
    for _ in range(3):
        sending.engine.control(COMMAND)
    eventually(lambda: len(hearing.sink.messages) == 3)
    with closing(connect(logged_url)) as connection:
        tell_and_wait(hearing, connection, [])
    assert hearing.sink.messages == [COMMAND] * 3


def test_what_a_command_names_is_not_readable(url: str, start: Start) -> None:
    """Neither by who listens to the control channel nor by who reads the log, and equal ones do not look alike."""
    process = start(url)
    with closing(connect(url)) as stranger:
        run(stranger, "LISTEN flask_pg_sse")
        for subject in ("a subject", "a subject", "another, long " + "x" * 200):
            process.engine.control(Disconnect(subject, None))
        process.engine.control(Disconnect(None, "a channel"))
        eventually(lambda: len(heard_payloads(stranger)) == 4)
        payloads = heard_payloads(stranger)
    texts = [json.loads(form)["disconnect"] for payload in payloads for form in forms(payload)[-1:]]
    contents = [URLSafeSerializer("not the key").loads_unsafe(text)[1] for text in texts]
    shown = f"{payloads} {contents} {[base64.b64decode(content['h']) for content in contents]}"
    for word in ("subject", "channel", "another", "x" * 8):  # shorter ones occur by chance
        assert word not in shown
    hidden = [content["h"] for content in contents]
    assert len({text[:20] for text in hidden}) == 4 and len({len(text) for text in hidden}) == 1
    eventually(lambda: process.sink.messages[-1:] == [Disconnect(None, "a channel")])


def test_snapshots() -> None:
    ended = Snapshot.read("5:9:6,8")
    assert [number for number in range(12) if number in ended] == [0, 1, 2, 3, 4, 5, 7]
    assert 6 not in ended and 6 in Snapshot.read("9:9:") and 0 not in Snapshot()


# -- a process that did not hear


def app_behind(make_app: Callable[..., Flask], url: str, line: Link) -> Flask:
    return make_app(
        url,
        authorize=lambda channel: True,
        subject=lambda: 7,
        SECRET_KEY="a key",
        SSE_CHANNELS=["public"],
        SSE_LISTEN_URL=through(line, url),
        SSE_HEARTBEAT=0.5,
    )


def events_of(app: Flask, query: str) -> Any:
    events = stream(app.test_client(), query, timeout=20)
    assert next(events).event == "sse-open"
    # Where PostgreSQL is away for five seconds, that is told too.
    return (event for event in events if event.event not in ("sse-cursor", "sse-status"))


def test_a_command_that_is_heard_before_the_log_is_read_passes_no_event(
    logged_url: str, line: Link, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new connection hears commands first, then the log is read: what it missed comes before the command's id."""
    process, other = start(through(line, logged_url)), start(logged_url)
    publish = other.engine.publish
    publish("a", [Event("before")])
    process.sink.wait(1)
    beat = PostgresListener._beat
    listener: Any = process.engine
    missed: list[int | None] = []

    def beat_behind_a_command(self: PostgresListener, connection: Any, *rest: Any) -> bool:
        if self is listener._listener and not missed:
            missed.append(publish("a", [Event("missed")]))
            other.engine.control(COMMAND)
        return beat(self, connection, *rest)

    monkeypatch.setattr(PostgresListener, "_beat", beat_behind_a_command)
    line.drop()
    assert process.sink.wait(2)[-1][2] == missed[0]
    publish("a", [Event("after")])
    assert [data.split(b"data: ")[1].strip() for _, data, _ in process.sink.wait(3)] == [b"before", b"missed", b"after"]
    assert process.sink.messages == [COMMAND]


def test_without_the_log_a_right_is_checked_again_after_a_connection_was_lost(
    database_url: str, line: Link, make_app: Callable[..., Flask]
) -> None:
    """The worker may have missed a command. What waits for such a stream is not sent, nor what comes then."""
    app = app_behind(make_app, database_url, line)
    with app.test_request_context():
        signed = sse_url("signed", sign=True)
        streams = [events_of(app, query) for query in ("/sse/closed", signed, "/sse?channel=public&channel=closed")]
        public = events_of(app, "/sse/public")
        line.cut()
        disconnect(subject=7)
        line.restore()
        for events in streams:
            assert [event.event for event in events] == ["sse-reset", "sse-end"]
        assert next(public).event == "sse-reset"
        notify("public", "goes on")
        assert next(public).data == "goes on"
        again = events_of(app, "/sse/closed")
        notify("closed", "again")
        assert next(again).data == "again"


def test_a_stream_that_was_being_checked_meanwhile_is_checked_again_too(
    database_url: str, line: Link, make_app: Callable[..., Flask]
) -> None:
    """The authorizer has said yes before the command, and the stream stands in no table when the connection is back."""
    app = app_behind(make_app, database_url, line)
    app.extensions["pg_sse"].authorize = lambda channel: lose_connection()
    public = events_of(app, "/sse/public")

    def lose_connection() -> bool:
        line.cut()
        line.restore()
        assert next(public).event == "sse-reset"
        return True

    [end] = stream(app.test_client(), "/sse/closed", timeout=20)
    assert (end.event, end.json) == ("sse-end", {"reason": "unavailable"})


def test_with_the_log_a_missed_command_is_read_and_all_others_stay(
    logged_url: str, line: Link, make_app: Callable[..., Flask]
) -> None:
    app = app_behind(make_app, logged_url, line)
    with app.test_request_context():
        seven, public = events_of(app, "/sse/closed"), events_of(app, "/sse/public")
        app.extensions["pg_sse"].subject = lambda: 8
        eight = events_of(app, "/sse/closed")
        line.cut()
        disconnect(subject=7, channel="closed")
        notify("closed", "private")
        notify("public", "for all")
        line.restore()
        assert [event.json for event in seven] == [{"reason": "revoked"}]
        assert next(eight).data == "private" and next(public).data == "for all"


def test_with_the_log_pruned_beyond_a_missed_command_a_right_is_checked_again(
    logged_url: str, line: Link, make_app: Callable[..., Flask]
) -> None:
    app = app_behind(make_app, logged_url, line)
    with app.test_request_context():
        seven, public = events_of(app, "/sse/closed"), events_of(app, "/sse/public")
        line.cut()
        disconnect(subject=7)
        notify("closed", "private")
        execute(logged_url, "SELECT flask_pg_sse.prune_v1('0 s', 100)")
        line.restore()
        assert [event.event for event in seven] == ["sse-reset", "sse-end"]
        assert next(public).event == "sse-reset"


def test_a_beat_looks_at_no_command_twice() -> None:
    """However many are remembered: their transactions may come long after those that a beat tells of."""
    looked_at: list[int] = []

    class Counting(Snapshot):
        def __contains__(self, transaction: int) -> bool:
            looked_at.append(transaction)
            return super().__contains__(transaction)

    obeyed: list[ControlMessage] = []
    commands = DisconnectCommands(lambda: ["a key"], obeyed.append)
    texts = {number: sign_disconnect(["a key"], f"user-{number}", None, number) for number in range(1, 301)}
    for text in texts.values():
        commands.obey(text, logged=False)
    assert len(obeyed) == 300
    looked_at.clear()
    for upto in range(1, 301):
        commands.came(Counting(xmax=upto + 1, running=frozenset([17])))
    assert len(looked_at) <= 300 + 300, "one each, and the one that runs on"
    for text in texts.values():
        commands.obey(text, logged=False)
    assert len(obeyed) == 300, "the one that runs on is remembered, and the others are copies"
    commands.came(Counting(xmax=301))
    assert not commands._done and not commands._transactions


def test_commands_of_another_app_are_logged_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Apps with different keys in one database hear each other's commands, for as long as both run."""
    commands = DisconnectCommands(lambda: ["a key"], lambda message: None)
    minute = 0
    monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: minute * 60.0))
    for minute in range(24 * 60):  # noqa: B007  # the clock reads it
        commands.obey(sign_disconnect(["another key"], "a subject", None, 7), logged=False)
    assert 24 < len(caplog.messages) < 34, "once an hour in the end"
    assert caplog.messages[0] == "Ignored a command to end streams: it is not signed with this app's key."
    assert caplog.messages[-1].endswith("(60 times since this was last logged)")
