"""The client's connection: the socket of a stream, what the server keeps of its request, and how it is closed."""

from __future__ import annotations

import _socket
import contextlib
import socket
import sys
from typing import Any

from ..concurrency.forks import close_in_children
from . import gunicorn, pywsgi
from .direct_write import DirectWriter
from .release import release_environ

# A state in the first byte of Linux' struct tcp_info (include/net/tcp_states.h).
_ESTABLISHED = 1
# After so many send timeouts the kernel gives up a client that does not acknowledge what it is sent. A phone that comes
# out of a tunnel keeps its stream. By default the kernel would try for some fifteen minutes.
_UNACKNOWLEDGED = 4


class Connection(DirectWriter):
    """The client's connection, as far as the server shows it."""

    __slots__ = ("_answer", "_breaks_off", "_end", "_environ")

    def __init__(self, environ: dict[str, Any]) -> None:
        super().__init__()
        self._environ: dict[str, Any] | None = environ  # until `release_request()`
        self._answer: Any = None  # gunicorn's response or pywsgi's handler, until `release_response()`
        # The HTML standard has an EventSource ask with "Cache-Control: no-cache". It reconnects after any end. Chromium
        # may drop the last block of a body that breaks off, and the page would not learn why its stream has ended.
        event_source = "no-cache" in environ.get("HTTP_CACHE_CONTROL", "")
        self._breaks_off = not event_source and environ.get("REQUEST_METHOD") != "HEAD"
        # Only like this does werkzeug's server not send the last chunk: its write to the socket fails, without a word.
        self._end = socket.SHUT_RDWR if self._breaks_off and "werkzeug.socket" in environ else socket.SHUT_RD
        self._take_socket(gunicorn.socket_of(environ) or environ.get("werkzeug.socket") or pywsgi.socket_of(environ))

    def _take_socket(self, client: Any) -> None:
        self._socket = getattr(client, "_sock", client)
        if isinstance(self._socket, _socket.socket):
            close_in_children(self._socket)

    def response_started(self, write: Any, *, body: int, direct_write: bool | str, send_timeout: float) -> None:
        """Have the server close the connection after this response. `write` is what `start_response` returned.

        This happens before the headers leave, so the client reads `Connection: close`. A client that keeps its
        connection after the end of a stream would delay the worker's exit.

        Except for an EventSource the body ends without its last chunk, because clients built on fetch only reconnect if
        reading the body fails. Behind middleware that hides the response, and for HTTP/1.0, the end is a clean one.

        `direct_write` allows direct writes past the generator, whose `id()` is `body`. It is False, True or "always"
        (see `DirectWriter.prepare()`). `send_timeout` is in seconds.
        """
        response: Any = getattr(write, "__self__", None)
        if hasattr(response, "force_close"):  # gunicorn
            response.force_close()
            gunicorn.mask_token(response)
            known = self._answer = gunicorn.response_behind(write)
            if known is not None:
                gunicorn.end_connection(known, unfinished=self._breaks_off)
            if self._environ is not None and known is not None and direct_write:
                self.prepare(known, self._environ, body, always=direct_write == "always")
        elif hasattr(response, "close_connection"):  # gevent's pywsgi
            response.close_connection = True
            pywsgi.end_connection(response, unfinished=self._breaks_off)
            self._take_socket(response.socket)
            self._answer = response
        self._notice_silence(send_timeout)

    def _notice_silence(self, send_timeout: float) -> None:
        """Have the kernel end the connection if the client's host has vanished. The next heartbeat then fails.

        Only Linux can do this (TCP_USER_TIMEOUT, RFC 5482; https://man7.org/linux/man-pages/man7/tcp.7.html).
        """
        if hasattr(socket, "TCP_USER_TIMEOUT") and isinstance(self._socket, _socket.socket):
            milliseconds = int(min(2**31 - 1, send_timeout * 1000 * _UNACKNOWLEDGED))
            with contextlib.suppress(OSError):  # a Unix socket has none
                _socket.socket.setsockopt(self._socket, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def release_request(self) -> None:
        """Let go of what the stream no longer needs of its request, and share the rest with other streams.

        Called once the app has answered, before the stream waits for anything. Direct writes, if they are possible, are
        allowed from here on.
        """
        environ, self._environ = self._environ, None
        if environ is None:
            return
        answer = self._answer
        # A later server may keep the request differently. Then it keeps it, and the stream goes on.
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            if answer is None:
                release_environ(environ)
            elif hasattr(answer, "close_connection"):
                pywsgi.release_request(answer)
            else:
                self.allow_direct_writes(environ, answer)
                gunicorn.release_request(environ, answer)
                gunicorn.intern_request(environ, answer)

    def release_response(self) -> None:
        """Let go of the response's headers, which have been sent."""
        answer, self._answer = self._answer, None
        if answer is not None:
            with contextlib.suppress(AttributeError, TypeError):
                (pywsgi if hasattr(answer, "close_connection") else gunicorn).release_response(answer)

    def end(self) -> None:
        """Stop receiving from the client, which may still read. All of the stream has been handed to the server.

        gunicorn's gthread worker otherwise waits up to two seconds for the client to close the connection. And if
        middleware hid the response from `response_started()`, this makes the server see the end of the connection.
        """
        self._shutdown(self._end)

    def cut(self) -> None:
        """End the connection at once. A send that waits for the client fails."""
        self._shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's number; -1 if it is not known or closed."""
        return _socket.socket.fileno(self._socket) if isinstance(self._socket, _socket.socket) else -1

    def gone(self) -> bool:
        """Tell whether the client is known to have closed the connection, without waiting or reading.

        On Linux the connection's state tells. A peek alone would not see the end behind unread bytes that the client
        sent before it (another request, the close_notify of TLS).
        """
        if not isinstance(self._socket, _socket.socket):
            return False
        # The base class's methods, because those of an SSL socket refuse to peek.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a Unix socket, or one that has been closed in this process
                state = _socket.socket.getsockopt(self._socket, socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                if state[0] == _ESTABLISHED:
                    return False
                # Clears the socket's error. For "connection timed out" gunicorn would log a traceback; for a broken
                # pipe it does not.
                _socket.socket.getsockopt(self._socket, socket.SOL_SOCKET, socket.SO_ERROR)
                return True
        try:
            return not _socket.socket.recv(self._socket, 1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def _shutdown(self, how: int) -> None:
        if isinstance(self._socket, _socket.socket):
            with contextlib.suppress(OSError):  # the client has disconnected
                # The base class's method: an SSL socket's own would send the remaining bytes without encryption.
                _socket.socket.shutdown(self._socket, how)
