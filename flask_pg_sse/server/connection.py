"""The client's connection: the socket below a stream, what the server keeps of the request, and how it is closed."""

from __future__ import annotations

import _socket
import contextlib
import socket
import sys
from typing import Any

from . import gunicorn
from .direct_write import DirectWriter

# In the first byte of Linux' struct tcp_info (include/net/tcp_states.h).
_ESTABLISHED = 1
# Send timeouts until the kernel gives up a client that does not acknowledge what it is sent. A phone that comes out of
# a tunnel keeps its stream; by itself the kernel would try for some fifteen minutes.
_UNACKNOWLEDGED = 4


class Connection(DirectWriter):
    """The client's connection, as far as the server shows it."""

    __slots__ = ("_begun",)

    def __init__(self, environ: dict[str, Any]) -> None:
        super().__init__()
        self._begun: tuple[dict[str, Any], Any] | None = (environ, None)  # environ and response, until shared
        self._take_socket(gunicorn.socket_of(environ) or environ.get("werkzeug.socket"))

    def _take_socket(self, client: Any) -> None:
        self._socket = getattr(client, "_sock", client)

    def response_started(self, write: Any, *, body: int, direct_write: bool | str, send_timeout: float) -> None:
        """Have the server close the connection after this response. `write` is what `start_response` returned.

        Said before the headers leave, so that the client reads `Connection: close`: a stream ends only because it is to
        end, and a client that keeps its connection would hold up the worker's exit.

        `direct_write` allows for writing past the generator, whose `id()` is `body`: True or "always", see
        `DirectWriter.prepare()`. `send_timeout` is in seconds.
        """
        response: Any = getattr(write, "__self__", None)
        if hasattr(response, "force_close"):  # gunicorn
            response.force_close()
            gunicorn.mask_token(response)
            known = gunicorn.response_behind(write)
            if self._begun is not None and known is not None:
                self._begun = (self._begun[0], known)
                if direct_write:
                    self.prepare(known, self._begun[0], body, always=direct_write == "always")
        elif hasattr(response, "close_connection"):  # gevent's pywsgi
            response.close_connection = True
            self._take_socket(response.socket)
        self._notice_silence(send_timeout)

    def _notice_silence(self, send_timeout: float) -> None:
        """Have the kernel end the connection if the client's host has vanished, which heartbeats then find out.

        Linux has it (TCP_USER_TIMEOUT, RFC 5482; https://man7.org/linux/man-pages/man7/tcp.7.html).
        """
        if hasattr(socket, "TCP_USER_TIMEOUT") and isinstance(self._socket, _socket.socket):
            milliseconds = int(min(2**31 - 1, send_timeout * 1000 * _UNACKNOWLEDGED))
            with contextlib.suppress(OSError):  # a Unix socket has none
                _socket.socket.setsockopt(self._socket, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def intern(self) -> None:
        """Let go of what gunicorn keeps of the request in as far as others have the same. The response has begun.

        The way past the generator, if there is one, is open from here on.
        """
        if self._begun is not None and self._begun[1] is not None:
            self.lead_past(*self._begun)
            # A gunicorn to come may keep it otherwise. It then stays as it is: the stream matters more.
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                gunicorn.intern_request(*self._begun)
        self._begun = None

    def stop_reading(self) -> None:
        """Expect nothing more from the client, who may still read on.

        gunicorn's gthread worker lingers up to two seconds over each connection for the client to close it; and where
        middleware hid the response from `response_started()`, this makes the server find the connection at its end.
        """
        self._shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """End the connection at once; a send that waits for the client fails."""
        self._shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's number; -1 where it is not known, or closed."""
        return _socket.socket.fileno(self._socket) if isinstance(self._socket, _socket.socket) else -1

    def gone(self) -> bool:
        """Tell whether the client has closed the connection, as far as can be seen without waiting or reading.

        Linux is asked for the connection's state: what the client has sent before it left (another request, the last
        words of TLS) would hide its end from who only peeks.
        """
        if not isinstance(self._socket, _socket.socket):
            return False
        # The base class's methods: those of an SSL socket refuse to peek.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a Unix socket, or one that has been closed here
                state = _socket.socket.getsockopt(self._socket, socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                if state[0] == _ESTABLISHED:
                    return False
                # Takes the error: gunicorn would log a traceback for "connection timed out", as not for a broken pipe.
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
            with contextlib.suppress(OSError):  # the client has gone
                # The base class's method: that of an SSL socket would also drop the encryption of what is still to go.
                _socket.socket.shutdown(self._socket, how)
