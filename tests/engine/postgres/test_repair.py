"""What a restore, replication or changes by hand leave: a restore works or fails in words, and init repairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.engine.postgres import installation, schema
from flask_pg_sse.engine.postgres.connect import connect as connect_async
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.testing import stream
from tests.support.catalog import read_catalog
from tests.support.client import eventually
from tests.support.cluster import Cluster
from tests.support.log import NOTIFY, PUBLISH, connected, logged
from tests.support.postgres import connect, dump, execute, fresh_database, restore_rows
from tools import postgres

MakeApp = Callable[..., Flask]
RETENTION = "SELECT pruned_through FROM flask_pg_sse.retention"
INSTALLATION = "SELECT version, key FROM flask_pg_sse.installation"


@pytest.fixture
def url(log_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh database."""
    with fresh_database(log_server) as url:
        yield url


def install(url: str, owner: str | None = None) -> int:
    with closing(connect_async(to_dsn(url, "tests"), "tests")) as connection:
        return installation.install(connection, owner=owner)[0]


def publish(url: str, count: int) -> list[int]:
    return [execute(url, PUBLISH, ("orders", ["{}"], [f"{n}"]))[0][0] for n in range(count)]


def assert_all_is_well(url: str, make_app: MakeApp, like: str) -> None:
    """All ways to publish work, streams hear, resume from each id of the log, and init finds nothing to do."""
    install(url)
    catalog = read_catalog(url)
    assert catalog == read_catalog(like)
    ids = [row[0] for row in logged(url)]
    app = make_app(url, SSE_EVENT_LOG=True)
    with app.app_context(), connected(url) as connection:
        live = stream(app.test_client(), "/sse?channel=orders")
        assert next(live).event == "sse-open"
        assert notify("orders", "own") is not None
        notify("orders", "theirs", connection=connection)
        connection.commit()
        assert [next(live).data for _ in range(2)] == ["own", "theirs"]
        for number, log_id in enumerate(ids):
            resumed = stream(app.test_client(), f"/sse?channel=orders&last_event_id={log_id}")
            assert next(resumed).event == "sse-open"
            assert [next(resumed).id for _ in ids[number + 1 :]] == [str(one) for one in ids[number + 1 :]]
            resumed.close()
        app.extensions["pg_sse"].close()
    rows = execute(url, INSTALLATION), execute(url, RETENTION)
    assert [len(found) for found in rows] == [1, 1]
    assert install(url) == schema.VERSION
    assert (execute(url, INSTALLATION), execute(url, RETENTION)) == rows and read_catalog(url) == catalog


@pytest.mark.parametrize("options", [[], ["--disable-triggers"]], ids=["", "triggers off"])
def test_rows_restored_into_a_log_that_is_there(
    log_server: postgres.Server,
    log_binaries: Path | None,
    url: str,
    make_app: MakeApp,
    options: list[str],
) -> None:
    """`flask sse init`, or Alembic's `schema_sql()`, in a new database, and then the data of a dump."""
    install(url)
    ids = publish(url, 5)
    execute(url, "SELECT flask_pg_sse.prune_v1(interval '0', 2)")
    archive = dump(url, "-Fc", bin_dir=log_binaries)
    with fresh_database(log_server) as copy:
        install(copy)
        own = execute(copy, INSTALLATION)
        errors = restore_rows(archive, copy, *options, bin_dir=log_binaries)
        if options:
            assert [re.findall('constraint "(.*)"', error) for error in errors] == [
                ["installation_has_one_row"], ["retention_has_one_row"]
            ]  # fmt: skip
        else:
            assert not errors
            assert execute(copy, RETENTION) == execute(url, RETENTION)
            assert read_catalog(copy) == read_catalog(url)
        assert execute(copy, INSTALLATION) == own, "the key is the one that workers know"
        assert install(copy) == schema.VERSION
        assert ids[1] <= execute(copy, RETENTION)[0][0] < ids[2], "none of the restored events counts as pruned"
        assert [row[0] for row in logged(copy)] == ids[2:]
        assert_all_is_well(copy, make_app, url)


@pytest.mark.slow
def test_a_subscriber_that_has_a_log_of_its_own(cluster: Cluster, make_app: MakeApp) -> None:
    """With a publication FOR ALL TABLES, the rows of `installation` and `retention` come too."""
    with fresh_database(cluster.primary, logged=True) as source, fresh_database(cluster.primary, logged=True) as target:
        own = execute(target, INSTALLATION)
        ids = publish(source, 3)
        execute(source, "CREATE PUBLICATION everything FOR ALL TABLES")
        execute(source, "SELECT pg_create_logical_replication_slot('everything', 'pgoutput')")
        execute(
            target,
            f"CREATE SUBSCRIPTION everything CONNECTION '{source}' PUBLICATION everything "
            "WITH (create_slot = false, slot_name = 'everything')",
        )
        try:
            states = "SELECT DISTINCT srsubstate::text FROM pg_subscription_rel"
            eventually(lambda: execute(target, states) == [("r",)], 30, "all tables are there")
            assert [row[0] for row in logged(target)] == ids
            execute(source, "SELECT flask_pg_sse.prune_v1(interval '0', 2)")
            more = publish(source, 2)
            eventually(lambda: [row[0] for row in logged(target)] == ids[2:] + more, 30)
            eventually(lambda: execute(target, RETENTION) == [(ids[1],)], 10)
        finally:
            execute(target, "ALTER SUBSCRIPTION everything DISABLE")
            execute(target, "ALTER SUBSCRIPTION everything SET (slot_name = NONE); DROP SUBSCRIPTION everything")
            drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active"
            eventually(lambda: execute(source, drop))
        assert execute(target, INSTALLATION) == own
        assert_all_is_well(target, make_app, source)


