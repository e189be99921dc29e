"""The basic app with an authorizer that asks the database, through a pool of one connection."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text

from flask_pg_sse import notify, sse_bp

app = Flask(__name__)
app.config.update(
    SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"],
    SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 2},
)
db = SQLAlchemy(app)


def may_listen(channel: str) -> bool:
    query = text("SELECT channel FROM membership WHERE channel = :channel")
    return db.session.execute(query, {"channel": channel}).first() is not None


app.register_blueprint(sse_bp, authorize=may_listen)


@app.get("/ping")
def ping() -> str:
    return "pong"


@app.get("/checked-out")
def checked_out() -> str:
    pool: Any = db.engine.pool
    return str(pool.checkedout())


@app.post("/notify/<channel>")
def send(channel: str) -> tuple[str, int]:
    notify(channel, "x")
    return "", 204
