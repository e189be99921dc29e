"""The basic app with hooks that end by the exception that the channel's name says."""

from __future__ import annotations

import builtins

import gevent
from flask import request

from flask_pg_sse import sse_bp
from tests.support.apps.basic import app

app.config.update(SSE_CHANNELS=[], SECRET_KEY="a secret")


def fail(hook: str) -> None:
    if request.args.get("hook") == hook:
        name = request.args["channel"]
        raise getattr(gevent, name, None) or getattr(builtins, name)


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    fail("authorize")
    return True


@sse_bp.subject
def subject() -> None:
    fail("subject")
