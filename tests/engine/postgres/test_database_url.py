"""Which database is used: the order of the sources, and every notation as far as the server."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
from flask import Flask
from psycopg2.extensions import parse_dsn
from sqlalchemy.engine import URL, make_url

from flask_pg_sse import DatabaseNotConfigured, PgSSE, notify
from flask_pg_sse.testing import stream
from tests.support.postgres import execute
from tests.unit.test_dsn import AWKWARD_PASSWORD

# -- sources


def source_of(app: Flask, caplog: pytest.LogCaptureFixture) -> str:
    """Notify, and return what the one log line says of the database."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "flask_pg_sse"), app.app_context():
        notify("orders", "x")
    (line,) = [record.getMessage() for record in caplog.records if "PostgreSQL" in record.getMessage()]
    return line


NOWHERE = "postgresql://u:hunter2@127.0.0.1:1/nowhere"


def test_sse_database_url_comes_first(
    database_url: str, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    app = make_app(database_url, SQLALCHEMY_DATABASE_URI=NOWHERE)
    line = source_of(app, caplog)
    expected = parse_dsn(database_url)
    assert all(part in line for part in ("SSE_DATABASE_URL", expected["host"], expected["port"], expected["dbname"]))


def test_then_comes_sqlalchemys_with_its_connect_args(
    database_url: str, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    url = make_url(database_url).set(drivername="postgresql+psycopg2", password="hunter2", database="nowhere")
    app = make_app(
        SQLALCHEMY_DATABASE_URI=url,
        SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"dbname": parse_dsn(database_url)["dbname"], "connect_timeout": 5}},
    )
    line = source_of(app, caplog)
    assert "SQLALCHEMY_DATABASE_URI" in line
    assert parse_dsn(database_url)["dbname"] in line
    assert "hunter2" not in line


@pytest.mark.parametrize("uri", [None, "", "sqlite:///:memory:", "mysql://u:p@h/d"])
def test_then_comes_the_environment(
    database_url: str,
    make_app: Callable[..., Flask],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    uri: str | None,
) -> None:
    app = make_app(SQLALCHEMY_DATABASE_URI=uri)
    monkeypatch.setenv("DATABASE_URL", database_url)
    assert "DATABASE_URL of the environment" in source_of(app, caplog)


def test_a_wrong_sse_database_url_is_not_passed_over(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    app = make_app("sqlite:///app.db")  # no error yet
    with app.app_context(), pytest.raises(DatabaseNotConfigured, match="SSE_DATABASE_URL"):
        notify("orders", "x")


@pytest.mark.parametrize("uri", [None, "sqlite:///:memory:", URL.create("sqlite")])
def test_without_postgresql_an_app_starts_and_the_first_use_says_what_is_missing(
    make_app: Callable[..., Flask], uri: Any
) -> None:
    app = make_app(SQLALCHEMY_DATABASE_URI=uri)
    words = "SQLALCHEMY_DATABASE_URI is not a PostgreSQL URL" if uri else "No PostgreSQL database is configured"
    with app.app_context(), pytest.raises(DatabaseNotConfigured, match=words) as caught:
        notify("orders", "x")
    assert re.search("[Ss]et SSE_DATABASE_URL .*to postgresql://", str(caught.value))
    answer = app.test_client().get("/sse?channel=orders")
    assert answer.status_code == 500 and words in answer.text


def test_no_error_of_connecting_shows_the_password(make_app: Callable[..., Flask]) -> None:
    app = make_app(NOWHERE)
    with app.app_context(), pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1, database nowhere") as caught:
        notify("orders", "x")
    texts = []
    error: BaseException | None = caught.value
    while error is not None:
        texts.append(repr(error))
        error = error.__cause__ or error.__context__
    assert "hunter2" not in " ".join(texts)


def test_the_extension_object_takes_the_environment_or_its_own_url(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    sse = PgSSE(database_url=database_url)
    try:
        sse.notify("orders", {"id": 7})
    finally:
        sse.close()
    monkeypatch.setenv("DATABASE_URL", database_url)
    sse = PgSSE()
    try:
        sse.notify("orders", {"id": 7})
    finally:
        sse.close()


# -- against the server


@pytest.fixture
def role(database_url: str) -> Any:
    name = f"me@corp {parse_dsn(database_url)['dbname']}"
    with_password = f'CREATE ROLE "{name}" LOGIN PASSWORD %s'
    execute(database_url, with_password, (AWKWARD_PASSWORD,))
    yield name
    execute(database_url, f'DROP ROLE "{name}"')


def test_every_notation_reaches_the_server(database_url: str, role: str, make_app: Callable[..., Flask]) -> None:
    """As a role and with a password that need quoting, from notify() to the stream."""
    where = parse_dsn(database_url)
    host, port, name = where["host"], where["port"], where["dbname"]
    user, password = quote(role, safe=""), quote(AWKWARD_PASSWORD, safe="")
    refused = 1  # nothing listens there
    notations: list[object] = [
        f"postgres://{user}:{password}@{host}:{port}/{name}",
        f"postgresql+asyncpg://{user}:{password}@{host}:{port}/{name}?ssl=prefer",
        f"postgresql://{user}:{password}@{host}:{refused},{host}:{port}/{name}",
        f"postgresql+psycopg2://{user}:{password}@/{name}?host={host}:{refused}&host={host}:{port}",
        URL.create("postgresql+psycopg", role, AWKWARD_PASSWORD, host, int(port), name),
        psycopg2.extensions.make_dsn(host=host, port=port, dbname=name, user=role, password=AWKWARD_PASSWORD),
    ]
    for notation in notations:
        app = make_app(notation)
        events = stream(app.test_client(), "/sse?channel=orders")
        assert next(events).event == "sse-open"
        with app.app_context():
            notify("orders", "hello")
        assert next(events).data == "hello"
        events.close()
        users = execute(
            database_url, "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name ~ 'flask_pg_sse'"
        )
        assert users == [(role,)]
        app.extensions["pg_sse"].close()


def test_the_listener_may_have_a_url_of_its_own(
    database_url: str, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    other = re.sub(r"/[^/]*$", "/postgres", database_url)
    app = make_app(other, SSE_LISTEN_URL=database_url)
    with caplog.at_level(logging.INFO, "flask_pg_sse"):
        events = stream(app.test_client(), "/sse?channel=orders")
        next(events)
    assert "SSE_LISTEN_URL" in caplog.text
    execute(database_url, "NOTIFY orders, 'hello'")
    assert next(events).data == "hello"
    events.close()
