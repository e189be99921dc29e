"""The event log's installation: fresh, again, by several at once, from version to version, by Alembic; and its rights.

On the newest PostgreSQL and on an older one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from flask import Flask

from flask_pg_sse import EventLogMissing, drop_schema_sql, notify, schema_sql
from flask_pg_sse.engine.postgres import installation, schema
from flask_pg_sse.engine.postgres.connect import connect as connect_async
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.testing import stream
from tests.docs.test_readme import example
from tests.support.catalog import NotDescribed, describe, read_catalog
from tests.support.postgres import connect, dump, execute, fresh_database, load
from tools import postgres

ROOT = Path(__file__).resolve().parents[3]

MakeApp = Callable[..., Flask]


@pytest.fixture
def url(log_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh database."""
    with fresh_database(log_server) as url:
        yield url


@pytest.fixture
def roles(url: str) -> Iterator[Callable[..., str]]:
    """Make roles that may connect, and do what is granted here; each call returns the URL for one."""
    made: list[str] = []

    def make(name: str, *grants: str) -> str:
        execute(url, f"CREATE ROLE {name} LOGIN")
        made.append(name)
        for grant in grants:
            execute(url, f"GRANT {grant} TO {name}")
        return url.replace("postgres@", f"{name}@")

    yield make
    for name in made:
        execute(url, f"DROP OWNED BY {name} CASCADE")
        execute(url, f"DROP ROLE {name}")


def install(url: str, *grant_to: str, owner: str | None = None) -> int:
    with closing(connect_async(to_dsn(url, "tests"), "tests")) as connection:
        return installation.install(connection, grant_to, owner=owner)[0]


def data(url: str) -> list[Any]:
    """Return what an installation must keep."""
    return [
        execute(url, f"SELECT * FROM flask_pg_sse.{table} ORDER BY 1")
        for table in ("installation", "retention", "event", "event_id")
    ]


def publish(url: str, *items: str, channel: str = "orders") -> int:
    query = "SELECT flask_pg_sse.publish_v1(%s, array_fill('{}'::json, ARRAY[cardinality(%s)]), %s)"
    ((number,),) = execute(url, query, (channel, list(items), list(items)))
    return int(number)


# --- comparing two schemas

