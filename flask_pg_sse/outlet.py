"""The way to a client past its generator: one non-blocking send in place of waking a greenlet or a thread.

Only under gunicorn, whose response is chunked (RFC 9112, section 7.1): whoever knows its socket and how much of the
body it has sent can go on with the next chunk. The generator alone is always right; this only spares it the waking.
"""

from __future__ import annotations

import _socket
import contextlib
import operator
import socket
from typing import Any

from .progress import ENOUGH_BYTES, Progress

# For `write()`.
NOW = socket.MSG_DONTWAIT
# To write to a socket that `Outlet.way()` returned: `write(way, chunk, NOW)` gives the bytes that left. Of the base
# class, because gevent's waits, and wakes others. BlockingIOError where there is no room; any error is the generator's
# to find out about.
write = _socket.socket.send

# Of gunicorn's response.
_what_is_used = operator.attrgetter("chunked", "headers", "headers_sent", "req", "sent", "sock")


def frame(data: bytes) -> bytes:
    """Return data as one chunk."""
    return b"%X\r\n%b\r\n" % (len(data), data)


class Outlet(Progress):
    """A client's socket, how fast it takes what is sent and, where there is a way past the generator, gunicorn's
    response on it.

    The socket's own object is kept, never its number: that may be another client's by the time of a write.
    """

    __slots__ = ("_beside", "_response", "_socket")

    def __init__(self) -> None:
        super().__init__()
        self._socket: Any = None  # what lies below gevent's, which waits and wakes others in its methods
        self._response: Any = None
        self._beside = 0  # bytes of the body that gunicorn counts and `Progress` does not

    def lead_past(self, response: Any) -> None:
        """Open the way if gunicorn's response is on a plain socket, and goes out as it is."""
        if type(response.sock) is not socket.socket:
            return
        if not any(name.lower() == "content-encoding" for name, _ in response.headers):
            self._response = response

    def way(self) -> _socket.socket | None:
        """Return the socket if the response now stands between two chunks, with all that the generator has yielded.

        It does not where middleware compresses, rewrites or holds back what it is given.
        """
        response = self._response
        if response is None or not (response.headers_sent and response.chunked):
            return None
        between: bool = response.sent == self.sent + self._beside
        return self._socket if between else None

    def count(self, body_bytes: int) -> None:
        """Tell gunicorn, whose access log says how much was sent."""
        self._response.sent += body_bytes
        self._beside += body_bytes

    def finish(self, rest: bytes) -> None:
        """Send the rest of a chunk, however long it takes. Raises OSError; the chunk is then torn, and nothing follows.

        In pieces as small as `Progress` judges by.
        """
        view = memoryview(rest)
        try:
            for start in range(0, len(view), ENOUGH_BYTES):
                piece = view[start : start + ENOUGH_BYTES]
                self.in_flight = len(piece)
                self._response.sock.sendall(piece)
                self.sent += len(piece)
                self.in_flight = 0
                self._beside -= len(piece)
        except BaseException:
            with contextlib.suppress(OSError):
                _socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            raise


def is_gunicorns(response: Any) -> bool:
    """Tell whether it is a response of gunicorn's over HTTP/1, and has all that is used of it. A later one may not."""
    of = type(response)
    if (of.__module__, of.__qualname__) != ("gunicorn.http.wsgi", "Response"):
        return False
    try:
        _what_is_used(response)
    except AttributeError:
        return False
    return True
