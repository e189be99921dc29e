"""What a load balancer or an orchestrator asks of a process. The answers say nothing but the state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from flask.typing import ResponseReturnValue

from ..engine.base import Readiness
from ..errors import ConfigurationError
from ..hub.admission import TryLater
from .state import current_state

_PLAIN = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
_OK = "ok\n", 200, _PLAIN
# Seconds that the first question waits for the database. Those who ask usually wait a second or two.
_READY_WITHIN = 1.0


def live() -> ResponseReturnValue:
    """Answer while the process serves. A server whose database is away must not be restarted: its streams wait."""
    return _OK


def ready() -> ResponseReturnValue:
    """Answer 200 if PostgreSQL or Redis is heard, and 503 if it is not, or if this worker is about to stop.

    It starts to listen, if no stream has come yet.
    """
    with contextlib.suppress(TryLater, ConfigurationError):
        worker = current_state().runtime.worker
        if not worker.draining:
            _ = worker.streams
            worker.admission.wait_for_answer(_READY_WITHIN)
            if worker.engine.status().readiness is Readiness.READY and not worker.draining:
                return _OK
    return "not ready\n", 503, _PLAIN


HEALTH: Mapping[str, Callable[[], ResponseReturnValue]] = {"livez": live, "readyz": ready}
