"""The way to a client past its generator: one non-blocking send in place of waking a greenlet or a thread.

Only under gunicorn, whose response is chunked (RFC 9112, section 7.1): whoever knows its socket and how much of the
body it has sent can go on with the next chunk. The generator alone is always right; this only spares it the waking.
"""

from __future__ import annotations

import _socket
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from .progress import ENOUGH_BYTES, Progress

# For `Outlet.send`.
NOW = socket.MSG_DONTWAIT


def frame(data: bytes) -> bytes:
    """Return data as one chunk."""
    return b"%X\r\n%b\r\n" % (len(data), data)


class Outlet:
    """A client's socket and gunicorn's response on it.

    The socket's own object is kept, never its number: that may be another client's by the time of a write. The base
    class's `send` neither waits nor wakes anybody, as gevent's does.
    """

    __slots__ = ("_beside", "_client", "_response", "send")

    def __init__(self, client: Any, response: Any) -> None:
        self._client = client
        self._response = response
        raw = getattr(client, "_sock", client)
        # An attribute and not a method, which would cost as much again. BlockingIOError where there is no room; any
        # error is the generator's to find out about.
        self.send: Callable[[bytes, int], int] = _socket.socket.send.__get__(raw)
        self._beside = 0  # bytes of the body that gunicorn counts and `Progress` does not

    def open(self, progress: Progress) -> bool:
        """Tell whether the response now stands between two chunks, with all in it that the generator has yielded.

        It does not where middleware compresses, rewrites or holds back what it is given.
        """
        response = self._response
        return bool(response.headers_sent and response.chunked and response.sent == progress.sent + self._beside)

    def count(self, body_bytes: int) -> None:
        """Tell gunicorn, whose access log says how much was sent."""
        self._response.sent += body_bytes
        self._beside += body_bytes

    def finish(self, rest: bytes, progress: Progress) -> None:
        """Send the rest of a chunk, however long it takes. Raises OSError; the chunk is then torn, and nothing follows.

        In pieces as small as `Progress` judges by.
        """
        view = memoryview(rest)
        try:
            for start in range(0, len(view), ENOUGH_BYTES):
                piece = view[start : start + ENOUGH_BYTES]
                progress.in_flight = len(piece)
                self._client.sendall(piece)
                progress.sent += len(piece)
                progress.in_flight = 0
                self._beside -= len(piece)
        except BaseException:
            with contextlib.suppress(OSError):
                _socket.socket.shutdown(getattr(self._client, "_sock", self._client), socket.SHUT_RDWR)
            raise


def is_gunicorns(response: Any) -> bool:
    """Tell whether it is a response of gunicorn's, over HTTP/1."""
    of = type(response)
    return (of.__module__, of.__qualname__) == ("gunicorn.http.wsgi", "Response")


def outlet_of(client: Any, response: Any) -> Outlet | None:
    """Return the outlet of gunicorn's own HTTP/1.1 response on a plain socket; None for anything else."""
    if not is_gunicorns(response) or type(client) is not socket.socket:
        return None
    if any(name.lower() == "content-encoding" for name, _ in response.headers):
        return None
    return Outlet(client, response)
