"""Streams whose permission is being checked: those that wait for PostgreSQL hold a place, and other routes answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, abort

from flask_pg_sse import EventLogMissing, notify, schema_sql
from flask_pg_sse.engine.postgres.listener import PostgresListener
from flask_pg_sse.hub import worker
from flask_pg_sse.hub.admission import OPEN_TIMEOUT
from flask_pg_sse.testing import stream
from tests.support.client import eventually, request
from tests.support.link import Link, through
from tests.support.postgres import execute
from tests.support.servers import WebServer, free_port

Start = Callable[..., WebServer]
CLIENTS = 14
MOMENT = worker._MOMENT  # before the fixture `make_app` makes it longer
WORKERS = pytest.mark.parametrize(
    ("options", "room"),
    [
        (("--worker-connections", "10"), 9),
        pytest.param(("-k", "gthread", "--threads", "4"), 3, marks=pytest.mark.slow),
    ],
    ids=["gevent", "gthread"],
)
DECIDED_BY = pytest.mark.parametrize(
    ("app", "env"),
    [
        ("tests.support.apps.asking:app", {}),
        ("tests.support.apps.basic:app", {"FLASK_SSE_EVENT_LOG": "true"}),
        ("tests.support.apps.basic:app", {}),
    ],
    ids=["authorizer", "log", "nobody"],
)


@pytest.fixture(params=["refuses", "is silent"])
def away(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a PostgreSQL that cannot be reached."""
    with ExitStack() as stack:
        port = free_port()
        if request.param == "is silent":
            hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            port = hole.getsockname()[1]
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


@WORKERS
@DECIDED_BY
def test_with_postgres_away_other_routes_are_answered_and_a_deploy_goes_on(
    away: str, start_server: Start, options: tuple[str, ...], room: int, app: str, env: dict[str, str]
) -> None:
    server = start_server(away, *options, app=app, **env)
    answers: dict[socket.socket, bytes] = {}
    with ExitStack() as stack:
        for _ in range(CLIENTS):  # none of them closes its connection
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            sock.sendall(b"GET /sse?channel=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sock.setblocking(False)
            answers[sock] = b""

        def refused() -> int:
            for sock in answers:
                receive(sock, answers)
            return sum(b'"reason": "capacity"' in answer for answer in answers.values())

        eventually(lambda: refused() == CLIENTS - room)
        assert server.get("/ping") == "pong"
        refused()
        assert not any(b'"reason": "unavailable"' in answer for answer in answers.values()), "it is too early for that"

        server.terminate()
        assert server.process.wait(OPEN_TIMEOUT - 1) == 0
        refused()
        assert sum(b'"reason": "shutdown"' in answer for answer in answers.values()) == room, answers
    assert "Traceback" not in server.log()


def receive(sock: socket.socket, answers: dict[socket.socket, bytes]) -> None:
    try:
        while data := sock.recv(65536):
            answers[sock] += data
    except (BlockingIOError, ConnectionResetError):
        pass


@pytest.fixture
def app_with(database_url: str, make_app: Callable[..., Flask]) -> Callable[..., Flask]:
    """Make an app whose authorizer is given, and decides on all channels."""

    def make(authorize: Callable[[str], bool] | None, **options: Any) -> Flask:
        options = {"SSE_DATABASE_URL": database_url, "SSE_CHANNELS": [], "TESTING": False, **options}
        return make_app(authorize=authorize, **options)

    return make


def places(app: Flask) -> int:
    return len(app.extensions["pg_sse"].runtime.worker.admission.limiter._taken)


def test_a_place_is_held_while_the_app_is_asked_and_given_back_on_every_way_out(
    app_with: Callable[..., Flask],
) -> None:
    held = []

    def whose() -> None:
        held.append(places(app))

    def may_listen(channel: str) -> bool:
        held.append(places(app))
        if channel == "unauthorized":
            abort(401)
        return channel == "open" or bool(1 / 0)

    app = app_with(may_listen, subject=whose, SSE_MAX_STREAMS=1)
    client = app.test_client()
    assert client.head("/sse?channel=open").status_code == 200
    assert app.extensions["pg_sse"].runtime.worker._streams is None, "HEAD opens nothing"
    for url, status in (("open", 200), ("unauthorized", 401), ("failing", 200), ("open&channel=unauthorized", 401)):
        response = client.get(f"/sse?channel={url}")
        response.close()
        assert (response.status_code, places(app)) == (status, 0)
    assert held == [1] * 11
    events = stream(client, "/sse?channel=open")
    assert next(events).event == "sse-open" and places(app) == 1
    assert client.get("/sse?channel=open").data.endswith(b'data: {"reason": "capacity"}\n\n')
    assert len(held) == 13, "who cannot have a stream gives the app no work"
    events.close()


def test_a_page_heals_by_itself_when_the_required_log_is_installed(
    database_url: str, app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    app = app_with(lambda channel: True, SSE_EVENT_LOG=True)
    for debug in (False, True):
        app.debug = debug
        answer = app.test_client().get("/sse?channel=a").text
        assert answer.endswith('data: {"reason": "unavailable"}\n\n')
        assert [line for line in answer.split("\n") if "flask sse init" in line and line.startswith(": ")] == (
            [line for line in answer.split("\n") if line.startswith(": ")]
        )
        assert ("flask sse init" in answer) == debug
    assert places(app) == 0 and "A stream on channel 'a' cannot begin now (sse-end unavailable)" in caplog.text
    assert app.test_client().head("/sse?channel=a").status_code == 200
    with app.app_context(), pytest.raises(EventLogMissing, match="flask sse init"):
        notify("a", "x")
    execute(database_url, schema_sql())

    def opened() -> bool:
        events = stream(app.test_client(), "/sse?channel=a")
        name = next(events).event
        events.close()
        return name == "sse-open"

    eventually(opened, 15, "the listener looks again until it finds the log")


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"SSE_EVENT_LOG": True}, {}], ids=["log", "authorizer"])
def test_who_waits_is_told_in_time_that_it_is_in_vain(
    away: str, app_with: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, config: dict[str, bool]
) -> None:
    monkeypatch.setattr("flask_pg_sse.hub.admission.OPEN_TIMEOUT", 0.5)
    app = app_with(lambda channel: True, SSE_DATABASE_URL=away, **config)
    for method in ("GET", "HEAD", "GET"):
        begun = time.monotonic()
        response = app.test_client().open("/sse?channel=a", method=method)
        assert response.status_code == 200 and time.monotonic() - begun < OPEN_TIMEOUT - 1
        if method == "GET":
            assert response.data.endswith(b'data: {"reason": "unavailable"}\n\n')
    assert places(app) == 0