DIFFERENCES = """
ALTER SCHEMA flask_pg_sse OWNER TO other
GRANT USAGE ON SCHEMA flask_pg_sse TO other
COMMENT ON SCHEMA flask_pg_sse IS 'x'
ALTER DEFAULT PRIVILEGES IN SCHEMA flask_pg_sse GRANT SELECT ON TABLES TO other
CREATE TABLE flask_pg_sse.more ()
DROP TABLE flask_pg_sse.retention
ALTER TABLE flask_pg_sse.retention RENAME TO retention2
ALTER TABLE flask_pg_sse.event OWNER TO other
GRANT SELECT ON flask_pg_sse.event TO other
GRANT SELECT ON flask_pg_sse.event TO other WITH GRANT OPTION
REVOKE ALL ON flask_pg_sse.event FROM postgres
COMMENT ON TABLE flask_pg_sse.event IS 'x'
INSERT INTO pg_seclabel VALUES ('flask_pg_sse.event'::regclass, 'pg_class'::regclass, 0, 'x', 'y')
INSERT INTO pg_seclabel VALUES ('flask_pg_sse.event'::regclass, 'pg_class'::regclass, 1, 'x', 'y')
ALTER TABLE flask_pg_sse.pending SET LOGGED
ALTER TABLE flask_pg_sse.pending SET (autovacuum_vacuum_threshold = 4999)
ALTER TABLE flask_pg_sse.pending RESET (autovacuum_vacuum_threshold)
ALTER TABLE flask_pg_sse.event SET (toast.autovacuum_enabled = false)
ALTER TABLE flask_pg_sse.retention REPLICA IDENTITY DEFAULT
ALTER TABLE flask_pg_sse.event REPLICA IDENTITY USING INDEX event_pkey
ALTER TABLE flask_pg_sse.event ENABLE ROW LEVEL SECURITY
ALTER TABLE flask_pg_sse.event FORCE ROW LEVEL SECURITY
UPDATE pg_class SET reltablespace = 1664 WHERE oid = 'flask_pg_sse.event'::regclass
CREATE TABLE public.part (LIKE flask_pg_sse.retention); ALTER TABLE flask_pg_sse.retention INHERIT public.part
CREATE TYPE public.r AS (pruned_through bigint); ALTER TABLE flask_pg_sse.retention OF public.r
CREATE TABLE flask_pg_sse.parts (x int) PARTITION BY LIST (x)
CREATE VIEW flask_pg_sse.seen AS SELECT 1 AS x
ALTER TABLE flask_pg_sse.event ADD COLUMN origin text
ALTER TABLE flask_pg_sse.event DROP COLUMN data
ALTER TABLE flask_pg_sse.event RENAME COLUMN data TO data2
ALTER TABLE flask_pg_sse.event DROP COLUMN channel, ADD COLUMN channel text NOT NULL
ALTER TABLE flask_pg_sse.retention ALTER pruned_through TYPE numeric
ALTER TABLE flask_pg_sse.event ALTER data TYPE varchar(9)
ALTER TABLE flask_pg_sse.event ALTER data TYPE text COLLATE "C"
ALTER TABLE flask_pg_sse.event ALTER data SET NOT NULL
ALTER TABLE flask_pg_sse.event ALTER channel DROP NOT NULL
ALTER TABLE flask_pg_sse.pending ALTER created_at SET DEFAULT clock_timestamp()
ALTER TABLE flask_pg_sse.pending ALTER created_at DROP DEFAULT
ALTER TABLE flask_pg_sse.event ALTER id ADD GENERATED ALWAYS AS IDENTITY
ALTER TABLE flask_pg_sse.event ADD COLUMN more text GENERATED ALWAYS AS (data) STORED
ALTER TABLE flask_pg_sse.event ALTER data SET STORAGE EXTERNAL
ALTER TABLE flask_pg_sse.event ALTER data SET COMPRESSION pglz
ALTER TABLE flask_pg_sse.event ALTER data SET STATISTICS 7
ALTER TABLE flask_pg_sse.event ALTER data SET (n_distinct = 5)
GRANT SELECT (data) ON flask_pg_sse.event TO other
COMMENT ON COLUMN flask_pg_sse.event.data IS 'x'
ALTER TABLE flask_pg_sse.event ADD CHECK (id > 0)
ALTER TABLE flask_pg_sse.event ADD CHECK (id > 0) NOT VALID
ALTER TABLE flask_pg_sse.event DROP CONSTRAINT event_pkey
ALTER TABLE flask_pg_sse.event RENAME CONSTRAINT event_pkey TO event_key
ALTER TABLE flask_pg_sse.event ADD FOREIGN KEY (id) REFERENCES flask_pg_sse.event
COMMENT ON CONSTRAINT event_pkey ON flask_pg_sse.event IS 'x'
CREATE INDEX ON flask_pg_sse.event (created_at)
DROP INDEX flask_pg_sse.event_channel_id
DROP INDEX flask_pg_sse.event_channel_id; CREATE INDEX event_channel_id ON flask_pg_sse.event (channel, id DESC)
ALTER INDEX flask_pg_sse.event_channel_id SET (fillfactor = 70)
ALTER TABLE flask_pg_sse.event CLUSTER ON event_channel_id
COMMENT ON INDEX flask_pg_sse.event_channel_id IS 'x'
CREATE STATISTICS flask_pg_sse.both ON id, channel FROM flask_pg_sse.event
CREATE TRIGGER x BEFORE UPDATE ON flask_pg_sse.event EXECUTE FUNCTION flask_pg_sse.publish_pending_v1()
ALTER TABLE flask_pg_sse.event ENABLE TRIGGER replicated
ALTER TABLE flask_pg_sse.installation ENABLE TRIGGER one_row
DROP INDEX flask_pg_sse.retention_has_one_row
DROP TRIGGER publish ON flask_pg_sse.pending
ALTER TABLE flask_pg_sse.pending DISABLE TRIGGER publish
ALTER TABLE flask_pg_sse.pending ENABLE ALWAYS TRIGGER publish
UPDATE pg_trigger SET tginitdeferred = false WHERE tgname = 'publish'
COMMENT ON TRIGGER publish ON flask_pg_sse.pending IS 'x'
CREATE RULE x AS ON DELETE TO flask_pg_sse.event DO INSTEAD NOTHING
CREATE POLICY x ON flask_pg_sse.event USING (true)
CREATE FUNCTION flask_pg_sse.more() RETURNS integer LANGUAGE sql AS 'SELECT 1'
DROP FUNCTION flask_pg_sse.version_v1
ALTER FUNCTION flask_pg_sse.version_v1 RENAME TO version_v2
ALTER FUNCTION flask_pg_sse.version_v1 OWNER TO other
GRANT EXECUTE ON FUNCTION flask_pg_sse.version_v1 TO other
GRANT EXECUTE ON FUNCTION flask_pg_sse.version_v1 TO PUBLIC
COMMENT ON FUNCTION flask_pg_sse.version_v1 IS 'x'
ALTER FUNCTION flask_pg_sse.version_v1 STABLE
ALTER FUNCTION flask_pg_sse.version_v1 STRICT
ALTER FUNCTION flask_pg_sse.version_v1 SECURITY INVOKER
ALTER FUNCTION flask_pg_sse.version_v1 LEAKPROOF
ALTER FUNCTION flask_pg_sse.version_v1 PARALLEL SAFE
ALTER FUNCTION flask_pg_sse.version_v1 COST 7
ALTER FUNCTION flask_pg_sse.installed_v1 ROWS 7
ALTER FUNCTION flask_pg_sse.version_v1 RESET search_path
ALTER FUNCTION flask_pg_sse.version_v1 SET work_mem = '1MB'
UPDATE pg_proc SET prosrc = 'SELECT 2' WHERE proname = 'version_v1'
CREATE SEQUENCE flask_pg_sse.more
DROP SEQUENCE flask_pg_sse.event_id
ALTER SEQUENCE flask_pg_sse.event_id OWNER TO other
GRANT USAGE ON SEQUENCE flask_pg_sse.event_id TO other
DROP SEQUENCE flask_pg_sse.event_id; CREATE SEQUENCE flask_pg_sse.event_id AS integer
ALTER SEQUENCE flask_pg_sse.event_id INCREMENT 2
ALTER SEQUENCE flask_pg_sse.event_id START 2
ALTER SEQUENCE flask_pg_sse.event_id MAXVALUE 9000000000000000
ALTER SEQUENCE flask_pg_sse.event_id CACHE 9
ALTER SEQUENCE flask_pg_sse.event_id CYCLE
ALTER SEQUENCE flask_pg_sse.event_id OWNED BY flask_pg_sse.event.id
COMMENT ON SEQUENCE flask_pg_sse.event_id IS 'x'
CREATE DOMAIN flask_pg_sse.small AS integer CHECK (value < 9)
CREATE TYPE flask_pg_sse.state AS ENUM ('on', 'off')
GRANT USAGE ON TYPE flask_pg_sse.event TO other; REVOKE USAGE ON TYPE flask_pg_sse.event FROM PUBLIC
"""
# Of these the comparison does not know what makes two of them the same, and says so.
UNKNOWN = """
CREATE AGGREGATE flask_pg_sse.total (bigint) (SFUNC = int8pl, STYPE = bigint)
CREATE TYPE flask_pg_sse.span AS RANGE (SUBTYPE = integer)
CREATE OPERATOR flask_pg_sse.<@> (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = int8pl)
CREATE COLLATION flask_pg_sse.plain FROM "C"
CREATE TEXT SEARCH DICTIONARY flask_pg_sse.words (TEMPLATE = simple)
CREATE PUBLICATION log FOR TABLE flask_pg_sse.event
"""
# What a user did not give and pg_dump may show: an option of the server's own; the same rights, written down or not.
NO_DIFFERENCES = """
UPDATE pg_attribute SET attoptions = '{pg_attver=7}' WHERE attrelid = 'flask_pg_sse.event'::regclass
GRANT ALL ON flask_pg_sse.event TO postgres
UPDATE flask_pg_sse.retention SET pruned_through = 7
"""


