"""The basic app with `ops_bp`, and a request that has the worker stop and asks, before it does, whether it is ready."""

from __future__ import annotations

import os
import signal
import time

from flask.typing import ResponseReturnValue

from flask_pg_sse import ops_bp
from flask_pg_sse.server import shutdown
from tests.support.apps.basic import app

app.register_blueprint(ops_bp)


@app.get("/signal-then-ready")
def signal_then_ready() -> ResponseReturnValue:
    os.kill(os.getpid(), signal.SIGTERM)
    while not shutdown.requested():
        time.sleep(0.01)
    return str(app.test_client().get("/readyz").status_code)
