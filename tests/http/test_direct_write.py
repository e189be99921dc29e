"""SSE_DIRECT_WRITE: past the generator or through it, a client gets one valid chunked body with every event once.

Sockets' send buffers are tiny here: loopback's own swallow so much that no write would ever be partial.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from flask_pg_sse import schema_sql
from tests.support.client import Response, eventually, open_stream, request
from tests.support.postgres import execute
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
WAYS = pytest.mark.parametrize("direct", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["direct", "generator"])
WORKERS = pytest.mark.parametrize(
    "options",
    [(), pytest.param(("-k", "gthread", "--threads", "40"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)
SIZES = (1, 10, 1000, 4000, 20_000, 70_000, 300_000, 1_000_000)


def writes(server: WebServer) -> dict[str, int]:
    """How often blocks went past a generator: whole, in part, and not at all for want of room."""
    counts = re.findall(r'"(whole|part|none)":(\d+)', server.get("/writes"))
    return {name: int(count) for name, count in counts}


class Reader(threading.Thread):
    """Reads a stream in its own way: all at once, in drops, or with long rests; checks the framing byte for byte."""

    def __init__(self, response: Response, seed: int, last: int) -> None:
        super().__init__()
        self._response = response
        self._choose = random.Random(seed)
        self._last = last
        self.seen: list[tuple[int, int]] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        pause = threading.Event()
        try:
            while not self.seen or self.seen[-1][0] != self._last:
                message = self._response.event()
                if message.event == "sse-cursor":  # where all this takes longer than a heartbeat's time
                    continue
                assert message.event == "message", message
                number, _, filling = (message.data or "").partition(" ")
                assert filling == "x" * len(filling)
                self.seen.append((int(number), len(message.data or "")))
                if self._choose.random() < 0.1:
                    pause.wait(self._choose.random() * 0.05)
        except BaseException as error:
            self.failure = error


@WAYS
@WORKERS
def test_every_event_once_in_order_and_whole(
    database_url: str, start_server: Start, options: tuple[str, ...], direct: str
) -> None:
    execute(database_url, schema_sql())
    server = start_server(
        database_url,
        *options,
        app="tests.support.apps.direct:app",
        FLASK_SSE_DIRECT_WRITE=direct,
        FLASK_SSE_BUFFER_BYTES="50000",
        FLASK_SSE_HEARTBEAT="0.2",
        SEND_BUFFER="4096",
        TAKE_PART="4",
    )
    choose = random.Random(7)
    # Hundreds of small events with large ones among them, alone and many in one transaction.
    turns = [[choose.choice(SIZES[:4] if choose.random() < 0.9 else SIZES) for _ in range(choose.choice([1, 1, 1, 30]))]
             for _ in range(40)]  # fmt: skip
    sizes = [max(size, len(f"{n} ")) for n, size in enumerate(size for turn in turns for size in turn)]
    with ExitStack() as stack:
        streams = [
            stack.enter_context(open_stream(server.port, "a", receive_buffer=2048 if n % 2 else None, timeout=40))
            for n in range(4)
        ]
        readers = [Reader(stream, seed, len(sizes) - 1) for seed, stream in enumerate(streams)]
        for reader in readers:
            reader.start()
        number = 0
        for turn in turns:
            of_turn = sizes[number : number + len(turn)]
            execute(
                database_url,
                "SELECT flask_pg_sse.notify('a', rpad((%s + n - 1) || ' ', size, 'x')) "
                "FROM unnest(%s) WITH ORDINALITY AS e (size, n) ORDER BY n",
                (number, of_turn),
            )
            number += len(turn)
        for reader in readers:
            reader.join()
            assert reader.failure is None, (reader.failure, server.log()[-2000:])
            assert reader.seen == list(enumerate(sizes))
        if direct == "1":  # both are met: a worker that stood still has sent most events through generators
            eventually(lambda: (seen := writes(server))["whole"] > 5 and seen["part"] > 0)
        else:
            assert writes(server) == {"whole": 0, "part": 0, "none": 0}
    assert "Traceback" not in server.log()


def hears(stream: Response, server: WebServer, *texts: str) -> None:
    for text in texts:
        server.post("/notify/a", b'{"data": "%s"}' % text.encode())
        assert stream.event().data == text


@WORKERS
def test_an_idle_stream_is_written_to_directly_and_counted(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """gunicorn's access log says how many bytes the client got."""
    server = start_server(database_url, *options, "--access-logfile", "-", app="tests.support.apps.direct:app")
    with open_stream(server.port, "a") as stream:
        hears(stream, server, "one", "two", "three")
        assert writes(server) == {"whole": 3, "part": 0, "none": 0}
        received = []
        server.terminate()
        while True:
            try:
                received.append(stream.next())
            except EOFError:
                break
        assert received[-1].event == "sse-end"
    server.process.wait(10)
    [line] = [line for line in server.log().split("\n") if "GET /sse?" in line]
    opening = len(b"retry: 3000\nevent: sse-open\ndata: {}\n\n")
    end = len(f"retry: {received[-1].retry}\nevent: sse-end\ndata: {received[-1].data}\n\n")
    counted = int(line.split('" 200 ')[1].split()[0])
    assert counted == opening + sum(len(f"data: {text}\n\n") for text in ("one", "two", "three")) + end


