"""A client that closes its connection is noticed at once, and not at the next heartbeat."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.hub.ticker import Ticker
from flask_pg_sse.server.connection import Connection
from flask_pg_sse.server.hangups import Hangups
from tests.http.test_limits import streams
from tests.support.client import eventually, open_stream
from tests.support.crowd import worker
from tests.support.model import Quiet
from tests.support.processes import cpu
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
WORKERS = pytest.mark.parametrize(
    "options",
    [(), pytest.param(("-k", "gthread", "--threads", "60"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def finish(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def nothing(sock: socket.socket) -> None:
    pass


def say_more(sock: socket.socket) -> None:
    """Unread bytes lie between the server and the end of the connection."""
    sock.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")


@WORKERS
@pytest.mark.parametrize("direct", ["1", "0"], ids=["direct", "generator"])
@pytest.mark.parametrize(
    "way",
    [
        nothing,
        pytest.param(reset, marks=pytest.mark.slow),
        pytest.param(finish, marks=pytest.mark.slow),
        say_more,
    ],
)
def test_all_that_a_client_held_is_free_within_a_second(
    database_url: str,
    start_server: Start,
    options: tuple[str, ...],
    direct: str,
    way: Callable[[socket.socket], None],
) -> None:
    env = {"FLASK_SSE_HEARTBEAT": "300", "FLASK_SSE_DIRECT_WRITE": direct}
    server = start_server(database_url, *options, **env)
    with open_stream(server.port, "a") as staying:
        with ExitStack() as stack:
            leaving = [stack.enter_context(open_stream(server.port, "a", "b")) for _ in range(30)]
            assert streams(server) == 31
            for stream in leaving:
                way(stream.sock)
        eventually(lambda: streams(server) == 1, what="a second, and what a busy machine adds; not 300 s")
        server.post("/notify/a", b'{"data": "hello"}')
        assert staying.event().data == "hello"
    assert "Traceback" not in server.log()


@WORKERS
def test_bytes_that_a_client_sends_do_not_keep_the_worker_busy(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """A second request on the same connection is never read: the stream's end is the connection's."""
    server = start_server(database_url, *options, FLASK_SSE_HEARTBEAT="300")
    with open_stream(server.port, "a") as stream:
        stream.sock.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        server.get("/ping")
        before = cpu(worker(server))
        time.sleep(1)  # what is measured is a second of quiet
        assert cpu(worker(server)) - before < 10, "ticks of 10 ms"
        server.post("/notify/a", b'{"data": "hello"}')
        assert stream.event().data == "hello"


def watched(hangups: Hangups[Subscription], sock: socket.socket) -> Subscription:
    subscription = Subscription("a", 1000)
    subscription.connection = Connection({"gunicorn.socket": sock})
    hangups.watch(subscription)
    return subscription


def test_a_descriptor_that_is_another_streams_by_now_stays_watched() -> None:
    """A stream is forgotten some time after its end; its socket's number may have been given out again."""
    hangups = Hangups[Subscription]()
    hangups.start()
    with ExitStack() as sockets:
        ours, theirs, new, far = map(sockets.enter_context, (*socket.socketpair(), *socket.socketpair()))
        number = ours.fileno()
        one = watched(hangups, ours)
        ours.close()
        theirs.close()
        other = watched(hangups, sockets.enter_context(socket.socket(fileno=os.dup2(new.fileno(), number))))
        hangups.forget(one)
        new.close()
        far.close()
        assert hangups.take() == [other]
        hangups.forget(other)
        assert hangups.take() == []
    hangups.stop()


def test_the_first_stream_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may open before the ticker's thread has run at all."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    hub = Hub(Quiet(), heartbeat=15, retry=3000)
    ticker = Ticker(hub, 15)
    ticker.start()
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            watched(hub.hangups, ours)
            theirs.close()
            assert select.select([hub.hangups.fileno()], [], [], 0)[0]
    finally:
        ticker.stop(0)
