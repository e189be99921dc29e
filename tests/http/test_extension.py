"""PgSSE and the functions where they meet the rest of an app: several apps, none, hooks, other engines, misuse."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from flask import Flask, Response, render_template_string
from sqlalchemy.orm import Session

import flask_pg_sse
from flask_pg_sse import DatabaseNotConfigured, PgSSE, notify, notify_many, sse_bp, sse_url
from flask_pg_sse.testing import capture, stream

MakeApp = Callable[..., Flask]


def test_pgsse_with_one_app_uses_that_apps_database_everywhere(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/wrong")
    app = Flask("app")
    app.config.update(SSE_DATABASE_URL=database_url, SSE_CHANNELS=["*"])
    sse = PgSSE(app)
    events = stream(app.test_client(), "/sse/orders")
    assert next(events).event == "sse-open"
    sse.notify("orders", "from outside any context")
    assert next(events).data == "from outside any context"
    sse.close()
    assert next(events).json == {"reason": "shutdown"}
    events.close()


def test_pgsse_with_several_apps_wants_to_know_which(database_url: str) -> None:
    sse = PgSSE(database_url=database_url)
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        sse.init_app(app)
    with pytest.raises(RuntimeError, match="app_context"):
        sse.notify("orders", "x")
    for app in apps:
        with app.app_context():
            sse.notify("orders", "x")
            sse.close()


def test_sse_url_outside_a_request_says_what_is_missing() -> None:
    app = Flask("app")
    sse = PgSSE(app)
    for url in (sse.sse_url, sse_url):
        with app.app_context(), pytest.raises(RuntimeError, match=r"^sse_url\(\) .*SSE_SERVER_URL.*SERVER_NAME"):
            url("orders")
    with app.app_context(), pytest.raises(RuntimeError, match=r"^sse_server_url .*SSE_SERVER_URL.*SERVER_NAME"):
        render_template_string("{{ sse_server_url }}")
    with pytest.raises(RuntimeError, match=r"^sse_url\(\) .*SERVER_NAME.*app_context"):
        sse.sse_url("orders")
    app.config["SERVER_NAME"] = "example.org"
    with app.app_context():
        assert sse_url("orders", external=True) == "http://example.org/sse?channel=orders"
        assert sse_url("orders") == "/sse?channel=orders"
    elsewhere = Flask("elsewhere")
    elsewhere.config["SSE_SERVER_URL"] = "https://sse.example.org"
    with elsewhere.app_context():
        assert PgSSE(elsewhere).sse_url("orders") == "https://sse.example.org/?channel=orders"


@pytest.mark.parametrize("name", ["notify", "notify_many", "sse_url", "sse_cursor", "disconnect", "postgres_notify"])
def test_a_misspelt_argument_is_said_of_the_function_as_it_is_called(name: str) -> None:
    said = f"^{name.removeprefix('postgres_')}\\(\\) got an unexpected keyword argument 'chanel'$"
    with pytest.raises(TypeError, match=said):
        getattr(flask_pg_sse, name)(chanel="orders")
    if name != "postgres_notify":
        with pytest.raises(TypeError, match=said):
            getattr(PgSSE(), name)(chanel="orders")


def test_an_empty_url_prefix_is_the_root(database_url: str) -> None:
    for register in (
        lambda app: app.register_blueprint(sse_bp, url_prefix=""),
        lambda app: PgSSE(app, url_prefix=""),
        lambda app: app.register_blueprint(sse_bp, url_prefix="/"),
    ):
        app = Flask("app")
        app.config.update(SSE_DATABASE_URL=database_url, SSE_CHANNELS=["*"])
        register(app)
        with app.test_request_context():
            assert sse_url("orders") == "/?channel=orders"
        for url in ("/?channel=orders", "/orders"):
            assert app.test_client().head(url).status_code == 200


def test_an_app_that_puts_something_into_every_url(database_url: str) -> None:
    """By its prefix, by defaults, or by whatever it adds to what url_for() is asked for."""
    app = Flask("app")
    app.config.update(SSE_DATABASE_URL=database_url, SSE_CHANNELS=["*"])
    app.register_blueprint(sse_bp, url_prefix="/<tenant>/sse", url_defaults={"plan": "free"})
    app.url_defaults(lambda endpoint, values: values.update(language="de", tenant="acme"))
    with app.test_request_context():
        assert sse_url("orders") == "/acme/sse?language=de&channel=orders"
        assert render_template_string("{{ sse_server_url }}") == "/acme/sse"
        for url in (sse_url("orders"), "/acme/sse/orders"):
            assert app.test_client().head(url).status_code == 200


def test_a_hook_that_reads_the_whole_body_fails_and_does_not_hang(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, TESTING=False, PROPAGATE_EXCEPTIONS=False)
    asks = False
    read = []

    @app.after_request
    def look(response: Response) -> Response:
        if not (asks and response.is_streamed) and response.get_data():
            read.append(response.status_code)
        return response

    client = app.test_client()
    assert client.get("/sse/orders").status_code == 500
    assert client.get("/sse").status_code == 400
    asks = True
    with client.get("/sse/orders") as response:
        assert response.status_code == 200
    assert client.get("/sse").status_code == 400
    assert read == [500, 400, 400]


def test_a_wrong_value_at_first_use_is_said_once(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(None, TESTING=False, PROPAGATE_EXCEPTIONS=False)
    app.config["SSE_RETRY"] = "soon"
    response = app.test_client().get("/sse/orders")
    assert (response.status_code, response.mimetype) == (500, "text/plain")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "SSE_RETRY is 'soon'" in caplog.text and "SSE_RETRY is 'soon'" in response.text


@pytest.fixture
def sqlite_connections() -> Iterator[list[object]]:
    engine = sqlalchemy.create_engine("sqlite://")
    session, connection, raw = Session(engine), engine.connect(), sqlite3.connect(":memory:")
    yield [session, connection, raw]
    session.close()
    connection.close()
    raw.close()
    engine.dispose()


def test_a_connection_of_another_engine_is_refused_with_the_remedy(
    make_app: MakeApp, sqlite_connections: list[object]
) -> None:
    with make_app().app_context():
        for connection in sqlite_connections:
            with pytest.raises(TypeError, match=r"sqlite.*capture"):
                notify("orders", "x", connection=connection)


def test_capture_takes_any_engine_and_refuses_what_is_no_connection(
    make_app: MakeApp, sqlite_connections: list[Any]
) -> None:
    app = make_app()
    with app.app_context(), capture(app) as events:
        for connection in sqlite_connections:
            notify("orders", "x", connection=connection)
            connection.commit()
        with pytest.raises(TypeError):
            notify("orders", "x", connection=5)
    assert len(events) == 3


def test_misuse_is_said_in_words(make_app: MakeApp) -> None:
    with make_app().app_context():
        with pytest.raises(TypeError, match="sse_payload is a dict"):
            notify("orders", sse_payload="x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="call notify"):
            notify_many("orders", {"id": 7})
        with pytest.raises(DatabaseNotConfigured, match="SSE_DATABASE_URL"):
            notify("orders", "x")
    with pytest.raises(TypeError, match="database_url="):
        PgSSE("postgresql://localhost/x")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="register_blueprint"), Flask("bare").app_context():
        notify("orders", "x")


def test_several_channels_are_an_error_with_the_remedy(make_app: MakeApp) -> None:
    app = make_app()
    channels: list[Any] = [["user-1", "user-2"], ("user-1",), {"user-1"}, {"user-1": "x"}]
    for channel in channels:
        with app.app_context(), capture(app) as events:
            with pytest.raises(TypeError, match="one transaction: for channel in channels"):
                notify(channel, "x")
            with pytest.raises(TypeError, match="one transaction: for channel in channels"):
                notify_many(channel, ["x"])
            assert events == []