@pytest.mark.slow
def test_no_difference_between_two_schemas_goes_unseen(url: str, roles: Callable[..., str]) -> None:
    """All that other tests here compare by `read_catalog` would be worth nothing without this."""
    roles("other", "CREATE ON DATABASE " + url.rpartition("/")[2])
    install(url)
    with closing(connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        before = describe(cursor)

        def seen_after(statement: str) -> str:
            cursor.execute(f"SET LOCAL allow_system_table_mods = on; {statement}")
            try:
                return "same" if describe(cursor) == before else "other"
            except NotDescribed:
                return "unknown"
            finally:
                connection.rollback()

        for statements, expected in ((DIFFERENCES, "other"), (UNKNOWN, "unknown"), (NO_DIFFERENCES, "same")):
            found = {statement: seen_after(statement) for statement in statements.strip().splitlines()}
            assert [statement for statement in found if found[statement] != expected] == []


# --- installing


def test_a_second_installation_changes_nothing(url: str) -> None:
    assert install(url) == 0
    publish(url, "1", "2", "3")
    execute(url, "SELECT flask_pg_sse.prune_v1(interval '0', 1)")
    before = read_catalog(url), data(url)
    assert install(url) == schema.VERSION
    execute(url, schema_sql())
    assert (read_catalog(url), data(url)) == before


def test_the_script_is_one_statement_and_all_or_nothing(url: str) -> None:
    """Even in autocommit mode, as of psql."""
    with pytest.raises(psycopg2.errors.UndefinedObject, match="no_such_role"):
        execute(url, schema_sql(["postgres", "no_such_role"]))
    assert execute(url, "SELECT to_regnamespace('flask_pg_sse')::text") == [(None,)]
    execute(url, f"PREPARE one AS SELECT 1; {schema_sql()}")
    execute(url, drop_schema_sql())
    execute(url, drop_schema_sql())


def test_it_leaves_the_session_as_it_was(url: str, roles: Callable[..., str]) -> None:
    """A migration goes on after it, perhaps under a role and a search_path of its own."""
    roles("migrator", "CREATE ON DATABASE " + url.rpartition("/")[2])
    with closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SET search_path = public, pg_temp")
        for role in ("migrator", "migrator", "postgres"):  # the last for a schema that is another's
            cursor.execute(f"SET ROLE {role}")
            cursor.execute(f"BEGIN; {schema_sql(owner='migrator')} SELECT current_user, current_setting('search_path')")
            assert cursor.fetchone() == (role, "public, pg_temp")
            cursor.execute("COMMIT; SELECT current_user, current_setting('search_path')")
            assert cursor.fetchone() == (role, "public, pg_temp")
    owned_by = "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'flask_pg_sse'"
    assert execute(url, owned_by) == [("migrator",)]


def test_all_of_it_belongs_to_the_role_that_the_schema_belongs_to(
    url: str, roles: Callable[..., str], second_version: Callable[[], None]
) -> None:
    """An administrator makes the schema for a role that may not, and later installs the upgrade too."""
    theirs = roles("owner_of_log")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        install(theirs)
    execute(url, "CREATE SCHEMA flask_pg_sse AUTHORIZATION owner_of_log")
    assert install(theirs) == 0
    second_version()
    with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState, match="owner_of_log"):
        install(url)
    assert install(url, owner="owner_of_log") == 1
    owners = execute(
        url,
        "SELECT DISTINCT o FROM (SELECT relowner::regrole::text AS o FROM pg_class WHERE relnamespace = s.oid "
        "UNION ALL SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = s.oid) AS x".replace(
            "s.oid", "'flask_pg_sse'::regnamespace"
        ),
    )
    assert owners == [("owner_of_log",)]
    assert install(theirs) == 2


