"""An app that logs all that it can, and whose authorizer fails with a secret on its lips."""

from __future__ import annotations

import logging

from flask import Flask, abort, request
from flask.typing import ResponseReturnValue

from flask_pg_sse import notify, sse_bp

logging.basicConfig(level=logging.DEBUG)

app = Flask(__name__)
app.config.from_prefixed_env()


def may_listen(channel: str) -> bool:
    if channel == "failing":
        raise RuntimeError("password=of-another-client")
    return False


app.register_blueprint(sse_bp, authorize=may_listen)


@app.before_request
def gate() -> None:
    if "gated" in request.args:
        abort(401)


@app.teardown_request
def tear_down(error: BaseException | None) -> None:
    if "tearing" in request.args:
        raise RuntimeError("the teardown fails, and Flask is past handling it")


@app.get("/ping")
def ping() -> ResponseReturnValue:
    return "pong"


@app.post("/notify/<channel>")
def send(channel: str) -> ResponseReturnValue:
    notify(channel, "hello")
    return "", 204
