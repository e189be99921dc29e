"""Many clients of streams in one thread, each of which can stop reading; and what they cost the server."""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

from flask_pg_sse.engine.postgres.schema import schema_sql
from tests.support.client import HEARTBEAT
from tests.support.postgres import connect, execute
from tests.support.servers import WebServer

# An event's id and its data, or what stands for long ones: thousands of copies would be too much to keep.
Seen = tuple[int, str]


def brief(data: str) -> str:
    return data if len(data) < 100 else f"{data[:24]}… {len(data)} {zlib.crc32(data.encode()):08x}"


class Reader:
    """One client. `events` are those of the log, `control` the package's own as (name, data, id)."""

    def __init__(
        self, port: int, channels: Sequence[str], last_event_id: int | None = None, receive_buffer: int | None = None
    ) -> None:
        self.channels = channels
        self.last_event_id = last_event_id
        self.events: list[Seen] = []
        self.control: list[tuple[str, Any, int | None]] = []
        self.comments = 0
        self.received = 0  # bytes
        self.reading = True
        self.stop_after = 1 << 62  # bytes
        self.status = 0
        self.finished = False  # by the terminating chunk
        self.closed = False
        self._raw = bytearray()
        self._body = bytearray()
        self._searched = 0
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(30)
        self.sock.connect(("127.0.0.1", port))
        query = urlencode([("channel", channel) for channel in channels])
        known = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id is not None else ""
        self.sock.sendall(f"GET /sse?{query} HTTP/1.1\r\nHost: localhost\r\n{known}\r\n".encode())
        self.sock.setblocking(False)

    @property
    def opened(self) -> bool:
        return bool(self.control) and self.control[0][0] == "sse-open"

    @property
    def ids(self) -> list[int]:
        return [log_id for log_id, _ in self.events]

    @property
    def end(self) -> str | None:
        """The reason of its `sse-end`."""
        return next((data["reason"] for name, data, _ in self.control if name == "sse-end"), None)

    def read(self, most: int = 262144) -> None:
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        self.received += len(data)
        self._raw += data
        self._understand()

    def _understand(self) -> None:
        if not self.status:
            head, mark, rest = bytes(self._raw).partition(b"\r\n\r\n")
            if not mark:
                return
            assert b"chunked" in head, head
            self.status = int(head.split()[1])
            self._raw = bytearray(rest)
        at = 0
        while (line_end := self._raw.find(b"\r\n", at)) >= 0:
            size = int(self._raw[at:line_end], 16)
            if len(self._raw) < line_end + 2 + size + 2:
                break
            self._body += self._raw[line_end + 2 : line_end + 2 + size]
            at = line_end + 2 + size + 2
            self.finished = self.finished or not size
        del self._raw[:at]
        at = 0
        while (block_end := self._body.find(b"\n\n", max(at, self._searched))) >= 0:
            self._block(self._body[at:block_end].decode())
            at = block_end + 2
        del self._body[:at]
        while self._body.startswith(HEARTBEAT):  # no blank line follows, so it need not wait for the next block
            self.comments += 1
            del self._body[: len(HEARTBEAT)]
        self._searched = max(0, len(self._body) - 1)

    def _block(self, block: str) -> None:
        name, log_id, data = "message", None, []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value
            elif field == "id":
                log_id = int(value)
            elif not field:
                self.comments += 1
        if log_id is not None:
            self.last_event_id = log_id
        if name.startswith("sse-"):
            self.control.append((name, json.loads("\n".join(data)), log_id))
        elif data:
            self.events.append((log_id or 0, brief("\n".join(data))))