def test_a_schema_that_was_laid_out_as_a_trap_gets_no_foreign_rights(url: str, roles: Callable[..., str]) -> None:
    """The code of a stranger does not run at all, and that of an owner who is trusted runs as its owner."""
    trapper = roles("trapper", "CREATE ON DATABASE " + url.rpartition("/")[2])
    execute(
        trapper,
        "CREATE SCHEMA flask_pg_sse; CREATE TABLE flask_pg_sse.seen (who text);"
        "CREATE FUNCTION flask_pg_sse.f() RETURNS integer LANGUAGE sql AS "
        "$$ INSERT INTO flask_pg_sse.seen VALUES (current_user); SELECT 9 $$;"
        "CREATE VIEW flask_pg_sse.installation AS SELECT flask_pg_sse.f() AS version",
    )
    with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState, match="trapper"):
        install(url)
    assert execute(url, "SELECT who FROM flask_pg_sse.seen") == []
    assert install(url, owner="trapper") == 9
    assert execute(url, "SELECT DISTINCT who FROM flask_pg_sse.seen") == [("trapper",)]


def test_the_search_path_of_who_installs_leads_nowhere(url: str, roles: Callable[..., str]) -> None:
    """A function in `public` that fits better than PostgreSQL's own would be called in its place."""
    trapper = roles("trapper", "CREATE ON SCHEMA public")
    for signature in ("setval(text, bigint)", "concat(uuid, uuid)", "quote_ident(text)", "to_regclass(text)"):
        execute(trapper, f"CREATE FUNCTION public.{signature} RETURNS text LANGUAGE sql AS 'SELECT 1/0; SELECT $$x$$'")
    execute(url, "SET search_path = public, pg_catalog; " + schema_sql(["trapper"]))
    assert publish(url, "x") > 0


@pytest.mark.parametrize("role", ["Mixed Case", "qu\"ote's", "$do$ $step$", "a :b %s %(c)s \\", "größe"])
def test_any_role_name_can_be_granted_to(database_url: str, role: str) -> None:
    quoted = '"' + role.replace('"', '""') + '"'
    execute(database_url, f"CREATE ROLE {quoted}")
    try:
        engine = sqlalchemy.create_engine(database_url.replace("postgresql:", "postgresql+psycopg2:"))
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(schema_sql([role])))
        engine.dispose()
        may = "SELECT has_function_privilege(%s, 'flask_pg_sse.installed_v1()', 'EXECUTE')"
        assert execute(database_url, may, (role,)) == [(True,)]
    finally:
        execute(database_url, f"DROP OWNED BY {quoted} CASCADE; DROP ROLE {quoted}")


def test_grant_to_takes_roles_only() -> None:
    with pytest.raises(TypeError, match="a list of roles"):
        schema_sql("app")
    for everybody in ("public", ""):
        with pytest.raises(ValueError, match="a list of role names"):
            schema_sql([everybody])


# --- dumps without rows


@pytest.fixture
def restored(
    log_server: postgres.Server, log_binaries: Path | None, url: str, roles: Callable[..., str]
) -> Iterator[Callable[..., str]]:
    """Dump the database of `url`, with the options given, and restore it into a fresh one; return that one's URL.

    It is dropped before the roles that were let into it.
    """
    with fresh_database(log_server) as target:

        def copy(*options: str) -> str:
            load(dump(url, *options, bin_dir=log_binaries), target, log_binaries)
            return target

        yield copy


# All rows; those of this schema; those of one table, so that the log's events are there.
WITHOUT_ROWS = [
    "--schema-only",
    "--exclude-table-data=flask_pg_sse.*",
    "--exclude-table-data=flask_pg_sse.installation",
]


