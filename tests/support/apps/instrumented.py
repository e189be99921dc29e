"""An app under a monitoring agent, which is started as its documentation says: `AGENT` and `STARTED` choose.

An agent that its own command starts (`ddtrace-run gunicorn …`) is started already: then neither is set. It sends with
each kind of connection that `notify()` takes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from importlib import import_module as load
from typing import Any

AGENT, STARTED = os.environ.get("AGENT", ""), os.environ.get("STARTED", "")


def newrelic() -> None:
    load("newrelic.agent").initialize()


def ddtrace() -> None:
    load("ddtrace").patch(psycopg=True, sqlalchemy=True, flask=True)


def ddtrace_auto() -> None:
    load("ddtrace.auto")


def elasticapm() -> None:
    load("elasticapm").Client()
    load("elasticapm").instrument()


def elasticapm_flask() -> None:
    load("elasticapm.contrib.flask").ElasticAPM(app)


def sentry() -> None:
    flask = load("sentry_sdk.integrations.flask").FlaskIntegration()
    load("sentry_sdk").init(integrations=[flask], traces_sample_rate=1.0, send_default_pii=True)


def opentelemetry() -> None:
    load("opentelemetry.trace").set_tracer_provider(load("opentelemetry.sdk.trace").TracerProvider())
    for module, name in (("psycopg2", "Psycopg2"), ("psycopg", "Psycopg"), ("sqlalchemy", "SQLAlchemy")):
        instrumentor = getattr(load(f"opentelemetry.instrumentation.{module}"), f"{name}Instrumentor")
        instrumentor().instrument(enable_commenter=True)


def appsignal() -> None:
    load("appsignal").Appsignal(active=True, name="tests", environment="test", push_api_key="none").start()


def start(moment: str) -> None:
    if moment == STARTED:
        globals()[AGENT]()


start("before")

from flask import Flask, jsonify  # noqa: E402
from flask.typing import ResponseReturnValue  # noqa: E402

from flask_pg_sse import disconnect, notify, sse_bp, sse_cursor  # noqa: E402

app = Flask(__name__)
app.config.update(SSE_CHANNELS=["*"], SECRET_KEY="secret")
app.register_blueprint(sse_bp)
start("after")

import psycopg  # noqa: E402
import psycopg2  # noqa: E402
import sqlalchemy  # noqa: E402
from sqlalchemy.orm import scoped_session, sessionmaker  # noqa: E402

URL = os.environ["DATABASE_URL"]


def ways() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the ways to a connection, by name."""
    yield "psycopg2", lambda: psycopg2.connect(URL)
    yield "psycopg", lambda: psycopg.connect(URL)
    yield "psycopg.Connection", lambda: psycopg.Connection.connect(URL)
    for driver in ("psycopg2", "psycopg"):
        engine = sqlalchemy.create_engine(URL.replace("postgresql:", f"postgresql+{driver}:"))
        yield f"engine {driver}", engine.connect
        yield f"session {driver}", sessionmaker(engine)
        yield f"scoped_session {driver}", functools.partial(scoped_session, sessionmaker(engine))
        yield f"raw_connection {driver}", engine.raw_connection


WAYS = dict(ways())


@app.get("/ping")
def ping() -> ResponseReturnValue:
    return "pong"


@app.get("/wrapped")
def wrapped() -> ResponseReturnValue:
    """Return whether an agent hands out connections, or cursors, of its own."""
    with contextlib.closing(psycopg2.connect(URL)) as connection, connection.cursor() as cursor:
        connections = type(connection) is not psycopg2.extensions.connection
        return jsonify(connections or type(cursor) is not psycopg2.extensions.cursor)


@app.post("/notify")
def send() -> ResponseReturnValue:
    """Send an event in each way, and return the names of the ways, which are the events' data."""
    before = sse_cursor()
    assert (notify("orders", "own", event="it's") or 0) > (before or 0) or before is None
    for name, way in WAYS.items():
        with contextlib.closing(way()) as connection:
            notify("orders", name, event="it's", connection=connection)
            notify("orders", f"{name} in passing", durable=False, connection=connection)
            connection.commit()
    return jsonify(["own", *WAYS])


@app.post("/disconnect")
def end() -> ResponseReturnValue:
    disconnect(channel="orders")
    return "", 204
