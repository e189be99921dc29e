"""The app that most tests run under a real server; configured through the environment (FLASK_SSE_…)."""

from __future__ import annotations

import gc
import logging

from flask import Flask, current_app, jsonify, request
from flask.typing import ResponseReturnValue

from flask_pg_sse import disconnect, notify, notify_many, sse_bp, sse_cursor
from flask_pg_sse.hub.subscription import Subscription

logging.basicConfig(level=logging.INFO)

app = Flask(__name__)
app.config["SSE_CHANNELS"] = ["*"]
app.config.from_prefixed_env()
app.register_blueprint(sse_bp)


@app.get("/ping")
def ping() -> ResponseReturnValue:
    return "pong"


@app.post("/notify/<channel>")
def send(channel: str) -> ResponseReturnValue:
    options = request.get_json()
    return jsonify(notify(channel, options.pop("data", None), **options))


@app.post("/end/<channel>")
def end(channel: str) -> ResponseReturnValue:
    """End the streams on a channel. It needs FLASK_SECRET_KEY."""
    disconnect(channel=channel)
    return "", 204


@app.get("/cursor")
def cursor() -> ResponseReturnValue:
    return jsonify(sse_cursor())


@app.post("/flood/<channel>/<int:count>/<int:size>")
def flood(channel: str, count: int, size: int) -> ResponseReturnValue:
    """Send `count` numbered events of `size` bytes in one transaction."""
    notify_many(channel, [f"{number} ".ljust(size, "x") for number in range(count)])
    return "", 204


@app.get("/held")
def held() -> ResponseReturnValue:
    """Return the number of stream objects in this process."""
    gc.collect()
    return str(sum(isinstance(one, Subscription) for one in gc.get_objects()))


@app.get("/state")
def state() -> ResponseReturnValue:
    """Return what the package holds in this process, without starting anything."""
    worker = current_app.extensions["pg_sse"].runtime._worker
    if worker is None or worker._streams is None:
        return jsonify(streams=0, listened=[])
    return jsonify(streams=len(worker._streams[0]), listened=worker.engine._listener._listens.listened())