@pytest.mark.parametrize("option", WITHOUT_ROWS)
def test_a_log_that_was_restored_without_its_rows_is_made_whole_again(
    url: str, restored: Callable[..., str], roles: Callable[..., str], make_app: MakeApp, option: str
) -> None:
    roles("log_app")
    execute(url, schema_sql(["log_app"]))
    seen = publish(url, "1", "2", "3")
    execute(url, "SELECT flask_pg_sse.prune_v1(interval '0', 1)")
    (((_, key, _),), *_) = data(url)
    copy = restored(option)
    app, theirs = make_app(copy), copy.replace("postgres@", "log_app@")
    events = stream(app.test_client(), f"/sse?channel=orders&last_event_id={seen}")
    assert [next(events).event, next(events).json["reason"]] == ["sse-open", "no-log"]
    with app.app_context():
        assert notify("orders", "without the log") is None
        assert next(events).data == "without the log"
        app.extensions["pg_sse"].close()
    with make_app(copy, SSE_EVENT_LOG=True).app_context() as context:
        with pytest.raises(EventLogMissing, match=r"has no rows.*flask sse init"):
            notify("orders", "x")
        with closing(connect(copy)) as connection, pytest.raises(EventLogMissing):
            notify("orders", "x", connection=connection)
        assert next(stream(context.app.test_client(), "/sse?channel=orders")).json == {"reason": "unavailable"}
    execute(copy, "SELECT flask_pg_sse.notify('orders', 'meanwhile')")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        install(theirs)
    before = [row[0] for row in data(copy)[2]]
    assert install(copy) == 0
    (((version, new_key, _),), ((pruned_through,),), *_) = data(copy)
    assert version == schema.VERSION and len(new_key) == 32 and new_key != key
    assert [row[0] for row in data(copy)[2]] == before and pruned_through < before[0]
    assert publish(theirs, "4") > max(seen, *before), "no id is given out again"
    assert execute(copy, "SELECT flask_pg_sse.prune_v1(interval '0', 10)") == [(len(before) + 1,)]
    # From here on a log like any other, with the grants of the dump, and the next init finds nothing to do.
    again = read_catalog(copy), data(copy)
    assert install(copy) == schema.VERSION
    assert (read_catalog(copy), data(copy)) == again
    assert read_catalog(copy) == read_catalog(url)
    with make_app(copy, SSE_EVENT_LOG=True).app_context():
        assert notify("orders", "kept") is not None


def test_ids_go_on_in_a_log_without_rows_though_the_clock_is_wrong(url: str, restored: Callable[..., str]) -> None:
    """Where the sequence's value came along, and lies above what the clock shows."""
    install(url)
    execute(url, "SELECT setval('flask_pg_sse.event_id', 9000000000000000)")
    seen = publish(url, "1", "2")
    copy = restored("--exclude-table-data=flask_pg_sse.installation", "--exclude-table-data=flask_pg_sse.event")
    execute(copy, "DELETE FROM flask_pg_sse.retention")
    install(copy)
    assert data(copy)[1][0][0] > seen
    assert publish(copy, "3") > data(copy)[1][0][0]


def test_a_log_without_rows_keeps_the_version_of_its_tables(
    url: str, restored: Callable[..., str], second_version: Callable[[], None]
) -> None:
    """Whether it was of the version that is installed now, or of an older one."""
    install(url)
    old = restored("--schema-only")
    second_version()
    install(old)
    install(url)
    assert data(old)[0][0][0] == 2 and read_catalog(old) == read_catalog(url)
    execute(old, drop_schema_sql())
    new = restored("--schema-only")
    install(new)
    assert data(new)[0][0][0] == 2 and read_catalog(new) == read_catalog(url)
    assert publish(new, "x") > 0


def test_an_older_postgresql_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "OLDEST", 990000)
    with pytest.raises(psycopg2.errors.FeatureNotSupported, match=r"needs PostgreSQL 99 or newer, and this is 1\d"):
        install(url)


@pytest.mark.parametrize("default", ["read committed", "serializable"])
def test_many_install_at_once(log_server: postgres.Server, default: str) -> None:
    """In fresh databases, with connections that are open already, so that they really meet."""

    def one(connection: Any, barrier: threading.Barrier) -> int:
        barrier.wait(10)
        return installation.install(connection)[0]

    for sessions in (2, 5) * 3:
        with fresh_database(log_server) as url, ThreadPoolExecutor(sessions) as threads:
            execute(
                url,
                f"ALTER ROLE postgres IN DATABASE {url.rpartition('/')[2]} "
                f"SET default_transaction_isolation = '{default}'",
            )
            connections = [connect_async(to_dsn(url, "tests"), "tests") for _ in range(sessions)]
            barrier = threading.Barrier(sessions)
            found = list(threads.map(lambda connection: one(connection, barrier), connections))  # noqa: B023
            assert sorted(found) == [0] + [1] * (sessions - 1)
            assert publish(url, "x") > 0
            for connection in connections:
                connection.close()


# --- upgrades

# As a later version might be: a column with a default, a function of a new version beside the old, one replaced.
SECOND = """
LOCK TABLE flask_pg_sse.pending, flask_pg_sse.event;
ALTER TABLE flask_pg_sse.event ADD COLUMN origin text NOT NULL DEFAULT 'here';
ALTER TABLE flask_pg_sse.pending ADD COLUMN origin text;
CREATE INDEX event_created_at ON flask_pg_sse.event (created_at);
CREATE FUNCTION flask_pg_sse.enqueue_v2(channel text, fields json[], data text[], origin text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO flask_pg_sse.pending (channel, fields, data, origin) VALUES ($1, $2, $3, $4)
$function$;
CREATE OR REPLACE FUNCTION flask_pg_sse.head_v1() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT greatest((SELECT max(e.id) FROM flask_pg_sse.event e), r.pruned_through) FROM flask_pg_sse.retention r
$function$;
REVOKE ALL ON FUNCTION flask_pg_sse.enqueue_v2 FROM PUBLIC;
"""


