"""The basic app where `?user=…` says who one is, and a table who may listen to what; its pool has one connection."""

from __future__ import annotations

import os
from typing import Any

from flask import request
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text

from flask_pg_sse import disconnect, sse_bp
from tests.support.apps.basic import app

app.config.update(
    SSE_CHANNELS=[],
    SECRET_KEY="a secret",
    SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"],
    SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 5},
)
db = SQLAlchemy(app)


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    query = text("SELECT channel FROM membership WHERE channel = :channel AND member = :member")
    found = db.session.execute(query, {"channel": channel, "member": request.args.get("user", "")})
    return found.first() is not None


@sse_bp.subject
def whose_stream() -> str | None:
    return request.args.get("user")


@app.get("/checked-out")
def checked_out() -> ResponseReturnValue:
    pool: Any = db.engine.pool
    return str(pool.checkedout())


@app.post("/disconnect")
def end_streams() -> ResponseReturnValue:
    disconnect(**request.get_json())
    return "", 204


__all__ = ["app"]
