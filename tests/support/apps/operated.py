"""The basic app with `ops_bp`; FLASK_SSE_OPS_TOKEN opens its metrics."""

from __future__ import annotations

from flask_pg_sse import ops_bp
from tests.support.apps.basic import app

app.register_blueprint(ops_bp)