@pytest.fixture
def second_version(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, the package has a version 2."""
    read = schema.read_sql

    def switch() -> None:
        monkeypatch.setattr(schema, "VERSION", 2)
        monkeypatch.setattr(schema, "read_sql", lambda name: SECOND if name == "schema_2.sql" else read(name))

    return switch


def test_an_upgrade_ends_where_a_fresh_installation_begins(
    log_server: postgres.Server, url: str, roles: Callable[..., str], second_version: Callable[[], None]
) -> None:
    app, publisher = roles("log_app"), roles("log_publisher")
    with fresh_database(log_server) as fresh:
        execute(url, schema_sql(["log_app"]))
        execute(
            url,
            "GRANT USAGE ON SCHEMA flask_pg_sse TO log_publisher;"
            "GRANT EXECUTE ON FUNCTION flask_pg_sse.notify TO log_publisher",
        )
        publish(url, "1", "2")
        execute(url, "SELECT flask_pg_sse.prune_v1(interval '0', 1)")
        before = read_catalog(url), data(url)
        second_version()
        execute(url, schema_sql())
        execute(fresh, schema_sql(["log_app"]))
        execute(
            fresh,
            "GRANT USAGE ON SCHEMA flask_pg_sse TO log_publisher;"
            "GRANT EXECUTE ON FUNCTION flask_pg_sse.notify TO log_publisher",
        )
        assert read_catalog(url) == read_catalog(fresh) != before[0]
        assert any("enqueue_v2" in name for _, name in read_catalog(url))
    (((version, key, _),), retention, events, *sequences) = data(url)
    (((_, old_key, _),), old_retention, old_events, *old_sequences) = before[1]
    assert (version, key, retention, sequences) == (2, old_key, old_retention, old_sequences)
    assert events == [(*event, "here") for event in old_events]
    assert publish(app, "3") > events[-1][0]
    execute(app, "SELECT flask_pg_sse.enqueue_v2('orders', ARRAY['{}']::json[], ARRAY['4'], 'there')")
    execute(publisher, "SELECT flask_pg_sse.notify('orders', '5')")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        execute(publisher, "SELECT flask_pg_sse.enqueue_v2('orders', ARRAY['{}']::json[], ARRAY['4'], 'there')")
    assert [row[3] for row in data(url)[2]] == ["2", "3", "4", "5"]
    again = read_catalog(url), data(url)
    execute(url, schema_sql())
    assert (read_catalog(url), data(url)) == again


def test_a_package_that_is_older_leaves_a_newer_schema(
    url: str, roles: Callable[..., str], second_version: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = roles("log_app")
    with monkeypatch.context():
        second_version()
        execute(url, schema_sql(["log_app"]))
    publish(url, "1")
    monkeypatch.setattr(schema, "VERSION", 1)
    before = read_catalog(url), data(url)
    assert install(url) == 2
    assert (read_catalog(url), data(url)) == before
    assert install(app) == 2


def test_old_workers_go_on_through_an_upgrade(url: str, second_version: Callable[[], None]) -> None:
    """Publishers of both kinds, readers and a pruner, at work while the upgrade runs: none fails, nothing is lost."""
    execute(url, schema_sql())
    upgraded, rounds = threading.Event(), 0

    def work(statements: list[str]) -> int:
        rounds = after = 0
        with closing(connect(url)) as connection, connection.cursor() as cursor:
            while after < 20:
                after += upgraded.is_set()
                for statement in statements:
                    cursor.execute(statement)
                rounds += 1
        return rounds

    arrays = "ARRAY['{}']::json[], ARRAY['x']"
    with ThreadPoolExecutor(4) as threads:
        works = [
            threads.submit(work, ["BEGIN", f"SELECT flask_pg_sse.enqueue_v1('orders', {arrays})", "COMMIT"]),
            threads.submit(work, [f"SELECT flask_pg_sse.publish_v1('orders', {arrays})"]),
            threads.submit(work, ["SELECT * FROM flask_pg_sse.page_v1(ARRAY['orders'], 0, 1000, 1000)"]),
            threads.submit(work, ["SELECT flask_pg_sse.prune_v1(interval '1 h', 10)"]),
        ]
        try:
            publish(url, "x", channel="other")
            second_version()
            assert install(url) == 1
        finally:
            upgraded.set()
        rounds = sum(work.result(30) for work in works[:2])
    assert execute(url, "SELECT count(*) FROM flask_pg_sse.event WHERE channel = 'orders'") == [(rounds,)]


def test_the_steps_hold_nothing_that_would_end_the_quotes_or_be_taken_for_a_parameter() -> None:
    script = schema_sql(["app"])
    assert sqlalchemy.text(script)._bindparams == {}
    assert "%" not in script and "\\:" not in script
    assert script.count("$do$") == 2 and script.count("$step$") == 2 * schema.VERSION
    assert script.isascii()


# --- Alembic

MIGRATION = f"""
revision = "1"
down_revision = None

{example("alembic")}
"""
ENVIRONMENT = """
from alembic import context
from sqlalchemy import create_engine, pool

url = context.config.get_main_option("sqlalchemy.url")
if context.is_offline_mode():
    context.configure(url=url)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=pool.NullPool).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"""


@pytest.fixture
def alembic_config(tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "1_event_log.py").write_text(MIGRATION)
    (tmp_path / "env.py").write_text(ENVIRONMENT)

    def configure(url: str, driver: str, **options: Any) -> Config:
        config = Config(**options)
        config.set_main_option("script_location", str(tmp_path))
        config.set_main_option("path_separator", "os")
        config.set_main_option("sqlalchemy.url", url.replace("postgresql:", f"postgresql+{driver}:"))
        return config

    return configure


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_alembic_upgrades_and_downgrades(url: str, driver: str, alembic_config: Callable[..., Config]) -> None:
    config = alembic_config(url, driver)
    for _ in range(2):
        command.upgrade(config, "head")
        by_alembic = read_catalog(url)
        publish(url, "x")
        command.downgrade(config, "base")
        assert execute(url, "SELECT to_regnamespace('flask_pg_sse')::text, 1") == [(None, 1)]
    install(url)
    assert by_alembic == read_catalog(url)


def test_alembic_writes_a_script_that_works(url: str, alembic_config: Callable[..., Config], tmp_path: Path) -> None:
    with (tmp_path / "script.sql").open("w") as output:
        command.upgrade(alembic_config(url, "psycopg2", output_buffer=output), "head", sql=True)
    execute(url, (tmp_path / "script.sql").read_text())
    by_script = read_catalog(url)
    execute(url, drop_schema_sql())
    install(url)
    assert by_script == read_catalog(url)


# --- rights


def functions(url: str) -> list[str]:
    rows = execute(
        url, "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'flask_pg_sse'::regnamespace ORDER BY 1"
    )
    return [row[0] for row in rows]


ARRAYS = "ARRAY['{}']::json[], ARRAY['x']"
WHAT_AN_APP_DOES = [
    "SELECT flask_pg_sse.notify('orders', 'x')",
    f"SELECT flask_pg_sse.enqueue_v1('orders', {ARRAYS})",
    f"SELECT flask_pg_sse.publish_v1('orders', {ARRAYS})",
    "SELECT * FROM flask_pg_sse.page_v1(ARRAY['orders'], 0, 1000, 1000)",
    "SELECT * FROM flask_pg_sse.tail_v1(ARRAY['orders'], ARRAY[9], 65536)",
    "SELECT flask_pg_sse.head_v1()",
    "SELECT flask_pg_sse.beat_v1('x')",
    "SELECT * FROM flask_pg_sse.installed_v1()",
    "SELECT flask_pg_sse.prune_v1(interval '1 h', 10)",
    "SELECT flask_pg_sse.erase('no such channel')",
]


def assert_denied(url: str, statement: str) -> None:
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        execute(url, statement)


def test_a_role_that_was_let_in_can_do_all_and_touch_nothing(url: str, roles: Callable[..., str]) -> None:
    app = roles("log_app")
    install(url, "log_app")
    for statement in WHAT_AN_APP_DOES:
        execute(app, statement)  # a commit each: on PostgreSQL 15 the deferred trigger then runs as this role
    assert execute(url, "SELECT count(*) FROM flask_pg_sse.event") == [(3,)]
    assert execute(url, "SELECT count(*) FROM flask_pg_sse.pending") == [(0,)]
    tables = {"installation": "version", "event": "id", "pending": "data", "retention": "pruned_through"}
    for table, column in tables.items():
        for statement in (
            "SELECT * FROM {}",
            "INSERT INTO {} DEFAULT VALUES",
            f"UPDATE {{}} SET {column} = NULL",
            "DELETE FROM {}",
            "TRUNCATE {}",
        ):
            assert_denied(app, statement.format(f"flask_pg_sse.{table}"))
    for statement in ("SELECT last_value FROM {}", "SELECT nextval('{}')", "SELECT setval('{}', 1)"):
        assert_denied(app, statement.format("flask_pg_sse.event_id"))
    assert_denied(app, "CREATE TABLE flask_pg_sse.mine (x integer)")
    assert install(app) == 1  # a deploy that always runs `flask sse init` has nothing to do


def test_everybody_else_can_do_nothing(url: str, roles: Callable[..., str]) -> None:
    """A role that may only connect; and one that was let into the schema, and may call nothing yet."""
    install(url)
    stranger = roles("stranger")
    for statement in WHAT_AN_APP_DOES:
        assert_denied(stranger, statement)
    execute(url, "GRANT USAGE ON SCHEMA flask_pg_sse TO stranger")
    for statement in [*WHAT_AN_APP_DOES, "SELECT * FROM flask_pg_sse.event"]:
        assert_denied(stranger, statement)
    for function in functions(url):
        may = "SELECT has_function_privilege('stranger', %s, 'EXECUTE')"
        assert execute(url, may, (function,)) == [(False,)], function
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        install(stranger)


def test_all_functions_bring_rights_and_search_path_with_them(url: str) -> None:
    install(url)
    query = """
        SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'flask_pg_sse'::regnamespace
        AND NOT (prosecdef AND coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false))
    """
    assert execute(url, query) == []


def test_a_granted_role_cannot_use_the_trigger_function_on_a_table_of_its_own(
    url: str, roles: Callable[..., str]
) -> None:
    """A type of its own could bring a cast that then runs as the owner of the log, here a superuser."""
    app = roles("log_app", "CREATE ON DATABASE " + url.rpartition("/")[2])
    install(url, "log_app")
    attack = """
        CREATE SCHEMA theirs;
        CREATE TYPE theirs.channel AS ENUM ('x');
        CREATE TABLE theirs.seen (who text);
        GRANT ALL ON SCHEMA theirs TO PUBLIC;
        GRANT ALL ON theirs.seen TO PUBLIC;
        CREATE FUNCTION theirs.cast(theirs.channel) RETURNS text LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO theirs.seen VALUES (current_user); RETURN 'x'; END $$;
        CREATE CAST (theirs.channel AS text) WITH FUNCTION theirs.cast AS IMPLICIT;
        CREATE TABLE theirs.pending (channel theirs.channel, fields json, data text);
        INSERT INTO theirs.pending VALUES ('x', '{}', '');
    """
    execute(app, attack)
    trigger = """
        CREATE TRIGGER attack AFTER UPDATE ON theirs.pending
        FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.publish_pending_v1()
    """
    assert_denied(app, trigger)
    # Not even where somebody has granted more than we did.
    execute(url, "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA flask_pg_sse TO log_app")
    execute(app, trigger)
    with pytest.raises(psycopg2.errors.RaiseException, match=r"flask_pg_sse\.pending alone"):
        execute(app, "UPDATE theirs.pending SET data = 'x'")
    assert execute(url, "SELECT who FROM theirs.seen") == []


def test_names_in_other_schemas_are_not_taken_for_postgresqls_own(url: str, roles: Callable[..., str]) -> None:
    """The functions do not use copies of their objects in `public` or in the session's temporary schema."""
    app = roles("log_app", "CREATE ON SCHEMA public")
    install(url, "log_app")
    names = {*re.findall(r"\b([a-z_0-9]+)\(", schema.read_sql("schema_1.sql"))}
    builtin = "SELECT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (%s)"
    used = sorted({row[0] for row in execute(url, builtin, (list(names),))})
    assert {"pg_notify", "sha256", "setval", "convert_to", "octet_length", "unnest"} <= set(used)
    signatures = execute(
        url,
        "SELECT quote_ident(proname), pg_get_function_identity_arguments(oid) FROM pg_proc WHERE prokind = 'f' "
        "AND pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (%s) "
        "AND pg_get_function_identity_arguments(oid) !~ 'internal|VARIADIC|any|OUT'",
        (used,),
    )
    with closing(connect(app)) as connection, connection.cursor() as cursor:
        for where in ("public", "pg_temp"):
            for name, arguments in signatures:
                # Its result has the wrong type, and to call it is an error.
                cursor.execute(
                    f"CREATE FUNCTION {where}.{name}({arguments}) RETURNS integer LANGUAGE plpgsql AS "
                    "$$ BEGIN RAISE EXCEPTION 'trapped as %', current_user; END $$"
                )
            trap = f"{where}.trap_{where}"
            cursor.execute(
                f"CREATE FUNCTION {trap}(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'trapped as %', current_user; END $$"
            )
            if where == "public":
                for operator in ("=", "<>", ">", "<=", "+", "-"):
                    cursor.execute(
                        f"CREATE OPERATOR {where}.{operator} (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = {trap})"
                    )
        for table in ("event", "pending", "installation", "retention", "pg_proc", "pg_namespace"):
            cursor.execute(f"CREATE TEMP TABLE {table} (id bigint, version integer, key bytea, pruned_through bigint)")
        for kind in ("text", "json", "bigint", "regclass"):
            cursor.execute(f"CREATE DOMAIN public.{kind} AS pg_catalog.text CHECK (value IS NULL)")
        cursor.execute("SET search_path = public, pg_temp, pg_catalog")
        for statement in WHAT_AN_APP_DOES:
            types = statement.replace("::json[]", "::pg_catalog.json[]").replace("interval", "pg_catalog.interval")
            cursor.execute(types)
    assert execute(url, "SELECT count(*) FROM flask_pg_sse.event") == [(3,)]


# --- the package


@pytest.mark.slow
def test_an_installed_wheel_has_the_sql(tmp_path: Path) -> None:
    """Built from a copy and without the network; test_scripts.py looks that nothing else is in it."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "flask_pg_sse", source / "flask_pg_sse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    before = {path.name for path in source.iterdir()}
    done = subprocess.run([*pip, "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in source.iterdir()} == before  # no build/, no egg-info
    code = "import flask_pg_sse; print(flask_pg_sse.__file__); print(flask_pg_sse.schema_sql(), end='')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{target / 'flask_pg_sse' / '__init__.py'}\n{schema_sql()}"


@pytest.mark.slow
def test_the_sdist_has_what_the_repository_has(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    source = tmp_path / "flask-pg-sse"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [archive] = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    assert files <= found, files - found