@WORKERS
@pytest.mark.parametrize(
    "middleware",
    [
        "rewrite",
        "mask",
        "count",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("compress", "delay", "mask lazily", "mask all but files")
        ),
    ],
)
def test_middleware_that_touches_the_body_gets_all_of_it(
    database_url: str, start_server: Start, options: tuple[str, ...], middleware: str
) -> None:
    """Also where it changes no length, and where it changes nothing: only the middleware knows."""
    server = start_server(
        database_url, *options, app="tests.support.apps.direct:app", MIDDLEWARE=middleware, FLASK_SSE_HEARTBEAT="0.2"
    )
    with request(server.port, "/sse?channel=a") as stream:
        if middleware == "compress":
            assert stream.headers["content-encoding"] == "deflate"
            unpack = __import__("zlib").decompressobj().decompress
            text = b""
            sent = False
            while b"data: hello\n\n" not in text:
                stream._read_more()
                piece, stream.body = stream.body, b""
                text += unpack(piece)
                if b"sse-open" in text and not sent:
                    sent = True
                    server.post("/notify/a", b'{"data": "hello"}')
        else:
            assert stream.next().event == "sse-open"
            hears(stream, server, *"abcdefgh")
            server.post("/notify/a", b'{"data": "a secret"}')
            assert stream.event().data == ("a ******" if middleware.startswith("mask") else "a secret")
        assert writes(server) == {"whole": 0, "part": 0, "none": 0}
    between = "builtins.map" if middleware == "mask lazily" else "builtins.generator"
    # Of what is compressed nobody needs to be told.
    assert server.log().count(f"{between} iterates over them") == (middleware != "compress")


