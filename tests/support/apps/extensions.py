"""The basic app with extensions that look at every response, each set up to do as much as it can."""

from __future__ import annotations

import os
from typing import Any

from flask import request
from flask.typing import ResponseReturnValue
from flask_caching import Cache
from flask_compress import Compress
from flask_debugtoolbar import DebugToolbarExtension
from flask_limiter import Limiter
from flask_sqlalchemy import SQLAlchemy
from flask_talisman import Talisman  # type: ignore[import-untyped]
from sqlalchemy import text

from flask_pg_sse import sse_bp
from tests.support.apps.basic import app

app.config.update(
    SECRET_KEY="a secret",
    SSE_CHANNELS=[],
    SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"],
    SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 2},
    COMPRESS_MIMETYPES=["text/html", "text/event-stream"],
    COMPRESS_MIN_SIZE=1,
    CACHE_TYPE="SimpleCache",
    RATELIMIT_HEADERS_ENABLED=True,
)
db = SQLAlchemy(app)
Compress(app)
Cache(app)
Talisman(app, force_https=False)
limiter = Limiter(lambda: request.remote_addr or "", app=app, default_limits=["2 per day"], storage_uri="memory://")
limiter.exempt(sse_bp)
app.debug = True  # the toolbar shows itself in debug mode only
DebugToolbarExtension(app)


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    """Leaves a transaction open, as hooks do."""
    return db.session.execute(text("SELECT true")).scalar_one() is True


@app.get("/users")
@limiter.exempt
def users() -> ResponseReturnValue:
    db.session.execute(text("SELECT 1"))
    pool: Any = db.engine.pool
    return f"{pool.checkedout()} connection in use, of a pool of {pool.size()}"


@app.get("/compressed")
def compressed() -> ResponseReturnValue:
    return "<html><body>" + "x" * 2000


views: dict[str, Any] = app.view_functions
for view in ("ping", "send"):
    views[view] = limiter.exempt(views[view])

__all__ = ["app"]
