"""The README is right: its examples run, and its table is the one in settings.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from flask import Flask, render_template_string
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

import flask_pg_sse
from flask_pg_sse import notify, notify_many, settings, sse_cursor, sse_url
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import stream
from tests.support.client import open_stream, request
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.proxies import Proxies
from tests.support.servers import WebServer, gunicorn

ROOT = Path(__file__).resolve().parents[2]
README = Document("README.md")


def example(name: str) -> str:
    return README.example(name)


def test_examples_and_links() -> None:
    README.assert_every_example_is_run(
        "docs/test_readme.py", "browser/test_readme_browser.py", "support/proxies.py",
        "engine/postgres/test_cli.py", "engine/postgres/test_schema.py",
    )  # fmt: skip
    README.assert_links_lead_somewhere()


def expected_table() -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, expects, default, help in settings.table():
        shown = "none" if default in (None, ()) else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
        rows.append(f"| `{key}` | {expects} | {shown} | {help} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_that_of_the_code() -> None:
    shown = README.text.split("<!-- table: settings -->\n")[1].split("\n\n")[0]
    assert shown == expected_table(), f"put this there:\n{expected_table()}"


def test_the_ten_line_app(database_url: str, start_server: Callable[..., WebServer], tmp_path: Path) -> None:
    code = example("app.py").replace("postgresql://postgres@localhost/postgres", database_url)
    assert len(code.strip().splitlines()) <= 13
    (tmp_path / "readme_app.py").write_text(code + '\n@app.get("/ping")\ndef ping(): return "pong"\n')
    server = start_server("", command=lambda port: gunicorn("readme_app:app", port, "--pythonpath", str(tmp_path)))
    with open_stream(server.port, "orders") as stream, open_stream(server.port, path="/sse/orders") as other:
        with request(server.port, "/orders", method="POST") as response:
            assert response.status == 201
        for found in (stream.event(), other.event()):
            assert (found.event, found.json) == ("created", {"id": 7})
    with request(server.port, "/sse?channel=secret") as response:
        assert response.status == 403


@pytest.fixture
def app(database_url: str, make_app: Callable[..., Flask]) -> Iterator[Flask]:
    app = make_app(database_url)

    @app.post("/orders")
    def create() -> tuple[str, int]:
        notify("orders", {"id": 7}, event="created")
        return "", 201

    with app.app_context():
        yield app


def received(app: Flask, count: int, act: Callable[[], None]) -> list[tuple[str, str]]:
    events = stream(app.test_client(), "/sse?channel=orders", timeout=30)
    assert next(events).event == "sse-open"
    act()
    found = [next(events) for _ in range(count)]
    events.close()
    return [(event.event, event.data) for event in found]


def test_publishing(app: Flask) -> None:
    order = SimpleNamespace(dish="Two <b>soups</b>")
    names = {
        "notify": notify, "notify_many": notify_many, "order": order,
        "render_template": lambda name, order: render_template_string("<li>{{ order.dish }}</li>", order=order),
    }  # fmt: skip
    assert received(app, 4, lambda: exec(example("publish"), names)) == [
        ("message", '{"id": 7, "total": "12.50"}'),
        ("created", "<li>Two &lt;b&gt;soups&lt;/b&gt;</li>"),
        ("message", '{"id": 7}'),
        ("message", '{"id": 8}'),
    ]


def test_publishing_in_a_transaction(app: Flask, database_url: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "order"
        id: Mapped[int] = mapped_column(primary_key=True)
        dish: Mapped[str]

    engine = sqlalchemy.create_engine(database_url.replace("postgresql://", "postgresql+psycopg2://"))
    Base.metadata.create_all(engine)
    db = SimpleNamespace(session=scoped_session(sessionmaker(engine)))
    names: dict[str, Any] = {"notify": notify, "db": db, "Order": Order}
    assert received(app, 1, lambda: exec(example("transaction"), names)) == [("created", '{"id": 1}')]
    db.session.remove()
    engine.dispose()


def test_an_order_placed_while_the_page_is_on_its_way(app: Flask, database_url: str) -> None:
    execute(database_url, schema_sql())
    placed = []

    def read_orders(query: str) -> SimpleNamespace:
        placed.append(notify("orders", "placed after the page has read its data"))
        return SimpleNamespace(all=list)

    names: dict[str, Any] = {
        "app": app, "sse_cursor": sse_cursor, "sse_url": sse_url, "select": str, "Order": "orders",
        "db": SimpleNamespace(session=SimpleNamespace(scalars=read_orders)),
        "render_template": lambda name, orders, live: live,
    }  # fmt: skip
    exec(example("cursor"), names)
    client = app.test_client()
    events = stream(client, client.get("/orders").text, timeout=30)
    assert next(events).event == "sse-open"
    assert next(events).id == str(placed[0])
    events.close()


USERS = """
from flask import Flask, abort
from flask_login import LoginManager, UserMixin, login_user