@WORKERS
def test_what_ends_at_once_leaves_no_circles_and_says_nothing(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """Refusals come by the thousand when a worker is full: the garbage collector is not to be needed for them."""
    server = start_server(database_url, *options, app="tests.support.apps.direct:app", FLASK_SSE_MAX_STREAMS="1")
    left: dict[str, int] = {}
    with open_stream(server.port, "a"):
        # An ordinary answer leaves some too: gunicorn's. At the first time there is also what has been there before.
        for path in ("/ping", "/ping", "/sse?channel=a"):
            for method in ("HEAD", "GET") * 20:
                with request(server.port, path, method=method) as response:
                    assert response.status == 200
                    assert method == "HEAD" or response.read()
            left[path] = int(server.get("/garbage"))
    assert left["/sse?channel=a"] <= left["/ping"] + 20, left
    assert "iterates over them" not in server.log()


@pytest.mark.parametrize("middleware", ["rewrite", pytest.param("delay", marks=pytest.mark.slow), "count"])
def test_middleware_that_is_said_to_change_nothing(database_url: str, start_server: Start, middleware: str) -> None:
    server = start_server(
        database_url,
        app="tests.support.apps.direct:app",
        MIDDLEWARE=middleware,
        FLASK_SSE_DIRECT_WRITE="always",
        FLASK_SSE_HEARTBEAT="0.2",
    )
    with open_stream(server.port, "a") as stream:
        hears(stream, server, *"abcdefgh")
        assert (writes(server)["whole"] > 0) == (middleware == "count"), "a change of length is noticed even so"
    assert "iterates over them" not in server.log()


def test_http_1_0_has_no_chunks(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, app="tests.support.apps.direct:app")
    with request(server.port, "/sse?channel=a", version="1.0") as stream:
        assert not stream.chunked and stream.next().event == "sse-open"
        hears(stream, server, "a", "b")
        assert writes(server)["whole"] == 0


@pytest.fixture
def tls(tmp_path: Path) -> tuple[list[str], ssl.SSLContext]:
    """gunicorn's options for TLS, and a client's context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(str(key))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return ["--certfile", str(certificate), "--keyfile", str(key)], context


@pytest.mark.slow
@WORKERS
def test_over_tls_every_event_goes_through_the_generator(
    database_url: str, start_server: Start, tls: tuple[list[str], ssl.SSLContext], options: tuple[str, ...]
) -> None:
    """Past the encryption nothing may be written. A client that leaves is noticed at once all the same."""
    execute(database_url, schema_sql())
    certificate, trusted = tls
    server = start_server(
        database_url, *options, *certificate, app="tests.support.apps.direct:app", tls=trusted, SEND_BUFFER="4096"
    )
    with open_stream(server.port, "a", tls=trusted) as stream, open_stream(server.port, "a", tls=trusted) as leaving:
        sizes = [SIZES[n % len(SIZES)] for n in range(24)]
        execute(
            database_url,
            "SELECT flask_pg_sse.notify('a', rpad('', size, 'x')) FROM unnest(%s) WITH ORDINALITY AS e (size, n) "
            "ORDER BY n",
            (sizes,),
        )
        for size in sizes:
            assert len(stream.event().data or "") == len(leaving.event().data or "") == size
        assert writes(server) == {"whole": 0, "part": 0, "none": 0}
        assert isinstance(leaving.sock, ssl.SSLSocket)
        leaving.sock.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):  # for the server's farewell; ours has gone
            leaving.sock.unwrap()
        leaving.close()
        eventually(lambda: '"streams":1}' in server.get("/state"))
    assert "Traceback" not in server.log()


@pytest.mark.slow
@WORKERS
@WAYS
def test_a_connection_that_was_kept_alive_carries_one_stream_and_ends(
    database_url: str, start_server: Start, options: tuple[str, ...], direct: str
) -> None:
    """Requests before the stream on the same connection, one behind it that is never answered, and then the end."""
    server = start_server(
        database_url, *options, "--keep-alive", "75", app="tests.support.apps.direct:app",
        FLASK_SSE_DIRECT_WRITE=direct, FLASK_SECRET_KEY="x",
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        for method in ("GET", "HEAD", "GET"):
            sock.sendall(b"%b /ping HTTP/1.1\r\nHost: x\r\n\r\n" % method.encode())
            answer = b""
            while not answer.endswith(b"\r\n\r\n" if method == "HEAD" else b"pong"):
                answer += sock.recv(65536)
        sock.sendall(b"HEAD /sse?channel=a HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert sock.recv(65536) == b""  # a stream's answer announces it, also to HEAD
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        while not sock.recv(65536).endswith(b"pong"):
            pass
        sock.sendall(b"GET /sse?channel=a HTTP/1.1\r\nHost: x\r\nCache-Control: no-cache\r\n\r\n")
        stream = Response(sock, 10)
        assert stream.headers["connection"] == "close" and stream.next().event == "sse-open"
        hears(stream, server, "one", "two")
        sock.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        hears(stream, server, "three")
        server.post("/end/a")
        assert stream.event().json == {"reason": "revoked"}
        assert stream.read() == b"" and stream.finished
        with suppress(ConnectionResetError):  # nobody has read the request behind it
            stream.wait_closed()
        assert stream.raw == b""
        assert writes(server)["whole"] == (3 if direct == "1" else 0)
    assert "Traceback" not in server.log()


@pytest.mark.slow
@WORKERS
def test_whoever_takes_the_descriptor_of_one_that_left_gets_nothing_of_it(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """Streams come and go while events flow; a connection with the same number hears its own channel alone."""
    server = start_server(database_url, *options, app="tests.support.apps.direct:app", SEND_BUFFER="4096")
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            server.post("/flood/a/5/3000")

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for round in range(60):
            with ExitStack() as stack:
                leavers = [stack.enter_context(open_stream(server.port, "a")) for _ in range(3)]
                for stream in leavers[: round % 3]:
                    stream.next()
                for stream in leavers:
                    # Without a farewell: what is on its way is answered by a reset.
                    stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            with open_stream(server.port, "quiet") as other:
                with request(server.port, "/ping") as response:
                    assert response.read() == b"pong"
                other.sock.settimeout(0.02)
                try:
                    extra = other.raw + other.body + other.sock.recv(65536)
                except TimeoutError:
                    extra = other.raw + other.body
                assert extra == b"", extra
    finally:
        stop.set()
        publisher.join()
    eventually(lambda: '"streams":0' in server.get("/state"), 20)
    assert "Traceback" not in server.log()


def test_a_client_that_leaves_within_a_chunk(database_url: str, start_server: Start) -> None:
    """Half of a chunk is with the socket: the connection ends without a last chunk, and nobody else notices."""
    execute(database_url, schema_sql())
    app = "tests.support.apps.direct:app"
    server = start_server(database_url, app=app, SEND_BUFFER="4096", FLASK_SSE_HEARTBEAT="0.3")
    for partly in range(10):
        stream: Any = open_stream(server.port, "a", receive_buffer=2048)
        server.post("/flood/a/1/60000")
        eventually(partial(lambda seen: writes(server)["part"] > seen, partly))
        stream.close()
    eventually(lambda: '"streams":0' in server.get("/state"), 20)
    with open_stream(server.port, "a") as stream:
        hears(stream, server, "well")
    assert "Traceback" not in server.log()
