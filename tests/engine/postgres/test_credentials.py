"""Credentials that change: a function is asked for the database's URL at each new connection."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event

from flask_pg_sse import ConfigurationError, DatabaseUnavailable, PgSSE, notify, schema_sql
from tests.support.client import eventually, open_stream
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.servers import ROOT, WebServer
from tools import postgres

SECURITY = Document("docs/security.md")
MakeApp = Callable[..., Flask]
Start = Callable[..., WebServer]


@pytest.fixture
def guarded(own_postgres: postgres.Server) -> postgres.Server:
    """A server that wants a password of the role `app`, and the event log for that role."""
    url = own_postgres.url()
    execute(url, "CREATE ROLE app LOGIN PASSWORD 'first'")
    execute(url, schema_sql(["app"]))
    rules = own_postgres.data_dir / "pg_hba.conf"
    rules.write_text("host all app 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    execute(url, "SELECT pg_reload_conf()")
    return own_postgres


def end_sessions(url: str) -> None:
    execute(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")


@pytest.mark.slow
@pytest.mark.parametrize("listen", [{}, {"LISTEN": "1"}], ids=["one function", "two"])
@pytest.mark.parametrize("worker", [[], ["-k", "gthread", "--threads", "8"]], ids=["gevent", "gthread"])
def test_streams_go_on_when_the_password_has_changed(
    guarded: postgres.Server, start_server: Start, tmp_path: Path, worker: list[str], listen: dict[str, str]
) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    url = guarded.url().replace("postgres@", "app@")
    env = {"PASSWORD_FILE": str(file), "FLASK_SSE_LOG_OWNER": "postgres", **listen}
    server = start_server(url, *worker, app="tests.support.apps.rotating:app", **env)
    with open_stream(server.port, "orders") as stream:
        server.post("/notify/orders", b'{"data": "before"}')
        assert stream.event().data == "before"
        execute(guarded.url(), "ALTER ROLE app PASSWORD 'second'")
        end_sessions(guarded.url())
        eventually(lambda: "password authentication failed" in server.log(), 20)
        file.unlink()  # the function fails
        eventually(lambda: "The function in SSE_" in server.log(), 20)
        file.write_text("exit")
        eventually(lambda: "failed: SystemExit in" in server.log(), 20)
        file.write_text("second")
        eventually(lambda: "works again" in server.log(), 20)
        server.post("/notify/orders", b'{"data": "after"}')
        while (message := stream.event()).event.startswith("sse-status"):
            pass
        assert message.data == "after"
    log = server.log()
    assert f"FileNotFoundError in {ROOT}/tests/support/apps/rotating.py, line " in log
    assert not [secret for secret in ("first", "second", "the secret is") if secret in log], log
    assert "Traceback" not in log, log


def test_the_function_is_asked_at_each_new_connection(database_url: str, make_app: MakeApp) -> None:
    asked: list[str] = []

    def find() -> str:
        asked.append("")
        return database_url

    with make_app(find).app_context():
        notify("orders", "x")
        notify("orders", "x")
        assert len(asked) == 1
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse notify'"
        execute(database_url, end)
        notify("orders", "x")
        assert len(asked) == 2
    sse = PgSSE(database_url=find)
    sse.notify("orders", "x")
    sse.close()
    assert len(asked) == 3


def test_what_the_function_does_wrong_is_said_without_secrets(make_app: MakeApp) -> None:
    def fails() -> str:
        raise KeyError("hunter2")

    with make_app(fails).app_context(), pytest.raises(DatabaseUnavailable) as raised:
        notify("orders", "x")
    assert f"The function in SSE_DATABASE_URL failed: KeyError in {__file__}, line " in str(raised.value)
    assert "hunter2" not in str(raised.value) and raised.value.__suppress_context__
    with make_app(lambda: "mysql://u:hunter2@h/d").app_context(), pytest.raises(ConfigurationError) as wrong:
        notify("orders", "x")
    assert "the result of SSE_DATABASE_URL() is not a PostgreSQL URL (mysql://…)" in str(wrong.value)
    assert "hunter2" not in str(wrong.value)


def test_the_function_of_the_docs(database_url: str, make_app: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    app = make_app(None)
    code = SECURITY.example("rotating").replace("/run/secrets/database", f"{tmp_path}/password")
    target = database_url.partition("@")[2]
    exec(code.replace("app:", "postgres:").replace("db.example.org/shop", target), {"app": app})
    assert app.config["SSE_DATABASE_URL"]() == f"postgresql://postgres:secret@{target}"
    with app.app_context():
        notify("orders", "x")


async def asynchronous() -> str:
    return ""


@pytest.mark.parametrize("wrong", [asynchronous, lambda name: name, Flask])
def test_another_function_is_refused_at_registration(make_app: MakeApp, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"SSE_LISTEN_URL is that value, and must be .* without arguments"):
        make_app("postgresql://h/d", SSE_LISTEN_URL=wrong)


# -- an app's engine that finds the password


def password(*args: Any) -> None:
    args[-1]["password"] = "of the moment"


@pytest.mark.parametrize("how", ["creator", "do_connect", "neither"])
def test_an_engine_that_finds_its_password_is_warned_about(
    database_url: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("app")
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url)
    if how == "creator":
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"creator": lambda: None}
    db = SQLAlchemy(app)
    sse = PgSSE(app)
    with app.app_context():
        if how == "do_connect":
            event.listen(db.engine, "do_connect", password)
        with caplog.at_level(logging.WARNING):
            sse.notify("orders", "x")
        sse.close()
        db.engine.dispose()
    expected = [] if how == "neither" else [f"by {how}, which flask_pg_sse does not call. Set SSE_DATABASE_URL to a"]
    assert [text for text in expected if text in caplog.text] == expected
    assert bool(caplog.messages) == bool(expected)


def test_the_engine_is_found_outside_a_request(database_url: str) -> None:
    """As when a worker of gunicorn boots. Flask-SQLAlchemy's attribute raises an error there, even to hasattr()."""
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("app")
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url)
    PgSSE(app)
    assert list(app.extensions["pg_sse"].runtime.engines()) == []
    SQLAlchemy(app)
    [engine] = app.extensions["pg_sse"].runtime.engines()
    assert engine.url.database in database_url
    engine.dispose()
