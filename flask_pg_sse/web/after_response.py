"""Call something when the response to the current request has been sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import (
    Flask,
    Response,
    after_this_request,
    appcontext_tearing_down,
    g,
    has_app_context,
    request,
    request_started,
)

from .state import state_of

_KEY = "_flask_pg_sse_after_response"
# Seconds from the end of a request's context, after which the call comes also if the response has not been closed: it
# may be a long one, or a test client's that nobody closes.
LONGEST = 1.0
# Seconds from the response's end to the call. The browser reads it meanwhile: another connection may be faster.
_GRACE = 0.1


def watch(app: Flask) -> None:
    """Let `is_possible()` and `call_after_response()` work in the requests of an app."""
    request_started.connect(_request_started, app)
    appcontext_tearing_down.connect(_context_ends, app)


def _request_started(app: Flask, **_: Any) -> None:
    # The response to a stream's own request takes as long as the stream.
    if request.blueprint != state_of(app).blueprint_name:
        setattr(g, _KEY, [])


def is_possible() -> bool:
    """Tell whether a response follows: not in a job, a shell or a test's request context, nor in a stream's hook."""
    return has_app_context() and g.get(_KEY) is not None


def call_after_response(call: Callable[[float], None]) -> None:
    """Call `call(delay)` when the response has been closed; it is then due in `delay` seconds.

    If the request's context ends before that, the call comes then too, with `LONGEST`. If there is no response after
    all, `call(0.0)` comes then.
    """
    pending = _Pending(call)
    g.get(_KEY).append(pending)
    after_this_request(pending.answered)


class _Pending:
    def __init__(self, call: Callable[[float], None]) -> None:
        self._call = call
        self._answered = self._closed = False

    def answered(self, response: Response) -> Response:
        self._answered = True
        response.call_on_close(self._response_closed)
        return response

    def _response_closed(self) -> None:
        self._closed = True
        self._call(_GRACE)

    def context_ended(self) -> None:
        if not self._closed:
            self._call(LONGEST if self._answered else 0.0)


def _context_ends(app: Flask, **_: Any) -> None:
    for pending in g.pop(_KEY, None) or ():
        pending.context_ended()