def test_a_channel_that_nothing_opens_is_refused_at_once(away: str, app_with: Callable[..., Flask]) -> None:
    """Strangers would hold all places otherwise."""
    app = app_with(None, SSE_DATABASE_URL=away, SSE_EVENT_LOG=True, SSE_CHANNELS=["open"])
    for method in ("GET", "HEAD"):
        assert app.test_client().open("/sse?channel=closed", method=method).status_code == 403
    assert app.extensions["pg_sse"].runtime.worker._streams is None, "nothing has been started for it"


@pytest.mark.parametrize("installed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_log_that_is_required_and_a_postgres_that_falls_silent_hold_up_no_deploy(
    database_url: str, app_with: Callable[..., Flask], installed: bool
) -> None:
    if installed:
        execute(database_url, schema_sql())
    with Link(urlsplit(database_url).port or 0) as line:
        url = through(line, database_url)
        app = app_with(lambda channel: True, SSE_DATABASE_URL=url, SSE_EVENT_LOG=True)
        runtime = app.extensions["pg_sse"].runtime
        events = stream(app.test_client(), "/sse?channel=a")
        assert next(events).event == ("sse-open" if installed else "sse-end")
        events.close()
        line.silence()
        if installed:
            runtime.worker.engine._installation.forget()  # as a notify() that fails does
        else:
            eventually(lambda: not runtime.worker.admission._answered.is_set(), 20, "the listener has noticed")
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(app.test_client().get("/sse?channel=b").data))
        waiting.start()
        eventually(lambda: places(app) > 0)
        begun = time.monotonic()
        runtime.close(0)
        waiting.join()
        assert time.monotonic() - begun < OPEN_TIMEOUT - 1
        [answer] = answers
        assert answer.endswith(b'data: {"reason": "shutdown"}\n\n')


@pytest.mark.slow
def test_a_worker_takes_long_to_listen_and_the_first_view_does_not_wait_for_it(
    app_with: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy machine. A browser is told to come back at once; the stream of an app's test opens all the same."""
    connect = PostgresListener._connect

    connected = threading.Event()

    def connect_late(listener: PostgresListener) -> Any:
        time.sleep(3)
        connected.set()
        return connect(listener)

    monkeypatch.setattr(PostgresListener, "_connect", connect_late)
    monkeypatch.setattr(worker, "_MOMENT", MOMENT)
    with app_with(lambda channel: True).test_client().get("/sse?channel=a") as response:
        assert not connected.is_set(), "the view waits for a second"
        assert response.get_data(as_text=True).endswith('data: {"reason": "unavailable"}\n\n')
    with stream(app_with(lambda channel: True).test_client(), "/sse?channel=a") as events:
        assert next(events).event == "sse-open"


def test_a_stream_opens_where_it_was_decided_on(app_with: Callable[..., Flask]) -> None:
    """The engine restarts during the check: the new one has not heard the disconnect commands in between."""

    def may_listen(channel: str) -> bool:
        app.extensions["pg_sse"].close()
        return True

    app = app_with(may_listen)
    [end] = stream(app.test_client(), "/sse?channel=a")
    assert (end.event, end.json) == ("sse-end", {"reason": "shutdown"})


def test_a_client_that_has_left_while_it_waited_does_not_count_and_is_not_called_refused(start_server: Start) -> None:
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/postgres"
    server = start_server(url, app="tests.support.apps.asking:app", FLASK_SSE_MAX_STREAMS_PER_CLIENT="1")
    ask = b"GET /sse?channel=a HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as first:
        first.sendall(ask)
        eventually(lambda: b"retry: 3000" in first.recv(65536))  # it waits for LISTEN, and counts
        with request(server.port, "/sse?channel=a") as refused:
            assert b"capacity" in refused.read()
    with socket.create_connection(("127.0.0.1", server.port), 10) as second:
        second.sendall(ask)
        answer = b""
        while not answer.endswith(b"retry: 3000\n\r\n"):  # it waits too
            data = second.recv(65536)
            assert data, answer
            answer += data
        assert server.get("/places") == "1"
    assert "has not answered within 10 s" not in server.log(), "the first client waited for a moment"


def test_who_is_refused_a_head_holds_no_thread(database_url: str, start_server: Start) -> None:
    """gthread lingers over a connection for its client to close it, for two seconds."""
    server = start_server(database_url, "-k", "gthread", "--threads", "3")
    with ExitStack() as stack:
        begun = time.monotonic()
        for _ in range(10):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            sock.sendall(b"HEAD /sse?channel=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert server.get("/ping") == "pong"
        assert time.monotonic() - begun < 9
