"""What is known of gevent's pywsgi, alone or as gunicorn's worker class: its handler keeps one request."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .gunicorn import LOG_OF_ANOTHER_SERVER, AccessLog, access_log, hang_up
from .release import release_environ, shortened, within_room


def socket_of(environ: Mapping[str, Any]) -> Any:
    """Return the client's socket; None under another server."""
    return getattr(getattr(getattr(environ.get("wsgi.input"), "rfile", None), "raw", None), "_sock", None)


def end_connection(handler: Any, *, unfinished: bool) -> None:
    """Have the connection end with the response, as `gunicorn.end_connection()` does."""
    of: Any = type(handler)
    handler.__class__ = _ending(of, unfinished)


@functools.cache
def _ending(of: Any, unfinished: bool) -> Any:
    class Ending(of):  # type: ignore[misc]
        def _sendall(self, data: bytes) -> None:
            if not (unfinished and data == b"0\r\n\r\n"):  # nothing else that is sent is these bytes alone
                super()._sendall(data)

        def process_result(self) -> None:
            super().process_result()
            hang_up(self.socket)

    return Ending


def release_request(handler: Any) -> None:
    """Let go of what the access log does not name of a request. Its log has the request's line, which stays.

    Raises AttributeError or TypeError if this version of gevent keeps the request differently.
    """
    log = _access_log(handler)
    release_environ(handler.environ, log.environ)
    handler.path = shortened(handler.path)
    kept = {name.lower() for name, _ in within_room(handler.headers.items(), log.request)}
    for name in {name.lower() for name in handler.headers.keys()} - kept:  # noqa: SIM118  # it is no dict
        del handler.headers[name]


def release_response(handler: Any) -> None:
    """Let go of what the access log does not name of a response's headers. They have been sent."""
    handler.response_headers[:] = within_room(handler.response_headers, _access_log(handler).response)


def _access_log(handler: Any) -> AccessLog:
    cfg = getattr(handler.server.log, "cfg", None)  # gunicorn's
    return LOG_OF_ANOTHER_SERVER if cfg is None else access_log(cfg)
