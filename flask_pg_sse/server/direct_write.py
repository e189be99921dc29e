"""Direct writes to a client, past its generator: one non-blocking send instead of waking a greenlet or a thread.

They work only under gunicorn, whose response is chunked (RFC 9112, section 7.1). Its socket, and how much of the body
has been sent, are all that is needed to send the next chunk. The generator alone is always correct; a direct write only
saves waking it.
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

# The flag for `write()`.
NOW = socket.MSG_DONTWAIT
# Writes to a socket that `DirectWriter.way()` returned: `write(way, chunk, NOW)` returns how many bytes left. It is the
# base class's method, because gevent's own method waits and wakes other greenlets. BlockingIOError means that the
# socket is full. Any other error is left to the generator, which will meet it too.
write = _socket.socket.send


def frame(data: bytes) -> bytes:
    """Return data as one HTTP/1.1 chunk."""
    return b"%X\r\n%b\r\n" % (len(data), data)


class _FileWrapperProbe:
    """Replaces `wsgi.file_wrapper` (PEP 3333) until gunicorn has checked whether the body is a file wrapper.

    gunicorn checks the very object that it then iterates over. If that is the generator, there is no middleware between
    the two that must see all bytes. Comparing lengths would not be enough: middleware may replace the digits of a card
    number by asterisks.
    """

    def __init__(self, wrapper: Any, body: int) -> None:
        self.wrapper = wrapper
        self.of_the_body = False  # the last check counts, because gunicorn's comes after any middleware's
        self._body = body  # the object's id(): a reference would keep the whole stream in a reference cycle

    def __call__(self, *args: Any) -> Any:
        return self.wrapper(*args)

    def __instancecheck__(self, instance: object) -> bool:
        self.of_the_body = id(instance) == self._body
        if not self.of_the_body:
            _warn_about_middleware(type(instance))  # type: ignore[arg-type]
        return isinstance(instance, self.wrapper)


@functools.cache  # warns once for each type
def _warn_about_middleware(kind: type) -> None:
    logger.warning(
        "Streams go through their generators, which costs more: %s.%s iterates over them. If it does not change their "
        'bytes, set SSE_DIRECT_WRITE to "always".',
        kind.__module__,
        kind.__qualname__,
    )


class DirectWriter(SendProgress):
    """A client's socket, and how fast it takes what is sent. Direct writes go to it where they are possible.

    The socket object is kept, never its number: by the time of a write, another client's socket may have that number.
    """

    __slots__ = ("_response", "_socket", "_uncounted")

    def __init__(self) -> None:
        super().__init__()
        self._socket: Any = None  # the plain socket below gevent's, whose methods wait and wake other greenlets
        self._response: Any = None  # gunicorn's, once direct writes are allowed
        self._uncounted = 0  # bytes of the body that gunicorn has counted and `SendProgress` has not

    def prepare(self, response: Any, environ: dict[str, Any], body: int, *, always: bool) -> None:
        """Find out whether direct writes are possible: gunicorn sends the stream unchanged on a plain socket.

        They are possible if gunicorn itself iterates over the generator, whose `id()` is `body`. With `always`, they
        are also possible if middleware iterates over it.
        """
        if type(response.sock) is not socket.socket:
            return
        if any(name.lower() == "content-encoding" for name, _ in response.headers):
            return
        if always:
            self._response = response
        elif "wsgi.file_wrapper" in environ:
            environ["wsgi.file_wrapper"] = _FileWrapperProbe(environ["wsgi.file_wrapper"], body)

    def allow_direct_writes(self, environ: dict[str, Any], response: Any) -> None:
        """Allow direct writes if `prepare()` found them possible, and restore the environ. The response has begun."""
        probe = environ.get("wsgi.file_wrapper")
        if isinstance(probe, _FileWrapperProbe):
            environ["wsgi.file_wrapper"] = probe.wrapper
            if probe.of_the_body:
                self._response = response

    def way(self) -> _socket.socket | None:
        """Return the socket for direct writes, or None if the response is not between two chunks now.

        It is between two chunks when it has sent all that the generator has yielded. It never is for HTTP/1.0, nor
        behind middleware that holds bytes back or changes their number.
        """
        response = self._response
        if response is None or not (response.headers_sent and response.chunked):
            return None
        between: bool = response.sent == self.bytes_sent + self._uncounted
        return self._socket if between else None

    def count(self, body_bytes: int) -> None:
        """Tell gunicorn how many bytes of the body were written directly. Its access log has the total."""
        self._response.sent += body_bytes
        self._uncounted += body_bytes

    def finish(self, rest: bytes) -> None:
        """Send the rest of a chunk, however long it takes, in pieces that `SendProgress` can judge.

        Raises OSError. The chunk is then incomplete, and the connection is shut down: nothing may follow it.
        """
        view = memoryview(rest)
        try:
            for start in range(0, len(view), ENOUGH_BYTES):
                piece = view[start : start + ENOUGH_BYTES]
                self.in_flight = len(piece)
                self._response.sock.sendall(piece)
                self.bytes_sent += len(piece)
                self.in_flight = 0
                self._uncounted -= len(piece)
        except BaseException:
            with contextlib.suppress(OSError):
                _socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            raise
