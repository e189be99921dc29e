"""The pages in docs/ are right: their examples run, their links lead somewhere, and their lists match the code."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from flask import Flask
from playwright.sync_api import Page, expect

from flask_pg_sse import EventLogMissing, notify
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.client import open_stream, request
from tests.support.documents import Document
from tests.support.log import NOTIFY, PUBLISH, listening, logged, run
from tests.support.postgres import Running, connect, execute, login_role
from tests.support.servers import WebServer, gunicorn
from tools import postgres

ROOT = Path(__file__).resolve().parents[2]
PAGE = Document("docs/never-lose-an-event.md")

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_docs.py")
    PAGE.assert_links_lead_somewhere()


def test_the_reasons_are_those_of_the_code() -> None:
    table = PAGE.text.split("| reason |")[1].split("\n\n")[0]
    code = "".join(
        (ROOT / "flask_pg_sse" / name).read_text()
        for name in ("hub/stream.py", "engine/postgres/receiver.py", "engine/postgres/sql/schema_1.sql")
    )
    known = re.findall(r"""(?:gap\(|if position else |reason = |THEN '|ELSE ')['"]?([a-z]+-?[a-z]+)['"]""", code)
    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.M)) == {*known}


# -- from the page to the stream


@pytest.fixture
def shop(database_url: str, start_server: Start, tmp_path: Path) -> WebServer:
    """The page's app, under gunicorn."""
    execute(database_url, schema_sql())
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    code = example("app.py").replace("postgresql+psycopg://postgres@localhost/shop", url)
    assert url in code
    more = '\nwith app.app_context():\n    db.create_all()\n\n@app.get("/ping")\ndef ping(): return "pong"\n'
    (tmp_path / "docs_app.py").write_text(code + more)
    return start_server("", command=lambda port: gunicorn("docs_app:app", port, "--pythonpath", str(tmp_path)))


def order(server: WebServer, dish: str) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with request(server.port, "/orders", method="POST", headers=headers, body=f"dish={dish}".encode()) as response:
        assert response.status == 201


def test_an_order_placed_between_the_page_and_its_stream(shop: WebServer) -> None:
    order(shop, "soup")
    page = shop.get("/")
    assert "soup" in page
    found = re.search(r'new EventSource\("([^"]+)"\)', page)
    assert found
    order(shop, "tea")
    with request(shop.port, found[1].replace("\\u0026", "&")) as events:
        assert events.next().event == "sse-open"
        event = events.event()
        assert (event.event, event.json) == ("created", {"id": 2, "dish": "tea"})
    order(shop, "pie")
    with open_stream(shop.port, "orders", headers={"Last-Event-ID": event.id}) as events:
        assert events.event().json == {"id": 3, "dish": "pie"}


@pytest.mark.slow
def test_the_page_in_a_browser(page: Page, shop: WebServer, database_url: str) -> None:
    order(shop, "soup")
    with page.expect_response("**/sse?channel=orders**"):
        page.goto(f"http://127.0.0.1:{shop.port}/")
    # As if it had been placed between sse_cursor() and the query: it comes by both ways.
    execute(database_url, "SELECT flask_pg_sse.notify('orders', '{\"id\": 1, \"dish\": \"soup\"}', event => 'created')")
    order(shop, "tea")
    expect(page.locator("#orders > li")).to_have_text(["soup", "tea"])
    # An order without an event, and a position that is too old for the log: the page loads itself again.
    execute(database_url, "INSERT INTO orders (dish) VALUES ('pie')")
    page.evaluate("stream.dispatchEvent(new MessageEvent('sse-reset', {data: '{\"reason\": \"too-old\"}'}))")
    expect(page.locator("#orders > li")).to_have_text(["soup", "tea", "pie"])


# -- from SQL


@pytest.fixture
def shop_role(database_url: str) -> Iterator[str]:
    with login_role(database_url, "shop") as name:
        yield name


def test_publishing_from_sql(log_url: str) -> None:
    with listening(log_url, "orders") as ear:
        execute(log_url, example("sql"))
        [one] = ear.wait(1)
    assert (one.fields["event"], one.data) == ("created", '{"id": 7}')


def test_erasing(log_url: str) -> None:
    for channel, data in (("orders", "tea"), ("lunch", "soup"), ("lunch", "pie")):
        execute(log_url, NOTIFY, (channel, data))
    first, second = [part for part in example("erase").split(";") if part.strip()]
    assert execute(log_url, first) == [(1,)]
    assert execute(log_url, second) == [(1,)]
    assert [row[3] for row in logged(log_url) if row[1] == "lunch"] == ["pie"]


def test_a_role_that_only_publishes(database_url: str, shop_role: str) -> None:
    execute(database_url, schema_sql())
    url = database_url.replace("postgres@", f"{shop_role}:hush-hush@")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        execute(url, NOTIFY, ("orders", "x"))
    execute(database_url, re.sub(r"\bshop\b", shop_role, example("grant")))
    execute(url, NOTIFY, ("orders", "x"))
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        execute(url, "SELECT * FROM flask_pg_sse.event")
    assert [row[3] for row in logged(database_url)] == ["x"]


def test_the_migration(database_url: str, shop_role: str) -> None:
    names: dict[str, Any] = {}
    exec(example("migration").replace('"app"', f'"{shop_role}"'), names)
    engine = sqlalchemy.create_engine(database_url.replace("postgresql://", "postgresql+psycopg2://"))
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        names["upgrade"]()
    execute(database_url.replace("postgres@", f"{shop_role}:hush-hush@"), NOTIFY, ("orders", "x"))
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        names["downgrade"]()
    engine.dispose()
    assert execute(database_url, "SELECT to_regnamespace('flask_pg_sse')") == [(None,)]


