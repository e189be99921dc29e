"""The basic app where an authorizer, which allows all, is asked for every channel."""

from __future__ import annotations

from flask_pg_sse import sse_bp
from tests.apps.basic import app

app.config["SSE_CHANNELS"] = []


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    return True


__all__ = ["app"]