def test_a_second_row_changes_nothing_but_how_far_the_log_is_pruned(url: str) -> None:
    install(url)
    own = execute(url, INSTALLATION)
    execute(
        url, "INSERT INTO flask_pg_sse.installation SELECT version + 1, 'x', timelines FROM flask_pg_sse.installation"
    )
    execute(url, "INSERT INTO flask_pg_sse.retention VALUES (7)")
    assert execute(url, INSTALLATION) == own and execute(url, RETENTION) == [(7,)]


LEFT = {
    "two rows": """
        DROP INDEX flask_pg_sse.installation_has_one_row, flask_pg_sse.retention_has_one_row;
        SET session_replication_role = replica;
        ALTER TABLE flask_pg_sse.installation DISABLE TRIGGER one_row;
        ALTER TABLE flask_pg_sse.retention DISABLE TRIGGER one_row;
        INSERT INTO flask_pg_sse.installation SELECT version, 'x', timelines FROM flask_pg_sse.installation;
        INSERT INTO flask_pg_sse.retention SELECT pruned_through + 1000000000 FROM flask_pg_sse.retention
    """,
    "no row of how far it is pruned": "TRUNCATE flask_pg_sse.retention",
    "triggers off": """
        ALTER TABLE flask_pg_sse.installation DISABLE TRIGGER ALL; ALTER TABLE flask_pg_sse.event DISABLE TRIGGER ALL;
        ALTER TABLE flask_pg_sse.retention DISABLE TRIGGER ALL; ALTER TABLE flask_pg_sse.pending DISABLE TRIGGER ALL
    """,
    "ordinary triggers": """
        ALTER TABLE flask_pg_sse.installation ENABLE TRIGGER ALL; ALTER TABLE flask_pg_sse.event ENABLE TRIGGER ALL;
        ALTER TABLE flask_pg_sse.retention ENABLE TRIGGER ALL
    """,
}


@pytest.mark.parametrize("left", LEFT)
def test_init_repairs(log_url: str, url: str, make_app: MakeApp, left: str) -> None:
    install(url)
    ids = publish(log_url, 3)
    execute(log_url, LEFT[left])
    assert install(log_url) == schema.VERSION
    assert execute(log_url, RETENTION)[0][0] < ids[0]
    assert_all_is_well(log_url, make_app, url)


def test_a_schema_that_was_given_to_another_role_alone(url: str) -> None:
    """Its functions run as the old owner, who may not use the schema any more. The new one is told what to do."""
    names = [f"{name}_{url.rpartition('_')[2]}" for name in ("first", "second")]
    first, second = names
    for name in names:
        execute(url, f"CREATE ROLE {name} LOGIN; GRANT CREATE ON DATABASE {url.rpartition('/')[2]} TO {name}")
    try:
        execute(url.replace("postgres@", f"{first}@"), schema_sql())
        execute(url, f"ALTER SCHEMA flask_pg_sse OWNER TO {second}")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            execute(url, NOTIFY, ("orders", "x"))
        for installer in (url, url.replace("postgres@", f"{second}@")):
            with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState) as caught:
                install(installer, second)
            diag: Any = caught.value.diag
            assert diag.message_primary.startswith(
                f"schema flask_pg_sse belongs to {second}, and what is in it to {first}."
            )
            assert f"ALTER SCHEMA flask_pg_sse OWNER TO {first}." in diag.message_hint
        execute(url, diag.message_hint.partition(": ")[2].partition(".")[0])
        install(url, first)
        execute(url, NOTIFY, ("orders", "x"))
        assert len(logged(url)) == 1
    finally:
        for name in names:
            execute(url, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_init_waits_for_no_publisher(log_url: str) -> None:
    """A deploy that always runs it does not stop what others do, and is not stopped."""
    with connected(log_url) as publisher:
        with closing(connect(log_url)) as reader, reader.cursor() as cursor:
            cursor.execute("BEGIN; SELECT * FROM flask_pg_sse.installation, flask_pg_sse.retention")
            with publisher.cursor() as mine:
                mine.execute(PUBLISH, ("orders", ["{}"], ["x"]))
            execute(log_url, f"SET lock_timeout = '2s'; {schema_sql()}")
        publisher.commit()
