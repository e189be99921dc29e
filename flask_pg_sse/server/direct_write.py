"""The way to a client past its generator: one non-blocking send in place of waking a greenlet or a thread.

Only under gunicorn, whose response is chunked (RFC 9112, section 7.1): whoever knows its socket and how much of the
body it has sent can go on with the next chunk. The generator alone is always right; this only spares it the waking.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import logging
import socket
from typing import Any

from .stall import ENOUGH_BYTES, SendProgress

logger = logging.getLogger(__name__)

# For `write()`.
NOW = socket.MSG_DONTWAIT
# Writes to a socket that `DirectWriter.way()` returned: `write(way, chunk, NOW)` returns the bytes that left. It is the
# base class's method, because gevent's waits and wakes others. BlockingIOError says that there is no room; any other
# error is left to the generator, which will meet it too.
write = _socket.socket.send


def frame(data: bytes) -> bytes:
    """Return data as one chunk."""
    return b"%X\r\n%b\r\n" % (len(data), data)


class _Asked:
    """Stands in the place of `wsgi.file_wrapper` (PEP 3333) until gunicorn has asked whether the body is one.

    It asks of the very object that it then iterates over. If that is the generator, nobody stands between the two, who
    would have to see all that leaves; lengths alone do not show who puts asterisks for the digits of a card.
    """

    def __init__(self, wrapper: Any, body: int) -> None:
        self.wrapper = wrapper
        self.of_the_body = False  # gunicorn is the last to ask: others may have, and then changed their minds
        self._body = body  # the number of the object, which itself would keep the whole stream in a circle

    def __call__(self, *args: Any) -> Any:
        return self.wrapper(*args)

    def __instancecheck__(self, instance: object) -> bool:
        self.of_the_body = id(instance) == self._body
        if not self.of_the_body:
            _say_who_stands_between(type(instance))  # type: ignore[arg-type]
        return isinstance(instance, self.wrapper)


@functools.cache  # once for each
def _say_who_stands_between(kind: type) -> None:
    logger.warning(
        "Streams go through their generators, which costs more: %s.%s iterates over them. If it changes nothing in "
        'them, set SSE_DIRECT_WRITE to "always".',
        kind.__module__,
        kind.__qualname__,
    )


class DirectWriter(SendProgress):
    """A client's socket, how fast it takes what is sent and, where there is a way past the generator, gunicorn's
    response on it.

    The socket's own object is kept, never its number: that may be another client's by the time of a write.
    """

    __slots__ = ("_beside", "_response", "_socket")

    def __init__(self) -> None:
        super().__init__()
        self._socket: Any = None  # what lies below gevent's, which waits and wakes others in its methods
        self._response: Any = None
        self._beside = 0  # bytes of the body that gunicorn counts and `SendProgress` does not

    def prepare(self, response: Any, environ: dict[str, Any], body: int, *, always: bool) -> None:
        """Find out whether there is a way: whether gunicorn's response is on a plain socket and goes out as it is.

        That is: if gunicorn itself iterates over the generator, whose `id()` is `body`; `always`: it, or whoever else.
        """
        if type(response.sock) is not socket.socket:
            return
        if any(name.lower() == "content-encoding" for name, _ in response.headers):
            return
        if always:
            self._response = response
        elif "wsgi.file_wrapper" in environ:
            environ["wsgi.file_wrapper"] = _Asked(environ["wsgi.file_wrapper"], body)

    def lead_past(self, environ: dict[str, Any], response: Any) -> None:
        """Open the way that was found, and leave the environ as it was. The response has begun."""
        asked = environ.get("wsgi.file_wrapper")
        if isinstance(asked, _Asked):
            environ["wsgi.file_wrapper"] = asked.wrapper
            if asked.of_the_body:
                self._response = response

    def way(self) -> _socket.socket | None:
        """Return the socket if the response now stands between two chunks, with all that the generator has yielded.

        It does not for HTTP/1.0, nor behind middleware that holds back what it is given, or changes its length.
        """
        response = self._response
        if response is None or not (response.headers_sent and response.chunked):
            return None
        between: bool = response.sent == self.bytes_sent + self._beside
        return self._socket if between else None

    def count(self, body_bytes: int) -> None:
        """Tell gunicorn, whose access log says how much was sent."""
        self._response.sent += body_bytes
        self._beside += body_bytes

    def finish(self, rest: bytes) -> None:
        """Send the rest of a chunk, however long it takes. Raises OSError; the chunk is then torn, and nothing follows.

        In pieces as small as `SendProgress` judges by.
        """
        view = memoryview(rest)
        try:
            for start in range(0, len(view), ENOUGH_BYTES):
                piece = view[start : start + ENOUGH_BYTES]
                self.in_flight = len(piece)
                self._response.sock.sendall(piece)
                self.bytes_sent += len(piece)
                self.in_flight = 0
                self._beside -= len(piece)
        except BaseException:
            with contextlib.suppress(OSError):
                _socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            raise