class Crowd:
    """Clients that are read in turn, those that are to read. A context manager: it ends them all."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.readers: list[Reader] = []

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self.readers:
            reader.sock.close()

    def add(self, *channels: str, **options: Any) -> Reader:
        reader = Reader(self.port, channels, **options)
        self.readers.append(reader)
        return reader

    def open(self, count: int, *channels: str, timeout: float = 30, **options: Any) -> list[Reader]:
        """Add clients and read until each has its first block."""
        added = [self.add(*channels, **options) for _ in range(count)]
        self.read_until(lambda: all(reader.opened for reader in added), timeout, "all streams are open")
        return added

    def read_until(self, condition: Callable[[], Any], timeout: float = 30, what: str = "", every: float = 0.2) -> None:
        """Read until `condition` holds, which is asked when there is nothing to read, or after `every` seconds."""
        deadline = time.monotonic() + timeout
        with selectors.PollSelector() as selector:
            for reader in self.readers:
                if reader.reading and not reader.closed:
                    selector.register(reader.sock, selectors.EVENT_READ, reader)
            asked = 0.0
            while True:
                busy = False
                for key, _ in selector.select(0.02):
                    busy = True
                    key.data.read()
                    if key.data.received >= key.data.stop_after:
                        key.data.reading, key.data.stop_after = False, 1 << 62
                    if key.data.closed or not key.data.reading:
                        selector.unregister(key.fileobj)
                if not busy or time.monotonic() - asked > every:
                    asked = time.monotonic()
                    if condition():
                        return
                    if asked > deadline:
                        raise AssertionError(f"not within {timeout} s: {what}; {self.summary()}")

    def summary(self) -> str:
        states = [(len(r.events), r.closed, r.end, r.last_event_id, r.comments) for r in self.readers[:5]]
        return f"{len(self.readers)} clients, {sum(r.opened for r in self.readers)} open; the first: {states}"


def install(url: str) -> str:
    """Install the event log in a test's database, and have calls of its functions counted."""
    execute(url, schema_sql())
    execute(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET track_functions = 'all'")
    return url


def calls(url: str) -> dict[str, int]:
    """Return how often each function of the log was called, by sessions that have ended since."""
    query = "SELECT funcname, calls FROM pg_stat_user_functions WHERE schemaname = 'flask_pg_sse'"
    return {str(name): int(count) for name, count in execute(url, query)}


def calls_after(url: str, server: WebServer) -> dict[str, int]:
    """Stop a web server and return the calls: PostgreSQL counts those of a session when it ends."""
    server.stop()
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'flask%%'"
    )
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        deadline = time.monotonic() + 10
        while True:
            cursor.execute(query, ())
            if cursor.fetchone() == (0,):
                return calls(url)
            assert time.monotonic() < deadline


def publish(url: str, *events: tuple[str, str]) -> None:
    """Send events in one transaction, through the SQL function."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT flask_pg_sse.notify(channel, data) FROM unnest(%s, %s) WITH ORDINALITY AS e (channel, data, n) "
            "ORDER BY n",
            ([channel for channel, _ in events], [data for _, data in events]),
        )


def flood(url: str, channels: Iterable[str], count: int, size: int, batch: int = 50) -> None:
    """Send `count` events of `size` bytes to each channel, in transactions of `batch` each, faster than any client."""
    names = list(channels)
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        for start in range(0, count, batch):
            cursor.execute(
                "SELECT flask_pg_sse.notify(channel, rpad(n || ' ', %s, 'x')) "
                "FROM generate_series(%s, %s) AS n, unnest(%s) AS channel",
                (size, start, min(count, start + batch) - 1, names),
            )


def logged(url: str, channels: Iterable[str], after: int = 0) -> list[Seen]:
    """Return what the log has: what each stream on those channels has to receive, in that order."""
    query = "SELECT id, data FROM flask_pg_sse.event WHERE channel = ANY (%s) AND id > %s ORDER BY id"
    return [(log_id, brief(data)) for log_id, data in execute(url, query, (list(channels), after))]


def worker(server: WebServer) -> int:
    """Return the process id of the first worker."""
    return int(re.findall(r"Worker is ready\. Its process: (\d+)\.", server.log())[0])
