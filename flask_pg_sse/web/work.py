"""Say which request a call of `notify(connection=…)` belongs to, and when the request ends, for `engine/losses.py`."""

from __future__ import annotations

from typing import Any

from flask import (
    Flask,
    appcontext_tearing_down,
    current_app,
    g,
    has_request_context,
    request,
    request_finished,
)

from ..engine.losses import Work
from .state import EXTENSION, state_of

_KEY = "_flask_pg_sse_work"


def watch(app: Flask) -> None:
    """Let what a request loses be told at its end."""
    state_of(app).runtime.losses.work = _work
    request_finished.connect(_request_finished, app)
    # Sent after all teardown functions: one of them usually closes the session.
    appcontext_tearing_down.connect(_context_ends, app)


def _work() -> Work | None:
    if not has_request_context() or EXTENSION not in current_app.extensions:
        return None
    work: Work | None = g.get(_KEY)
    if work is None:
        work = Work(request.endpoint)
        setattr(g, _KEY, work)
    return work


def _request_finished(app: Flask, response: Any, **_: Any) -> None:
    # A view that answers with an error has given its work up.
    if (work := g.get(_KEY)) is not None:
        work.failed = response.status_code >= 400
        if work.failed:  # the context may be that of other requests too, as in a test
            work.lost.clear()


def _context_ends(app: Flask, exc: BaseException | None = None, **_: Any) -> None:
    work: Work | None = g.pop(_KEY, None)
    if work is not None:
        work.failed = work.failed or exc is not None
        state_of(app).runtime.losses.end(work)
