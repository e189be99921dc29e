"""A plain HTTP/1.1 client for streams, on a bare socket: it shares no code with the package that it tests."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

HEARTBEAT = b": heartbeat\n"


@dataclass
class Message:
    """One block of a stream: its fields as they stand there, comments apart."""

    event: str = "message"
    data: str | None = None
    id: str | None = None
    retry: int | None = None
    comments: list[str] = field(default_factory=list)

    @property
    def json(self) -> Any:
        assert self.data is not None
        return json.loads(self.data)


class Response:
    """The answer to one request, read piece by piece. `timeout` bounds each wait."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self.timeout = timeout
        self.raw = b""  # read and not yet understood
        self.body = b""  # decoded and not yet taken
        self.finished = False  # the terminating chunk, or the end of the connection between two chunks
        self.broken = False  # there was no terminating chunk
        self.closed = False  # the server has closed the connection
        head = self._until(b"\r\n\r\n").decode("latin-1")
        status, *lines = head.split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.set_cookies = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("set-cookie:")]
        self.chunked = self.headers.get("transfer-encoding") == "chunked"
        self._left = 0 if self.status == 204 else int(self.headers.get("content-length", -1))

    def _receive(self) -> bool:
        """Read once; False at the end of the connection."""
        self.sock.settimeout(self.timeout)
        data = self.sock.recv(65536)
        self.raw += data
        self.closed = self.closed or not data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.raw:
            if not self._receive():
                raise ConnectionError(f"the connection ended within {self.raw!r}")
        found, self.raw = self.raw.split(mark, 1)
        return found

    def _read_more(self) -> None:
        """Move at least one more byte to `body`, or set `finished`."""
        if self.chunked:
            # Nothing is taken out of `raw` before the chunk is whole: a wait for its rest may end by TimeoutError.
            while (at := self.raw.find(b"\r\n")) < 0 or len(self.raw) < at + 4 + int(self.raw[:at], 16):
                if self._receive():
                    continue
                if self.raw:
                    raise ConnectionError("the connection ended within a chunk")
                self.finished = self.broken = True
                return
            size = int(self.raw[:at], 16)
            body, mark, self.raw = self.raw[at + 2 :][:size], self.raw[at + 2 + size :][:2], self.raw[at + 4 + size :]
            assert mark == b"\r\n", "a chunk of another length than it says"
            self.body += body
            self.finished = size == 0
        else:
            if not self.raw and not self._receive():
                self.finished = True
            self.body += self.raw
            self._left -= len(self.raw)
            self.raw = b""
            self.finished = self.finished or self._left == 0

    def read(self) -> bytes:
        """Return the rest of the body."""
        while not self.finished and self._left != 0:
            self._read_more()
        body, self.body = self.body, b""
        return body

    def next_line(self) -> bytes:
        """Return the next line of the stream, which may be within a block."""
        while b"\n" not in self.body:
            self._read_more()
        line, _, self.body = self.body.partition(b"\n")
        return line + b"\n"

    def next(self) -> Message:
        """Return the next block of the stream, or a heartbeat, a line alone; EOFError at the stream's end."""
        while b"\n\n" not in self.body and not self.body.startswith(HEARTBEAT):
            if self.finished:
                raise EOFError(f"the stream ended, with {self.body!r} left over")
            self._read_more()
        if self.body.startswith(HEARTBEAT):
            self.body = self.body[len(HEARTBEAT) :]
            return Message(comments=["heartbeat"])
        block, self.body = self.body.split(b"\n\n", 1)
        assert block[:1] != b"\n", "a blank line that ends no block: some clients dispatch an empty message there"
        message = Message()
        data: list[str] = []
        for line in block.decode().split("\n"):
            assert "\r" not in line
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "":
                message.comments.append(value)
            elif name == "data":
                data.append(value)
            elif name == "event":
                message.event = value
            elif name == "id":
                message.id = value
            elif name == "retry":
                message.retry = int(value)
            else:
                raise AssertionError(f"unknown field in {block!r}")
        message.data = "\n".join(data) if data else None
        return message

    def event(self) -> Message:
        """Return the next block that is not a comment alone; heartbeats do not prolong the wait for it."""
        deadline = time.monotonic() + self.timeout
        while (message := self.next()).data is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing but comments for {self.timeout} s")
        return message

    def wait_closed(self) -> None:
        """Wait until the server has closed the connection."""
        while not self.closed:
            self._receive()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def request(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    timeout: float = 10.0,
    receive_buffer: int | None = None,
    version: str = "1.1",
    tls: ssl.SSLContext | None = None,
    source: str = "",
) -> Response:
    """Send one request to 127.0.0.1 and return the answer once its head is there."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(timeout)
    try:
        if source:  # another address of this machine, for the server another client
            sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname="127.0.0.1")
        fields = {"Host": f"127.0.0.1:{port}", **(headers or {})}
        if body:
            fields["Content-Length"] = str(len(body))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        sock.sendall(f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode() + body)
        return Response(sock, timeout)
    except BaseException:
        sock.close()
        raise


def open_stream(port: int, *channels: str, **options: Any) -> Response:
    """Open a stream and return it behind its first block, which is checked."""
    path = f"{options.pop('path', '/sse')}?{urlencode([('channel', channel) for channel in channels])}"
    return opened(lambda: request(port, path, **options))


def opened(ask: Callable[[], Response]) -> Response:
    """Ask for a stream and return it behind its first block, which is checked.

    One whose right was checked before its worker heard PostgreSQL is told to come back in a moment. A browser does.
    """
    while True:
        response = ask()
        assert response.status == 200, (response.status, response.read())
        opening = response.next()
        if opening.event == "sse-open":
            return response
        response.close()
        assert opening.json == {"reason": "unavailable"} and (opening.retry or 0) <= 300, opening


def eventually(condition: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Return the first true value of `condition`, asked for until `timeout`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or re.sub(' +', ' ', repr(condition))}")
        time.sleep(0.02)
    return value
