"""SIGTERM: every stream is told, every connection closed, and the worker gone within three seconds."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support.client import Response, eventually, open_stream, request
from tests.support.postgres import execute
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
GTHREAD = ("-k", "gthread", "--threads", "16")
WORKERS = pytest.mark.parametrize(
    "options", [(), pytest.param(GTHREAD, marks=pytest.mark.slow)], ids=["gevent", "gthread"]
)

# Seconds in which a server ends: 1.5 on a quiet machine. gunicorn gives connections that do not end 30.
SOON = 8.0


def terminate_and_check(server: WebServer, streams: list[Response]) -> list[int]:
    """Send SIGTERM; return the retries that the streams were told. The clients never close their end."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream)
        begun = time.monotonic()
        server.terminate()
        retries = []
        for stream in streams:
            message = stream.event()
            assert message.event == "sse-end", message
            assert message.json == {"reason": "shutdown"}
            assert message.retry is not None
            retries.append(message.retry)
            with pytest.raises(EOFError):
                stream.next()
            stream.wait_closed()
        status = server.process.wait(10)
        assert time.monotonic() - begun < SOON, server.log()
        assert status == 0
        assert "Traceback" not in server.log(), server.log()
    return retries


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-w", "2", "--preload"),
        pytest.param(("--keep-alive", "75"), marks=pytest.mark.slow),
        pytest.param((*GTHREAD, "--keep-alive", "75"), marks=pytest.mark.slow),
        pytest.param((*GTHREAD, "--preload"), marks=pytest.mark.slow),
        pytest.param(("-k", "gevent_pywsgi"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_sigterm_ends_streams_and_worker(database_url: str, start_server: Start, options: tuple[str, ...]) -> None:
    server = start_server(database_url, *options)
    streams = [open_stream(server.port, "orders", f"room-{n}") for n in range(10)]
    retries = terminate_and_check(server, streams)
    assert len(set(retries)) > 5, "the retries are spread"
    assert all(1500 <= retry <= 4500 for retry in retries)


@pytest.mark.parametrize("late", ["", pytest.param("1", marks=pytest.mark.slow)])
@WORKERS
def test_the_apps_own_handler_still_runs(
    database_url: str, start_server: Start, options: tuple[str, ...], late: str
) -> None:
    server = start_server(database_url, *options, app="tests.support.apps.own_sigterm:app", SET_LATE=late)
    terminate_and_check(server, [open_stream(server.port, "orders")])
    assert server.log().count("the app's own handler ran") == 1


def test_what_was_sent_before_the_end_still_arrives(database_url: str, start_server: Start) -> None:
    server = start_server(database_url)
    with open_stream(server.port, "orders") as stream, open_stream(server.port, "orders") as other:
        for number in range(100):
            server.post("/notify/orders", json.dumps({"data": number}).encode())
        assert [other.event().json for _ in range(100)] == list(range(100))  # the server has heard them all
        server.terminate()
        assert [stream.event().json for _ in range(100)] == list(range(100))
        assert stream.event().event == "sse-end"


@pytest.mark.slow
@WORKERS
def test_a_client_that_does_not_read_holds_nothing_up(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    server = start_server(database_url, *options, FLASK_SSE_BUFFER_BYTES="100000000")
    stuck = open_stream(server.port, "orders", receive_buffer=2048)
    other = open_stream(server.port, "other")
    # Far more than the kernel's buffers on both sides take, so that the server's send waits.
    server.post("/flood/orders/2000/7000")
    terminate_and_check(server, [other])
    stuck.close()


def test_streams_that_wait_for_postgres_are_let_go(own_postgres: postgres.Server, start_server: Start) -> None:
    own_postgres.stop()
    server = start_server(own_postgres.url())
    streams = []
    for _ in range(3):
        sock = socket.create_connection(("127.0.0.1", server.port), 10)
        sock.sendall(b"GET /sse?channel=orders HTTP/1.1\r\nHost: localhost\r\n\r\n")
        streams.append(sock)
    eventually(lambda: "3" in server.get("/state") and '"streams":3' in server.get("/state").replace(" ", ""))
    begun = time.monotonic()
    server.terminate()
    assert server.process.wait(10) == 0
    assert time.monotonic() - begun < SOON
    for sock in streams:
        answer = b""
        while data := sock.recv(65536):
            answer += data
        assert b'"reason": "shutdown"' in answer
        sock.close()


def test_a_reload_moves_streams_to_the_new_worker(database_url: str, start_server: Start) -> None:
    server = start_server(database_url)
    with open_stream(server.port, "orders") as stream:
        server.process.send_signal(signal.SIGHUP)
        assert stream.event().json == {"reason": "shutdown"}
        stream.wait_closed()

    def reopen() -> Response | None:
        """Do as a browser does: the old worker may still answer once, and says when to come back."""
        response = request(server.port, "/sse/orders")
        if response.next().event == "sse-open":
            return response
        response.close()
        return None

    with eventually(reopen) as stream:
        execute(database_url, "NOTIFY orders, 'again'")
        assert stream.event().data == "again"


@WORKERS
def test_a_worker_that_reaches_max_requests_lets_its_streams_go(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    server = start_server(database_url, *options, "--max-requests", "5")
    with open_stream(server.port, "orders") as stream:
        for _ in range(5):
            with request(server.port, "/ping", headers={"Connection": "close"}) as response:
                response.read()
        assert stream.event().json == {"reason": "shutdown"}
        stream.wait_closed()


def test_signals_are_left_alone_outside_gunicorn(make_app: Callable[..., object]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    make_app()
    assert signal.getsignal(signal.SIGTERM) is before