# -- operations


def test_what_to_monitor(log_url: str) -> None:
    execute(log_url, NOTIFY, ("orders", "x"))
    sizes, stuck, lock, queue, own, dead = [part for part in example("monitor").split(";") if part.strip()]
    [(event, pending, oldest)] = execute(log_url, sizes)
    assert event.endswith("kB") and pending and oldest.total_seconds() >= 0
    assert execute(log_url, stuck) == [(0,)]
    assert execute(log_url, lock) == []
    publisher = connect(log_url)
    waiting = connect(log_url)
    run(publisher, "BEGIN")
    run(publisher, PUBLISH, ("orders", ["{}"], ["x"]))
    thread = threading.Thread(target=run, args=(waiting, NOTIFY, ("orders", "y")))
    thread.start()
    while len(found := execute(log_url, lock)) < 2:
        pass
    assert [(row[0], row[1]) for row in found] == [
        (publisher.info.backend_pid, True),
        (waiting.info.backend_pid, False),
    ]
    run(publisher, "COMMIT")
    thread.join()
    for connection in (publisher, waiting):
        connection.close()
    assert execute(log_url, queue)[0][0] < 1
    assert execute(log_url, own) == []
    assert {row[0] for row in execute(log_url, dead)} >= {"event", "pending"}
    execute(log_url, "SET session_replication_role = replica; SELECT flask_pg_sse.notify('orders', 'stuck')")
    assert execute(log_url, stuck) == [(1,)]


def test_a_publication_of_all_tables(log_url: str) -> None:
    """Publishing, pruning and an upgrade's update of the version go on under it; the example's leaves the log out."""
    execute(log_url, NOTIFY, ("orders", "x"))
    connection = connect(log_url)  # a publication would otherwise warn that wal_level is too low
    run(connection, "CREATE PUBLICATION everything FOR ALL TABLES")
    published = "SELECT DISTINCT pubname, schemaname FROM pg_publication_tables ORDER BY 1, 2"
    assert run(connection, published) == [("everything", "flask_pg_sse")]
    run(connection, NOTIFY, ("orders", "y"))
    assert run(connection, "SELECT flask_pg_sse.prune_v1('0 s', 10)") == [(2,)]
    run(connection, "UPDATE flask_pg_sse.installation SET version = version")
    run(connection, schema_sql())
    identities = """
        SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'flask_pg_sse'::regnamespace
        AND c.relkind = 'r' AND c.relpersistence = 'p' AND c.relreplident <> 'f'
        AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
    """
    assert run(connection, identities) == []
    run(connection, "DROP PUBLICATION everything; CREATE TABLE orders (id serial PRIMARY KEY)")
    run(connection, example("publication"))
    assert run(connection, published) == [("shop", "public")]
    connection.close()


def test_a_transaction_that_has_notified_cannot_be_prepared(
    running_postgres: Running, log_binaries: Path | None
) -> None:
    said = " ".join(PAGE.text.split())
    with running_postgres(bin_dir=log_binaries, max_prepared_transactions="2") as server:
        execute(server.url(), schema_sql())
        connection = connect(server.url())
        for query in ("SELECT flask_pg_sse.notify('orders', 'x')", "NOTIFY orders, 'x'"):
            run(connection, f"BEGIN; {query}")
            with pytest.raises(psycopg2.Error) as caught:
                run(connection, "PREPARE TRANSACTION 'one'")
            assert str(caught.value.diag.message_primary) in said
            run(connection, "ROLLBACK")
        connection.close()
        assert logged(server.url()) == []


def test_after_a_restore_everybody_is_told(own_postgres: postgres.Server, make_app: MakeApp) -> None:
    """A dump is taken, events follow, browsers see them, and the dump takes the place of the database."""
    url = own_postgres.url("shop")
    execute(own_postgres.url(), "CREATE DATABASE shop")
    execute(url, schema_sql())
    app = make_app(url)
    with app.app_context():
        notify("orders", "kept")
        app.extensions["pg_sse"].close()  # a database that is copied may have no sessions
        execute(own_postgres.url(), "CREATE DATABASE backup TEMPLATE shop")
        seen = notify("orders", "lost")
    app.extensions["pg_sse"].close()
    execute(own_postgres.url(), "DROP DATABASE shop WITH (FORCE)")
    execute(own_postgres.url(), "ALTER DATABASE backup RENAME TO shop")

    def back() -> list[Received]:
        events = stream(app.test_client(), f"/sse?channel=orders&last_event_id={seen}", timeout=30)
        first = [next(events), next(events)]
        events.close()
        return first

    for _ in range(2):  # before the first new event, and after it
        [_, reset] = back()
        assert (reset.event, reset.json) == ("sse-reset", {"reason": "undone"})
        assert int(reset.id) == logged(url)[-1][0]
        with app.app_context():
            newer = notify("orders", "new")
        assert seen is not None and newer is not None and newer > seen


def test_half_a_log_is_made_whole(database_url: str, make_app: MakeApp) -> None:
    """As a dump without rows leaves it; test_schema.py makes and restores such dumps."""
    execute(database_url, schema_sql())
    execute(database_url, "TRUNCATE flask_pg_sse.installation, flask_pg_sse.retention, flask_pg_sse.event")
    app = make_app(database_url, SSE_EVENT_LOG=True)
    with app.app_context():
        with pytest.raises(EventLogMissing, match="flask sse init"):
            notify("orders", "x")
        assert app.test_cli_runner().invoke(args=["sse", "init"]).exit_code == 0
        notify("orders", "x")
    assert [row[3] for row in logged(database_url)] == ["x"]
