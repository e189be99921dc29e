"""SSE_SEND_TIMEOUT: clients that take nothing, or a byte now and then, are cut; slow but steady clients are served."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support.client import Response, eventually, open_stream
from tests.support.crowd import Crowd, publish, worker
from tests.support.processes import resident
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
SMALL_BUFFERS = ("-c", "python:tests.support.apps.small_buffers")
WORKERS = [(), pytest.param(("-k", "gthread", "--threads", "20"), marks=pytest.mark.slow)]


@pytest.fixture
def url(logged_url: str) -> str:
    return logged_url  # without the log a client that does not read is `behind` much sooner


@pytest.fixture(params=WORKERS, ids=["gevent", "gthread"])
def server(request: pytest.FixtureRequest, url: str, start_server: Start) -> WebServer:
    return start_server(url, *SMALL_BUFFERS, *request.param, FLASK_SSE_SEND_TIMEOUT="3", FLASK_SSE_HEARTBEAT="0.5")


def streams(server: WebServer) -> int:
    return int(server.get("/state").split('"streams":')[1].split("}")[0].split(",")[0])


def slow(server: WebServer, channel: str) -> Response:
    return open_stream(server.port, channel, receive_buffer=4096, timeout=20)


def is_cut(response: Response) -> bool:
    """Read what the kernel still has; tell whether the connection then comes to an end, or there is more to come."""
    response.sock.settimeout(0.2)
    try:
        while response.sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_never_reads(server: WebServer, url: str) -> None:
    with slow(server, "a") as sleeper, open_stream(server.port, "a") as awake:
        # More than the sleeper's buffers hold, and so little that the other one's do, though this process stands still.
        publish(url, *[("a", "x" * 10_000)] * 5)
        for _ in range(5):
            assert awake.event().event == "message"
        eventually(lambda: streams(server) == 1, 15)
        assert is_cut(sleeper)
        publish(url, ("a", "and on"))
        while awake.event().data != "and on":
            pass
    assert "took under 16384 bytes" in server.log() and "Traceback" not in server.log()


def test_a_client_that_reads_a_byte_now_and_then(server: WebServer, url: str) -> None:
    with slow(server, "a") as trickling:
        publish(url, *[("a", "x" * 10_000)] * 100)
        gone = threading.Event()

        def read() -> None:
            trickling.sock.settimeout(5)
            try:
                while trickling.sock.recv(1):
                    if gone.wait(0.05):
                        return
            except OSError:
                pass

        reader = threading.Thread(target=read)
        reader.start()
        try:
            eventually(lambda: streams(server) == 0, 15)
        finally:
            gone.set()
            reader.join()


@pytest.mark.slow
def test_a_client_that_sleeps_while_nothing_waits_for_it(server: WebServer) -> None:
    """Heartbeats go into the kernel's buffers: that is no client that does not read."""
    with slow(server, "a") as sleeper, open_stream(server.port, "b") as other:
        for _ in range(18):  # three times the timeout
            other.next()
        assert streams(server) == 2
        server.post("/notify/a", b'{"data": "hello"}')
        assert sleeper.event().data == "hello"


@pytest.mark.parametrize(
    ("size", "pace"), [pytest.param(6_000_000, 1_000_000, marks=pytest.mark.slow), (180_000, 30_000)]
)
def test_a_phone_that_is_slow_but_steady_is_served(server: WebServer, url: str, size: int, pace: int) -> None:
    """For twice the timeout: 6 MB, or what takes as long at a pace that may stop for a second."""
    with slow(server, "a") as phone:
        publish(url, ("a", "x" * size))
        got, began = 0, time.monotonic()
        phone.sock.settimeout(10)
        while got < size:
            data = phone.sock.recv(min(4096, pace // 20))
            assert data, f"cut after {got} bytes in {time.monotonic() - began:.1f} s"
            got += len(data)
            time.sleep(max(0.0, began + got / pace - time.monotonic()))
        assert streams(server) == 1
    assert "less than" not in server.log()


def test_headers_that_are_never_finished_are_no_stream(server: WebServer) -> None:
    """They hold one of gunicorn's connections each, and nothing of ours."""
    with ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.sendall(b"GET /sse?channel=a HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        with open_stream(server.port, "a") as stream:
            assert streams(server) == 1
            server.post("/notify/a", b'{"data": "hello"}')
            assert stream.event().data == "hello"


@pytest.mark.slow
def test_many_that_never_read_cost_no_memory_in_the_end(url: str, start_server: Start) -> None:
    server = start_server(url, *SMALL_BUFFERS, FLASK_SSE_SEND_TIMEOUT="1", FLASK_SSE_HEARTBEAT="0.5")
    sizes = []
    for _ in range(3):
        with Crowd(server.port) as crowd:
            crowd.open(100, "a", receive_buffer=4096)
            publish(url, *[("a", "x" * 10_000)] * 100)
            eventually(lambda: streams(server) == 0, 20)
        sizes.append(resident(worker(server)))
    # Kept, it would be 100 MB each time. The allocator alone has taken 5 MB more.
    assert sizes[2] - sizes[0] < 10 << 20, sizes
