"""docs/table-changes.md is right: its examples run, and its links lead somewhere."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

from flask_pg_sse import schema_sql
from tests.support.documents import Document
from tests.support.postgres import execute

PAGE = Document("docs/table-changes.md")


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_table_changes_docs.py")
    PAGE.assert_links_lead_somewhere()


@pytest.fixture
def program(database_url: str) -> Iterator[str]:
    """The URL of a role that owns nothing, and has no right on the log."""
    name = f"shop_{uuid.uuid4().hex[:8]}"
    execute(database_url, f"CREATE ROLE {name} LOGIN")
    yield database_url.replace("postgres@", f"{name}@")
    execute(database_url, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def channels_and_events(url: str) -> list[Any]:
    return execute(url, "SELECT channel, fields ->> 'event' FROM flask_pg_sse.event ORDER BY id")


def test_the_trigger_does_not_stop_a_program_without_rights_on_the_log(database_url: str, program: str) -> None:
    execute(database_url, schema_sql() + "CREATE TABLE orders (id serial PRIMARY KEY, dish text)")
    execute(database_url, f"GRANT ALL ON orders, orders_id_seq TO {program.split('//')[1].split('@')[0]}")
    execute(database_url, example("trigger"))
    execute(program, "INSERT INTO orders (dish) VALUES ('tea')")
    assert channels_and_events(database_url) == [("orders", "created")]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_the_migration(database_url: str, driver: str) -> None:
    execute(database_url, schema_sql() + "CREATE TABLE orders (id integer PRIMARY KEY, status text)")
    names: dict[str, Any] = {}
    exec(example("migration"), names)
    engine = sqlalchemy.create_engine(database_url.replace("postgresql://", f"postgresql+{driver}://"))
    change = "INSERT INTO orders VALUES (1, 'new'); UPDATE orders SET status = 'new'; DELETE FROM orders"
    for step in ("upgrade", "downgrade"):
        with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
            names[step]()
        execute(database_url, change)
    engine.dispose()
    assert channels_and_events(database_url) == [("orders", "insert"), ("orders", "delete")]
    assert execute(database_url, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'flask_pg_sse_watch%'") == [(0,)]
