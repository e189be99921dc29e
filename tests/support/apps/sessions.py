"""The basic app with users who log in, and extensions that do something at the end of each request.

KIND chooses where the session is: in the cookie, or in one of Flask-Session's stores, in the folder STORE.
"""

from __future__ import annotations

import os
import time
from typing import Any

import redis
from cachelib import FileSystemCache
from flask import abort, after_this_request, request, session
from flask.typing import ResponseReturnValue
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user  # type: ignore[import-untyped]
from flask_session import Session  # type: ignore[import-untyped]
from flask_sqlalchemy import SQLAlchemy
from flask_wtf import CSRFProtect  # type: ignore[import-untyped]

from flask_pg_sse import disconnect, sse_bp
from tests.support.apps.basic import app

kind, store = os.environ["KIND"], os.environ["STORE"]
app.config.update(
    SSE_CHANNELS=[],
    SECRET_KEY="a secret",
    PERMANENT_SESSION_LIFETIME=3600,
    REMEMBER_COOKIE_REFRESH_EACH_REQUEST=True,
    WTF_CSRF_CHECK_DEFAULT=False,
)
LoginManager(app).session_protection = "strong"
CSRFProtect(app)
if kind == "sqlalchemy":
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{store}/sessions.db"
    app.config.update(SESSION_TYPE="sqlalchemy", SESSION_SQLALCHEMY=SQLAlchemy(app))
elif kind == "redis":
    app.config.update(SESSION_TYPE="redis", SESSION_REDIS=redis.Redis(unix_socket_path=os.environ["REDIS_SOCKET"]))
elif kind == "cachelib":
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=FileSystemCache(store))
if kind != "cookie":
    Session(app)

pending: list[str] = []  # the channels that the authorizer is being asked for
answer: list[str] = []  # those that it may open


class User(UserMixin):  # type: ignore[misc]
    id = "7"


@app.login_manager.user_loader  # type: ignore[attr-defined,untyped-decorator]
def load(id: str) -> User:
    return User()


@sse_bp.subject
def whose() -> Any:
    return current_user.get_id()


@sse_bp.authorize
def may_listen(channel: str) -> bool:
    """As a slow one, which also writes to the session."""
    session["asked"] = session.get("asked", 0) + 1
    pending.append(channel)
    while channel.startswith("slow") and channel not in answer:
        time.sleep(0.01)
    if channel.endswith("-401"):
        abort(401)
    return not channel.endswith("-403") and bool(current_user.is_authenticated and session.get("name") == "Ann")


@app.post("/login")
def login() -> ResponseReturnValue:
    session.permanent = True
    session["name"] = "Ann"
    login_user(User(), remember="remember" in request.args)
    return "", 204


@app.post("/logout")
def logout() -> ResponseReturnValue:
    logout_user()
    session["name"] = "Bob"
    disconnect(subject=User.id, after_response=True)
    time.sleep(float(request.args.get("works_for", "0")))
    return "", 204


@app.get("/pending")
def how_many() -> ResponseReturnValue:
    return str(len(pending))


@app.post("/answer/<channel>")
def let(channel: str) -> ResponseReturnValue:
    answer.append(channel)
    return "", 204


@app.get("/who")
def who() -> ResponseReturnValue:
    name = session.get("name", "nobody")
    return f"{name}, {'logged in' if current_user.is_authenticated else 'logged out'}, asked {session.get('asked', 0)}"


@app.after_request
def late(response: Any) -> Any:
    """As an extension that sets a cookie of its own, by whatever way."""
    if request.endpoint == "sse.stream":
        response.set_cookie("mine", "x")
        response.call_on_close(lambda: None)
        session["late"] = True
        after_this_request(lambda response: response)
    return response


__all__ = ["app"]
