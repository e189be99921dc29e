"""The basic app twice in one process, the second below /two."""

from __future__ import annotations

from typing import Any

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from flask_pg_sse import sse_bp
from tests.support.apps.basic import app as first
from tests.support.apps.basic import ping

second = Flask(__name__)
second.config.update(first.config)
second.register_blueprint(sse_bp)
second.get("/ping")(ping)

app: Any = DispatcherMiddleware(first, {"/two": second})
