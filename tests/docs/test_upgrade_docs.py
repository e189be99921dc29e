"""docs/upgrade.md is right: its migrations run, both ways, and autogenerate leaves the event log alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

from flask_pg_sse import include_name, schema_sql, trigger_sql
from tests.support.documents import Document
from tests.support.postgres import execute

PAGE = Document("docs/upgrade.md")


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_upgrade_docs.py")
    PAGE.assert_links_lead_somewhere()


def engine_for(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg2://"))


def migrate(url: str, code: str, step: str) -> None:
    names: dict[str, Any] = {}
    exec(code, names)
    engine = engine_for(url)
    try:
        with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
            names[step]()
    finally:
        engine.dispose()


def test_the_migrations(database_url: str) -> None:
    """The role `app` exists on no developer's machine; and a migration that upgrades undoes nothing."""
    there = "SELECT to_regclass('flask_pg_sse.event')::text"
    for step in ("upgrade", "downgrade"):
        migrate(database_url, example("upgrade"), step)
        assert execute(database_url, there) == [("flask_pg_sse.event",)]
    execute(database_url, "CREATE TABLE orders (id integer PRIMARY KEY); " + trigger_sql("orders"))
    migrate(database_url, example("drop"), "upgrade")
    assert execute(database_url, there) == [(None,)]
    migrate(database_url, example("drop"), "downgrade")
    assert execute(database_url, there) == [("flask_pg_sse.event",)]


def test_a_role_that_does_not_exist(database_url: str) -> None:
    with pytest.raises(sqlalchemy.exc.ProgrammingError) as refused:
        migrate(database_url, example("upgrade").replace(", missing_ok=True", ""), "upgrade")
    assert str(refused.value.orig).splitlines()[0] == 'role "app" does not exist'
    assert execute(database_url, "SELECT to_regnamespace('flask_pg_sse')::text") == [(None,)]


@pytest.mark.filterwarnings("ignore:Did not recognize type 'tid'")
def test_autogenerate_leaves_the_log_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(database_url, schema_sql() + "CREATE SCHEMA shop; CREATE TABLE shop.gone (id integer)")
    configured: dict[str, Any] = {}
    names: dict[str, Any] = {}
    exec(example("env"), names)

    class Context:
        configure = staticmethod(configured.update)
        run_migrations = staticmethod(lambda: None)
        begin_transaction = staticmethod(nullcontext)

    monkeypatch.setitem(names, "context", Context)
    names["run_migrations"](None, sqlalchemy.MetaData())
    assert configured.pop("include_name") is include_name and configured["include_schemas"]

    def dropped(**options: Any) -> list[str]:
        engine = engine_for(database_url)
        try:
            with engine.connect() as connection:
                context = MigrationContext.configure(connection, opts={"include_schemas": True, **options})
                found = compare_metadata(context, sqlalchemy.MetaData())
        finally:
            engine.dispose()
        return sorted(str(one[1]) for one in found if one[0] == "remove_table")

    assert {"flask_pg_sse.event", "shop.gone"} <= {*dropped()}
    assert dropped(include_name=include_name) == ["shop.gone"]