app = Flask(__name__)
app.config["SECRET_KEY"] = "x"
blocked = set()

class Users(UserMixin):
    def __init__(self, id):
        self.id = id

    block = blocked.add

@(LoginManager(app)).user_loader
def load(id):
    return None if id in blocked else Users(id)

@app.get("/ping")
def ping():
    return "pong"

@app.post("/login/<id>")
def login(id):
    login_user(Users(id))
    return ""
"""


def test_the_authorizer(database_url: str, start_server: Callable[..., WebServer], tmp_path: Path) -> None:
    """A logged-in user hears only their own channel, and nothing more after they are blocked."""
    code = USERS + example("authorize") + "\napp.register_blueprint(sse_bp)\n"
    (tmp_path / "guarded.py").write_text(code)
    server = start_server(
        database_url, command=lambda port: gunicorn("guarded:app", port, "--pythonpath", str(tmp_path))
    )
    cookies = {}
    for user in ("7", "8"):
        with request(server.port, f"/login/{user}", method="POST") as response:
            cookies[user] = {"Cookie": response.headers["set-cookie"].split(";")[0]}
    with request(server.port, "/sse/user-7") as response:
        assert response.status == 403
    with request(server.port, "/sse/user-7", headers=cookies["8"]) as response:
        assert response.status == 403
    with (
        open_stream(server.port, "user-7", headers=cookies["7"]) as seven,
        open_stream(server.port, "user-8", headers=cookies["8"]) as eight,
    ):
        server.post("/users/7/block")
        assert seven.event().json == {"reason": "revoked"}
        seven.wait_closed()
        execute(database_url, """NOTIFY "user-8", 'hello'""")
        assert eight.event().data == "hello"
    with request(server.port, "/sse/user-7", headers=cookies["7"]) as response:
        assert response.status == 403


def test_publishing_from_sql(app: Flask, database_url: str) -> None:
    statements = [statement for statement in example("sql").split(";") if statement.strip()]

    def run() -> None:
        for statement in statements:
            execute(database_url, statement)

    assert received(app, 2, run) == [("message", "hello"), ("created", "7")]


def test_the_example_for_tests(app: Flask) -> None:
    names: dict[str, Any] = {}
    exec(example("testing"), names)
    names["test_an_order_is_announced"](app, app.test_client())
    names["test_an_order_reaches_the_browser"](app, app.test_client())


def test_every_export_and_setting_is_in_the_readme() -> None:
    for name in flask_pg_sse.__all__:
        assert name in README.text, name


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {flask_pg_sse.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_nginx_example_streams_without_delay(
    database_url: str, start_server: Callable[..., WebServer], proxies: Proxies
) -> None:
    app = "tests.support.apps.behind_proxy:app"
    app_server = start_server(database_url, app=app, FLASK_SSE_MAX_STREAMS_PER_CLIENT="1")
    proxy = proxies.start("nginx", app_server)
    with open_stream(proxy.port, "orders", tls=proxy.tls) as stream:
        for name in ("X-Forwarded-For", "X-Spare"):  # a client cannot choose its address
            with request(proxy.port, "/sse?channel=orders", tls=proxy.tls, headers={name: "9.9.9.9"}) as refused:
                assert refused.next().json == {"reason": "capacity"}
        for number in range(20):
            execute(database_url, "SELECT pg_notify('orders', %s)", (str(number),))
            assert stream.event().data == str(number)
        app_server.terminate()
        assert stream.event().event == "sse-end"
        with pytest.raises(EOFError):  # the connection itself is nginx's, to keep or to close
            stream.next()
