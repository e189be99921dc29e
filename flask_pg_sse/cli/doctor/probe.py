"""A client of one stream, as a browser is one, that notes when each thing comes. It uses Python's own HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...event import decode

# Seconds in which a connection must be made.
_CONNECT_WITHIN = 5.0
# What a browser sends that proxies decide by. They compress only for those who say that they can read it.
_HEADERS = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "gzip",
    "Cache-Control": "no-cache",
    "User-Agent": "flask_pg_sse doctor",
}


@dataclass(frozen=True, slots=True)
class Block:
    """One event of a stream, and the monotonic time at which it came. `id` is the last one in the stream so far."""

    at: float
    event: str
    data: str
    id: str


class Probe(threading.Thread):
    """Opens one stream, and reads it until it ends or `close()` is called. Other threads wait with `wait_for()`."""

    def __init__(self, url: str, query: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> None:
        super().__init__(name="doctor: a stream", daemon=True)
        self.url = url
        self.blocks: list[Block] = []
        self.heartbeats: list[float] = []
        self.status: int | None = None  # None before the headers have come
        self.is_stream = False
        self.headers: Mapping[str, str] = {}
        self.http10 = False
        self.error: str | None = None
        self.body = ""  # of an answer that is no stream
        self.ended_at: float | None = None
        self.last_byte_at = 0.0
        self._target = f"{urlsplit(url).path}?{query}"
        self._method = method
        self._send = {**_HEADERS, **(headers or {})}
        self._socket: Any = None
        self._changed = threading.Condition()
        self._closed = False
        self.started_at = time.monotonic()

    def first(self, event: str) -> Block | None:
        """Return the first event of that name that has come."""
        return next((block for block in list(self.blocks) if block.event == event), None)

    def of(self, data: str) -> Block | None:
        """Return the event with these data, if it has come."""
        return next((block for block in list(self.blocks) if block.data == data), None)

    def wait_for(self, condition: Callable[[], object], timeout: float) -> bool:
        """Wait until the condition is true, or the stream has ended. Return whether it is true."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.ended_at is not None, timeout)
        return bool(condition())

    def close(self) -> None:
        self._closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            self._read()
        except ssl.SSLCertVerificationError as error:
            self.error = f"its certificate is not trusted here ({error.verify_message})"
        except (OSError, http.client.HTTPException, zlib.error) as error:
            if not self._closed:
                self.error = " ".join(str(error).split()) or type(error).__name__
        finally:
            with self._changed:
                self.ended_at = time.monotonic()
                self._changed.notify_all()
            if self._socket is not None:
                self._socket.close()

    def _read(self) -> None:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_CONNECT_WITHIN)
        connection.connect()
        self._socket = connection.sock
        self._socket.settimeout(None)
        connection.request(self._method, self._target, headers=self._send)
        with connection.getresponse() as response:
            self.headers = {name.lower(): value for name, value in response.getheaders()}
            self.http10 = response.version == 10
            self.last_byte_at = time.monotonic()
            kind_of_body = self.headers.get("content-type", "")
            self.is_stream = response.status == 200 and kind_of_body.startswith("text/event-stream")
            if not self.is_stream:
                self.body = response.read(2000).decode(errors="replace").strip()
            with self._changed:
                self.status = response.status
                self._changed.notify_all()
            if not self.is_stream:
                return
            for name, data, id in decode(self._chunks(response), self._heartbeat):
                self.blocks.append(Block(time.monotonic(), name, data, id))

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        unzip = zlib.decompressobj(31) if self.headers.get("content-encoding") == "gzip" else None
        while data := response.read1(65536):
            self.last_byte_at = time.monotonic()
            yield unzip.decompress(data) if unzip else data
            with self._changed:  # all events of the chunk are in `blocks`
                self._changed.notify_all()

    def _heartbeat(self) -> None:
        self.heartbeats.append(time.monotonic())
