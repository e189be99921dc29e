"""The basic app where an authorizer, which allows all, is asked for every channel."""

from __future__ import annotations

from flask import current_app
from flask.typing import ResponseReturnValue

from flask_pg_sse import sse_bp
from tests.support.apps.basic import app

app.config["SSE_CHANNELS"] = []


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    return True


@app.get("/places")
def places() -> ResponseReturnValue:
    """How many are taken."""
    return str(len(current_app.extensions["pg_sse"].runtime.worker.admission.limiter._taken))


__all__ = ["app"]
