"""The rights of each database role on the event log: the whole matrix, asked and tried, on two PostgreSQLs.

Four roles beside the superuser: the owner ran `flask sse init`, the app was let in with `--grant-to`, the sender has
the README's two grants for notify(), and the stranger may connect. What there is comes from the catalogs.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import psycopg
import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import DatabaseUnavailable, PermissionDenied, disconnect, notify, schema_sql, sse_cursor
from flask_pg_sse.engine.postgres import pool, retention, schema
from flask_pg_sse.testing import stream
from tests.docs.test_readme import example
from tests.support.client import eventually
from tests.support.documents import Document
from tests.support.log import ENQUEUE, NOTIFY, PUBLISH, listening, logged, pending, run
from tests.support.postgres import connect, execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]
Denied = psycopg2.errors.InsufficientPrivilege

SECURITY = Document("docs/security.md")  # there the database is `shop`

SENDER_MAY = {"notify"}
APP_MAY = {
    "beat_v1", "draw_v1", "enqueue_v1", "erase", "examine_v1", "head_v1", "holders_v1", "holding_v1", "installed_v1",
    "look_v1", "notify", "number_v1", "page_v1", "prune_v1", "publish_v1", "tail_v1", "version_v1", "wait_v1",
}  # fmt: skip
TRIGGER_FUNCTIONS = {"one_row_v1", "publish_pending_v1", "replicated_v1"}


class Place(NamedTuple):
    """A database with the log in it, and a URL for each role."""

    superuser: str
    owner: str
    app: str
    sender: str
    stranger: str


@pytest.fixture
def place(log_server: postgres.Server) -> Iterator[Place]:
    with fresh_database(log_server) as url:
        names = ("sse_owner", "app", "sender", "stranger")
        try:
            execute(
                url,
                SECURITY.example("roles-owner")
                + "CREATE ROLE app LOGIN; CREATE ROLE sender LOGIN; CREATE ROLE stranger LOGIN",
            )
            urls = [url.replace("postgres@", f"{name}@") for name in names]
            execute(urls[0], schema_sql(["app"]))
            execute(urls[0], SECURITY.example("roles-sender"))
            yield Place(url, *urls)
        finally:
            for name in names:
                execute(url, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


class Thing(NamedTuple):
    oid: int
    kind: str
    name: str  # with schema and, of a function, arguments
    simple: str


def things(url: str) -> list[Thing]:
    """Return the schema and all there is in it that rights can be had on."""
    query = """
        SELECT n.oid, 'schema', n.nspname::text, n.nspname::text FROM pg_namespace n WHERE n.nspname = 'flask_pg_sse'
        UNION ALL
        SELECT c.oid, CASE c.relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' ELSE 'table' END,
            'flask_pg_sse.' || c.relname, c.relname
        FROM pg_class c WHERE c.relnamespace = 'flask_pg_sse'::regnamespace AND c.relkind NOT IN ('i', 'I', 't', 'c')
        UNION ALL
        SELECT p.oid, 'function', p.oid::regprocedure::text, p.proname
        FROM pg_proc p WHERE p.pronamespace = 'flask_pg_sse'::regnamespace
        ORDER BY 2, 3
    """
    found = [Thing(*row) for row in execute(url, query)]
    assert {thing.kind for thing in found} == {"schema", "table", "view", "sequence", "function"}
    return found


def privileges(url: str) -> dict[str, list[str]]:
    tables = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]
    if execute(url, "SELECT current_setting('server_version_num')::int >= 170000") == [(True,)]:
        tables.append("MAINTAIN")
    return {
        "schema": ["USAGE", "CREATE"],
        "table": tables,
        "view": tables,
        "sequence": ["USAGE", "SELECT", "UPDATE"],
        "function": ["EXECUTE"],
    }


def rights(url: str, role: str) -> set[tuple[str, str]]:
    """Return (privilege, thing) for all that a role may do; of a table also what it may do with a column of it."""
    found: set[tuple[str, str]] = set()
    with closing(connect(url)) as connection:
        for thing in things(url):
            for privilege in privileges(url)[thing.kind]:
                kind = "table" if thing.kind == "view" else thing.kind
                query = f"SELECT has_{kind}_privilege(%s, %s::oid, %s)"
                [(may,)] = run(connection, query, (role, thing.oid, privilege))
                if kind == "table" and privilege in ("SELECT", "INSERT", "UPDATE", "REFERENCES"):
                    query = "SELECT has_any_column_privilege(%s, %s::oid, %s)"
                    may = may or run(connection, query, (role, thing.oid, privilege)) == [(True,)]
                if may:
                    found.add((privilege, thing.simple))
    return found


def assert_denied(connection: Any, statement: str) -> None:
    try:
        with pytest.raises(Denied):
            run(connection, statement)
    except psycopg2.Error as error:
        raise AssertionError(f"{statement}: not refused for want of the right, but {error!r}") from error
    run(connection, "ROLLBACK")  # where the statement began a transaction; else only a warning


# --- the matrix


def test_the_whole_matrix(place: Place) -> None:
    everything = {
        (privilege, thing.simple)
        for thing in things(place.superuser)
        for privilege in privileges(place.superuser)[thing.kind]
    }
    assert rights(place.superuser, "sse_owner") == everything
    # A function that is new is granted to the app by itself: here somebody has to say that this is right.
    assert {thing.simple for thing in things(place.superuser) if thing.kind == "function"} == (
        APP_MAY | TRIGGER_FUNCTIONS
    )
    usage = ("USAGE", "flask_pg_sse")
    assert rights(place.superuser, "app") == {usage} | {("EXECUTE", name) for name in APP_MAY}
    assert rights(place.superuser, "sender") == {usage} | {("EXECUTE", name) for name in SENDER_MAY}
    assert rights(place.superuser, "stranger") == set()
    assert rights(place.superuser, "public") == set()
    # And none of them can be handed on.
    query = """
        SELECT a.grantee::regrole::text, a.is_grantable FROM (
            SELECT relacl FROM pg_class WHERE relnamespace = 'flask_pg_sse'::regnamespace
            UNION ALL SELECT proacl FROM pg_proc WHERE pronamespace = 'flask_pg_sse'::regnamespace
            UNION ALL SELECT nspacl FROM pg_namespace WHERE nspname = 'flask_pg_sse'
        ) AS acls (acl), aclexplode(acl) AS a WHERE a.grantee <> 'sse_owner'::regrole
    """
    assert set(execute(place.superuser, query)) == {("app", False), ("sender", False)}


ON_TABLES = [
    "SELECT * FROM {}", "SELECT count(*) FROM {}", "TABLE {}",
    "INSERT INTO {} DEFAULT VALUES", "DELETE FROM {}", "TRUNCATE {}", "BEGIN; LOCK TABLE {}",
    "BEGIN; LOCK TABLE {} IN ACCESS SHARE MODE", "ALTER TABLE {} DISABLE TRIGGER ALL",
    "ALTER TABLE {} REPLICA IDENTITY FULL", "ALTER TABLE {} ADD COLUMN x integer", "DROP TABLE {}",
    "CREATE INDEX ON {} ((1))", "CREATE RULE r AS ON INSERT TO {} DO INSTEAD NOTHING",
    "COMMENT ON TABLE {} IS 'x'", "ALTER TABLE {} OWNER TO CURRENT_USER",
    "CREATE TRIGGER t AFTER INSERT ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
]  # fmt: skip
ON_VIEWS = [
    "SELECT * FROM {}", "BEGIN; LOCK TABLE {}", "BEGIN; LOCK TABLE {} IN ACCESS SHARE MODE",
    "BEGIN; LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE", "BEGIN; LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE NOWAIT",
    "COMMENT ON VIEW {} IS 'x'", "CREATE OR REPLACE VIEW {} AS SELECT false AS locked", "DROP VIEW {}",
    "ALTER VIEW {} RENAME TO theirs", "ALTER VIEW {} OWNER TO CURRENT_USER",
    "CREATE RULE r AS ON INSERT TO {} DO INSTEAD NOTHING",
]  # fmt: skip
ON_SEQUENCES = [
    "SELECT * FROM {}", "SELECT nextval('{}')", "SELECT setval('{}', 1)",
    "ALTER SEQUENCE {} RESTART", "DROP SEQUENCE {}",
]  # fmt: skip
ON_THE_SCHEMA = [
    "CREATE TABLE flask_pg_sse.theirs ()", "CREATE VIEW flask_pg_sse.theirs AS SELECT 1",
    "CREATE FUNCTION flask_pg_sse.notify(text, json) RETURNS void LANGUAGE sql AS 'SELECT'",
    "CREATE OR REPLACE FUNCTION flask_pg_sse.head_v1() RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    "CREATE TYPE flask_pg_sse.theirs AS (x integer)",
    "CREATE OPERATOR flask_pg_sse.+ (LEFTARG = text, RIGHTARG = text, FUNCTION = textcat)",
    "ALTER SCHEMA flask_pg_sse RENAME TO theirs", "DROP SCHEMA flask_pg_sse CASCADE",
    "ALTER SCHEMA flask_pg_sse OWNER TO CURRENT_USER", "SET ROLE sse_owner",
    "SET SESSION AUTHORIZATION sse_owner", "SET session_replication_role = replica",
]  # fmt: skip


def test_what_is_not_granted_is_refused_when_it_is_tried(place: Place) -> None:
    """Every object of the catalogs, by every role that may not: the answer is "permission denied", and no data."""
    execute(place.app, NOTIFY, ("orders", "secret"))
    may = {"app": APP_MAY, "sender": SENDER_MAY, "stranger": set[str]()}
    for name, functions in may.items():
        with closing(connect(getattr(place, name))) as connection:
            # Again with USAGE on the schema, granted by mistake: the schema must not be the only protection.
            for widened in (False, True) if name == "stranger" else (True,):
                if widened:
                    execute(place.superuser, f"GRANT USAGE ON SCHEMA flask_pg_sse TO {name}")
                for thing in things(place.superuser):
                    if thing.kind == "function" and thing.simple not in functions:
                        types = re.findall(r"[a-z ]+(?:\[\])*", thing.name.partition("(")[2])
                        nothing = ", ".join(f"NULL::{kind}" for kind in types)
                        assert_denied(connection, f"SELECT flask_pg_sse.{thing.simple}({nothing})")
                    elif thing.kind == "table":
                        for statement in ON_TABLES:
                            assert_denied(connection, statement.format(thing.name))
                    elif thing.kind == "view":
                        for statement in ON_VIEWS:
                            assert_denied(connection, statement.format(thing.name))
                    elif thing.kind == "sequence":
                        for statement in ON_SEQUENCES:
                            assert_denied(connection, statement.format(thing.name))
                        # This one gives nothing, where it says no error.
                        query = "SELECT max(last_value) FROM pg_sequences WHERE schemaname = 'flask_pg_sse'"
                        assert run(connection, query) == [(None,)]
                for statement in ON_THE_SCHEMA:
                    assert_denied(connection, statement)
                # The statistics of columns hold values of theirs.
                execute(place.superuser, "ANALYZE")
                stats = "SELECT count(*) FROM pg_stats WHERE schemaname = 'flask_pg_sse'"
                assert run(connection, stats) == [(0,)]
                may_create = connection.server_version < 150000  # every role's right until then
                assert run(connection, f"SELECT has_schema_privilege('{name}', 'public', 'CREATE')") == [(may_create,)]
    assert execute(place.superuser, "SELECT count(*) > 0 FROM pg_stats WHERE schemaname = 'flask_pg_sse'") == [(True,)]
    assert [row[3] for row in logged(place.superuser)] == ["secret"]


def test_what_is_granted_works(place: Place) -> None:
    """On PostgreSQL 15 deferred triggers run as the role of the commit."""
    execute(place.sender, NOTIFY, ("orders", "of the sender"))
    execute(place.app, NOTIFY, ("orders", "of the app, deferred"))
    execute(place.app, ENQUEUE, ("orders", ["{}"], ["of the app, queued"]))
    execute(place.app, PUBLISH, ("orders", ["{}"], ["of the app, at once"]))
    rows = execute(place.app, "SELECT data FROM flask_pg_sse.page_v1(ARRAY['orders'], 0, 100000, 100000) WHERE id > 0")
    said = ["of the sender", "of the app, deferred", "of the app, queued", "of the app, at once"]
    assert [row[0] for row in rows] == said
    assert pending(place.superuser) == 0
    # As who commits is another role than who sent: rights are those of the moment.
    with closing(connect(place.superuser)) as connection:
        run(connection, "GRANT stranger TO sender; SET ROLE sender; BEGIN")
        run(connection, NOTIFY, ("orders", "committed by a stranger"))
        run(connection, "SET ROLE stranger; COMMIT")
    assert logged(place.superuser)[-1][3] == "committed by a stranger"


def test_a_missing_right_is_an_error_with_the_role_and_the_remedy(
    place: Place, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    execute(place.owner, "REVOKE EXECUTE ON FUNCTION flask_pg_sse.head_v1 FROM app")
    said = (
        'The database role "app" lacks a right: permission denied for function head_v1. Remedy: flask sse init '
        "--grant-to app, run by the role that installed the event log."
    )
    with app.app_context(), pytest.raises(PermissionDenied) as caught:
        sse_cursor()
    assert str(caught.value) == said
    assert isinstance(caught.value, PermissionError) and isinstance(caught.value, DatabaseUnavailable)
    execute(place.owner, "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA flask_pg_sse FROM app")
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    with app.app_context():
        notify("orders", "x")
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert 'role "app" may not use it. Remedy: flask sse init --grant-to app, run by the role' in line


def test_a_sender_forges_no_id_and_no_event_of_the_package(place: Place) -> None:
    """Whatever is in its texts, the id is the log's, and `id =>` is one beside it; no reserved name is taken."""
    query = "SELECT flask_pg_sse.notify(%s, %s, event => %s, id => %s, comment => %s)"
    evil = '1","i":4611686018427387904,"s":"0123456789abcdef'
    with listening(place.superuser, "orders") as ear:
        execute(place.sender, query, ("orders", '\x1e1{"i":4611686018427387904,"s":"x"}\nforged', evil, evil, evil))
        execute(place.sender, query, ("orders", "x", None, "4611686018427387904", None))
        first, second = ear.wait(2)
    [(first_id, *_), (second_id, *_)] = logged(place.superuser)
    assert (first.id, second.id) == (first_id, second_id) and second_id < 4611686018427387904
    assert {**first.fields, "s": ""} == {"event": evil, "id": evil, "comment": evil, "s": ""}
    assert second.fields["id"] == "4611686018427387904"
    for wrong in (("flask_pg_sse", "x", None), ("flask_pg_sse:1", "x", None), ("orders", "x", "sse-reset")):
        with pytest.raises(psycopg2.errors.InvalidParameterValue):
            execute(place.sender, query, (*wrong, None, None))
    assert len(logged(place.superuser)) == 2


def test_grants_can_be_taken_back(place: Place) -> None:
    """At once, also from sessions that are open and plans that are prepared."""
    statements = ["SELECT count(*) FROM flask_pg_sse.page_v1(ARRAY['a'], 0, 9, 9)", "SELECT flask_pg_sse.notify('a')"]
    with closing(connect(place.app)) as app, closing(connect(place.sender)) as sender:
        for number, statement in enumerate(statements):
            run(app, f"PREPARE s{number} AS {statement}; EXECUTE s{number}")
        run(sender, statements[1])
        execute(
            place.owner,
            SECURITY.example("roles-take-back") + SECURITY.example("roles-take-back").replace(" app", " sender"),
        )
        for number, statement in enumerate(statements):
            for again in (statement, f"EXECUTE s{number}"):
                with pytest.raises(Denied):
                    run(app, again)
        with pytest.raises(Denied):
            run(sender, statements[1])
    for role in ("app", "sender", "stranger", "public"):
        assert rights(place.superuser, role) == set()
    # Neither init nor an upgrade gives them back.
    execute(place.owner, schema_sql())
    execute(place.owner, "UPDATE flask_pg_sse.installation SET version = 0")
    with pytest.MonkeyPatch.context() as patch:
        read = schema.read_sql
        patch.setattr(schema, "VERSION", 2)
        patch.setattr(schema, "read_sql", lambda name: "" if name == "schema_2.sql" else read(name))
        execute(place.owner, "UPDATE flask_pg_sse.installation SET version = 1")
        execute(place.owner, schema_sql())
    for role in ("app", "sender", "stranger", "public"):
        assert rights(place.superuser, role) == set()


def test_an_app_whose_grants_are_taken_back_is_told(place: Place, make_app: MakeApp) -> None:
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    with app.app_context():
        assert notify("orders", "x") is not None
        execute(place.owner, SECURITY.example("roles-take-back"))
        with pytest.raises(ConnectionError) as caught:
            notify("orders", "x")
        assert isinstance(caught.value.__cause__, psycopg2.errors.InsufficientPrivilege)
        assert str(caught.value.__cause__).strip().partition("\n")[0] in str(caught.value)
        assert notify("orders", "by NOTIFY alone") is None


def test_default_privileges_let_nobody_in(log_server: postgres.Server) -> None:
    """As one sets them for the tables of an app, without a thought of this schema; what is granted by name counts."""
    with fresh_database(log_server) as url:
        execute(url, "CREATE ROLE app; CREATE ROLE sender; CREATE ROLE stranger")
        try:
            for kind, who in itertools.product(("TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS"), ("sender", "PUBLIC")):
                execute(url, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO {who}")
            execute(url, schema_sql(["app"]))
            execute(url, SECURITY.example("roles-sender"))
            assert {name for _, name in rights(url, "app")} == APP_MAY | {"flask_pg_sse"}
            assert rights(url, "sender") == {("USAGE", "flask_pg_sse"), ("EXECUTE", "notify")}
            assert rights(url, "stranger") == rights(url, "public") == set()
            # What somebody has granted on what is there already is left alone: a monitor's, say.
            execute(url, "GRANT SELECT ON flask_pg_sse.event TO stranger")
            execute(url, schema_sql())
            assert rights(url, "stranger") == {("SELECT", "event")}
        finally:
            execute(url, "DROP OWNED BY app, sender, stranger CASCADE; DROP ROLE app; DROP ROLE sender; "
                "DROP ROLE stranger")  # fmt: skip


# --- code of others


def test_all_functions_run_with_a_search_path_of_their_own(place: Place) -> None:
    """All of them are SECURITY DEFINER, belong to the owner, and look in pg_catalog first and in pg_temp last."""
    query = """
        SELECT proname, prosecdef, proconfig, proowner::regrole::text FROM pg_proc
        WHERE pronamespace = 'flask_pg_sse'::regnamespace
    """
    rows = execute(place.superuser, query)
    assert {row[0] for row in rows} == APP_MAY | TRIGGER_FUNCTIONS
    paths = {(row[1], *[value for value in row[2] if value.startswith("search_path=")], row[3]) for row in rows}
    assert paths == {(True, "search_path=pg_catalog, pg_temp", "sse_owner")}


# What a trap does: it says in whose name it ran.
SPRING = "BEGIN INSERT INTO public.caught VALUES (current_user); RETURN NULL; END"
SPRING_VOID = SPRING.replace("RETURN NULL; ", "")
OPERATORS = ["=", "<>", "<", ">", "<=", ">=", "+", "-", "*", "||", "~"]
OPERANDS = ["text", "bigint", "integer", "numeric", "bytea", "tid", "oid", "name", "timestamptz", "interval"]


def lay_traps(place: Place, connection: Any, where: str = "public") -> None:
    """Make functions, operators and relations with the names and arguments of those that the log's SQL uses.

    By a role that may create in `public`, as every one may until PostgreSQL 14, and where that is left as it was.
    """
    role = connection.info.user
    execute(place.superuser, f"CREATE TABLE caught (who text); GRANT INSERT, SELECT ON caught TO PUBLIC; "
        f"GRANT CREATE ON SCHEMA public TO {role}")  # fmt: skip
    texts = "".join(map(schema.read_sql, ("schema_1.sql", "rows.sql"))) + schema._INSTALL
    used = sorted({*re.findall(r"\b([a-z_0-9]+)\(", texts), "make_interval"})
    functions = execute(
        place.superuser,
        "SELECT quote_ident(proname), pg_get_function_identity_arguments(oid), prorettype::regtype::text FROM pg_proc "
        "WHERE prokind = 'f' AND NOT proretset AND pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (%s) "
        "AND pg_get_function_identity_arguments(oid) !~ 'internal|VARIADIC|any|OUT'",
        (used,),
    )
    assert {"sha256", "pg_notify", "convert_to", "setval"} <= {row[0] for row in functions}
    # Where PostgreSQL's own have to convert an argument, these fit better.
    functions += [
        ("make_interval", "secs numeric", "interval"),
        ("concat", "text, text", "text"),
        ("concat", "text, bigint", "text"),
        ("setval", "text, bigint", "bigint"),
    ]
    for name, arguments, result in functions:
        body = SPRING_VOID if result == "void" else SPRING
        run(connection, f"CREATE FUNCTION {where}.{name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS '{body}'")
    operators = execute(
        place.superuser,
        "SELECT oprname, oprleft::regtype::text, oprright::regtype::text, oprresult::regtype::text FROM pg_operator "
        "WHERE oprname = ANY (%s) AND oprleft = ANY (%s::regtype[]) AND oprright = ANY (%s::regtype[])",
        (OPERATORS, OPERANDS, OPERANDS),
    )
    for number, (name, left, right, result) in enumerate(operators):
        trap = f"{where}.trap_{number}"
        run(connection, f"CREATE FUNCTION {trap}({left}, {right}) RETURNS {result} LANGUAGE plpgsql AS '{SPRING}'")
        run(connection, f"CREATE OPERATOR {where}.{name} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = {trap})")
    run(connection, f"CREATE FUNCTION {where}.trap() RETURNS bigint LANGUAGE plpgsql AS '{SPRING}'")
    for name in ("event", "pending", "installation", "retention", "event_id", "pg_proc", "pg_namespace"):
        run(connection, f"CREATE VIEW {where}.{name} AS SELECT {where}.trap() AS id")
    for kind in ("text", "json", "oid"):
        run(connection, f"CREATE DOMAIN {where}.{kind} AS pg_catalog.{kind} CHECK ({where}.trap() > 0)")


def caught(place: Place) -> list[Any]:
    """Return the roles in whose names traps ran."""
    return [row[0] for row in execute(place.superuser, "TABLE caught")]


def use_all_of_it(connection: Any, *, only_notify: bool = False, install: bool = False) -> None:
    """Call everything with a statement in which nothing is left to the search path."""
    text, json = "::pg_catalog.text", "::pg_catalog.json"
    run(connection, f"SELECT flask_pg_sse.notify('orders'{text}, 'x', event => 'e', id => '1')")
    run(connection, f"SELECT flask_pg_sse.notify(pg_catalog.repeat('x', 100){text}, pg_catalog.repeat('x', 9000))")
    for wrong in ("pg_catalog.chr(10)", f"'flask_pg_sse'{text}", "pg_catalog.repeat('x', 300)"):
        with pytest.raises(psycopg2.errors.InvalidParameterValue):
            run(connection, f"SELECT flask_pg_sse.notify({wrong})")
    if only_notify:
        return
    arrays = f"ARRAY['{{}}']{json}[], ARRAY['x']{text}[]"
    run(connection, f"SELECT flask_pg_sse.enqueue_v1('orders', {arrays})")
    run(connection, f"SELECT flask_pg_sse.publish_v1('orders', {arrays})")
    run(connection, f"SELECT * FROM flask_pg_sse.page_v1(ARRAY['orders']{text}[], 0, 1000, 1000)")
    run(connection, f"SELECT * FROM flask_pg_sse.tail_v1(ARRAY['orders']{text}[], ARRAY[9]::pg_catalog.int8[], 65536)")
    run(connection, "SELECT flask_pg_sse.beat_v1('x'), flask_pg_sse.head_v1(), flask_pg_sse.draw_v1(1)")
    run(connection, "SELECT * FROM flask_pg_sse.installed_v1()")
    run(connection, "SELECT flask_pg_sse.holders_v1('pruning')")
    run(connection, "SELECT * FROM flask_pg_sse.examine_v1()")
    run(connection, "SELECT flask_pg_sse.prune_v1('0 s'::pg_catalog.interval, 1)")
    if install:
        run(connection, schema_sql(["app"], owner="sse_owner"))


def test_nothing_that_a_stranger_has_made_runs_in_the_name_of_others(place: Place) -> None:
    """Their sessions find it before PostgreSQL's own, and the log's functions and its installation do not."""
    with closing(connect(place.stranger)) as stranger:
        lay_traps(place, stranger)
    path = "SET search_path = public, pg_catalog"
    for url in (place.sender, place.app, place.owner, place.superuser):
        with closing(connect(url)) as victim:
            run(victim, path)
            use_all_of_it(victim, only_notify=url == place.sender, install=url in (place.owner, place.superuser))
            assert run(victim, "SELECT pg_catalog.current_schemas(true)") == [(["public", "pg_catalog"],)]
    with closing(connect(place.owner)) as owner:  # from nothing, too
        execute(place.superuser, f"GRANT CREATE ON DATABASE {place.superuser.rpartition('/')[2]} TO sse_owner")
        execute(place.owner, "DROP SCHEMA flask_pg_sse CASCADE")
        run(owner, path)
        run(owner, schema_sql(["app"]))
    assert caught(place) == []
    # The traps are sharp: what is not named with its schema springs them.
    for sharp in ("sha256('x'::bytea)", "1::bigint = 2::bigint", "(SELECT id FROM event)", "'x'::text IS NULL"):
        execute(place.superuser, f"{path}; SELECT {sharp}")
    assert caught(place) == ["postgres"] * 4


@pytest.mark.parametrize("role", ["sender", "app"])
def test_a_role_does_not_become_the_owner_by_its_temporary_schema(place: Place, role: str) -> None:
    with closing(connect(getattr(place, role))) as connection:
        lay_traps(place, connection, "pg_temp")
        run(connection, "SET search_path = pg_temp, public, pg_catalog")
        use_all_of_it(connection, only_notify=role == "sender")
        assert caught(place) == []
        run(connection, "SELECT * FROM event; SELECT 'x'::text")  # these are found in it, functions and operators never
        assert caught(place) == [role] * 2


@pytest.mark.parametrize("path", ["", "public, pg_catalog"])
def test_what_the_package_runs_by_itself_falls_into_no_trap(place: Place, make_app: MakeApp, path: str) -> None:
    """Streams, notify() and the commands, in the name of the app, also where another search path is the role's."""
    with closing(connect(place.stranger)) as stranger:
        lay_traps(place, stranger)
    if path:
        for role in ("app", "sse_owner"):
            execute(place.superuser, f"ALTER ROLE {role} SET search_path = {path}")
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner", SECRET_KEY="k")
    with app.app_context():
        events = stream(app.test_client(), "/sse?channel=orders")
        assert next(events).event == "sse-open"
        first = notify("orders", "one")
        with closing(psycopg2.connect(place.app)) as connection:
            notify("orders", "two", connection=connection)
            notify("orders", "three", connection=connection, durable=False)
            connection.commit()
        notify("orders", "four", durable=False)
        assert sorted(next(events).data for _ in range(4)) == ["four", "one", "three", "two"]
        with psycopg.connect(place.app) as connection_3:
            notify("orders", "two", connection=connection_3)
        disconnect(subject="nobody")
        assert sse_cursor()
        again = stream(app.test_client(), f"/sse?channel=orders&last_event_id={first}")
        assert [next(again).event, next(again).data] == ["sse-open", "two"]
        events.close()
        again.close()
    for arguments in (["init"], ["prune"], ["prune", "--max-age", "0"]):
        result = app.test_cli_runner().invoke(args=["sse", *arguments])
        assert result.exit_code == 0, result.output
    result = make_app(place.owner).test_cli_runner().invoke(args=["sse", "init", "--grant-to", "app"])
    assert result.exit_code == 0, result.output
    assert caught(place) == []
    if path:
        return
    # One that fits better than PostgreSQL's own is found even with PostgreSQL's path.
    execute(place.app, "SELECT make_interval(secs => 1.5)")
    assert caught(place) == ["app"]


def test_triggers_make_nobody_the_owner(place: Place) -> None:
    """A trigger of one's own runs in the owner's name on no table, and the log's runs on no table but its own."""
    execute(place.superuser, "GRANT CREATE ON SCHEMA public TO stranger, sender, app")
    for role in ("stranger", "sender", "app"):
        with closing(connect(getattr(place, role))) as connection:
            run(connection, f"CREATE TABLE public.of_{role} (channel text, fields json, data text)")
            run(
                connection,
                f"CREATE FUNCTION public.f_{role}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            )
            for name in ("event", "pending", "installation", "retention"):
                assert_denied(
                    connection,
                    f"CREATE TRIGGER t AFTER INSERT ON flask_pg_sse.{name} FOR EACH ROW "
                    f"EXECUTE FUNCTION public.f_{role}()",
                )
                if name == "event":  # the only one with a key
                    assert_denied(connection, f"CREATE TABLE public.r_{role} (id bigint REFERENCES flask_pg_sse.event)")
                assert_denied(connection, f"CREATE TABLE public.i_{role} () INHERITS (flask_pg_sse.{name})")
            for function in sorted(TRIGGER_FUNCTIONS):
                assert_denied(
                    connection,
                    f"CREATE TRIGGER t AFTER UPDATE ON public.of_{role} FOR EACH ROW "
                    f"EXECUTE FUNCTION flask_pg_sse.{function}()",
                )


# --- what rights on the log do not cover: NOTIFY is everybody's


def test_every_role_that_can_connect_hears_and_sends_on_every_channel(place: Place, make_app: MakeApp) -> None:
    """That is NOTIFY, and the documentation says so: rights protect the log, not live notifications."""
    with listening(place.stranger, "orders", "flask_pg_sse") as ear:
        execute(place.app, NOTIFY, ("orders", "in passing"))
        heard = ear.wait(1)[0]
    assert (heard.channel, heard.data) == ("orders", "in passing") and heard.id == logged(place.superuser)[0][0]
    with pytest.raises(Denied):
        execute(place.stranger, "SELECT * FROM flask_pg_sse.event")
    statistics = "SELECT count(n_tup_ins) FROM pg_stat_user_tables WHERE schemaname = 'flask_pg_sse'"
    assert execute(place.stranger, statistics) == [(4,)]
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    with app.app_context():
        events = stream(app.test_client(), "/sse?channel=orders")
        assert next(events).event == "sse-open"
        execute(place.stranger, "NOTIFY orders, 'of a stranger'")
        assert next(events).data == "of a stranger"
        log_id = notify("orders", "of the app")
        assert (event := next(events)).data == "of the app" and event.id == str(log_id)


def test_who_reads_all_data_reads_these_too(place: Place) -> None:
    execute(place.app, NOTIFY, ("orders", "kept"))
    for role in ("pg_read_all_data", "sse_owner"):
        execute(place.superuser, f"GRANT {role} TO stranger")
        assert execute(place.stranger, "SELECT data FROM flask_pg_sse.event") == [("kept",)]
        assert execute(place.stranger, "SELECT length(key) FROM flask_pg_sse.installation") == [(32,)]
        execute(place.superuser, f"REVOKE {role} FROM stranger")


def test_who_may_not_connect_hears_nothing(place: Place) -> None:
    database = place.superuser.rpartition("/")[2]
    execute(place.superuser, SECURITY.example("roles-connect").replace(" shop ", f" {database} "))
    for url in (place.owner, place.app, place.sender):
        assert execute(url, "SELECT 1") == [(1,)]
    with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
        connect(place.stranger)


def test_no_role_that_can_only_connect_can_hold_anything_up(place: Place, make_app: MakeApp) -> None:
    """Neither publishers nor pruning nor an installation, by whatever lock it can take.

    Advisory locks are everybody's, so nothing here may take one.
    """
    taken = "SELECT classid, objid FROM pg_locks WHERE locktype = 'advisory'"
    works = [
        (place.app, "SELECT flask_pg_sse.notify('orders', 'deferred')"),
        (place.app, "SELECT flask_pg_sse.publish_v1('orders', ARRAY['{}'::json], ARRAY['at once'])"),
        (place.app, "SELECT flask_pg_sse.prune_v1('1 hour', 100)"),
        (place.owner, schema_sql(["app"])),
        (place.superuser, schema_sql(["app"], owner="sse_owner")),
    ]
    with closing(connect(place.stranger)) as stranger:
        run(stranger, "BEGIN")
        run(stranger, "SELECT pg_advisory_lock(7380381037705062258 + n) FROM generate_series(1, 3) AS n")  # as before
        # It asks for every lock that there is a name for, and gets none that stays.
        for thing in things(place.superuser):
            for statement in (f"LOCK TABLE {thing.name} IN SHARE UPDATE EXCLUSIVE MODE", f"DROP SCHEMA {thing.name}",
                f"COMMENT ON SCHEMA {thing.name} IS 'x'", f"COMMENT ON VIEW {thing.name} IS 'x'"):  # fmt: skip
                run(stranger, "SAVEPOINT here")
                with pytest.raises(psycopg2.Error):
                    run(stranger, statement)
                run(stranger, "ROLLBACK TO SAVEPOINT here")
        for url, work in works:
            with closing(connect(url)) as worker:
                run(worker, "SET lock_timeout = '2s'")
                assert run(worker, f"BEGIN; {work}; {taken} AND pid = pg_backend_pid()") == [], "it takes such a lock"
                run(worker, "COMMIT")
        assert execute(place.app, "SELECT flask_pg_sse.prune_v1('0 s', 100)") == [(2,)], "it is not busy"
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    with app.app_context():
        assert notify("orders", "x") is not None


def test_who_holds_the_lock_is_named(place: Place, make_app: MakeApp) -> None:
    """The wait is bounded, also at the commit of a caller's transaction; then the error says who holds it."""
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
    holder = psycopg2.connect(place.app, application_name="a slow job")
    with app.app_context(), closing(holder), closing(connect(place.app)) as publisher:
        run(holder, "SELECT flask_pg_sse.publish_v1('orders', ARRAY['{}'::json], ARRAY['holds it'])")
        named = rf'session {holder.info.backend_pid} of role "app" \(application_name "a slow job", '
        run(publisher, "SET lock_timeout = '100ms'")
        run(publisher, "BEGIN")
        run(publisher, NOTIFY, ("orders", "late"))
        with pytest.raises(psycopg2.errors.LockNotAvailable, match=named + "state not visible to sse_owner"):
            run(publisher, "COMMIT")
        execute(place.superuser, "GRANT pg_read_all_stats TO sse_owner")
        with pytest.raises(psycopg2.errors.LockNotAvailable, match=named + "idle in transaction"):
            run(publisher, "SELECT flask_pg_sse.publish_v1('orders', ARRAY['{}'::json], ARRAY['late'])")
        assert run(publisher, "SHOW lock_timeout") == [("100ms",)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "PART_FOR_LOCKS", 0.1)  # the rest of 10 s is left to find out who holds the lock
            with pytest.raises(ConnectionError, match=named):
                notify("orders", "late")
        holder.rollback()
        run(publisher, "BEGIN; SET LOCAL lock_timeout = 0")
        run(publisher, "SELECT flask_pg_sse.publish_v1('orders', ARRAY['{}'::json], ARRAY['in time'])")
        assert run(publisher, "SHOW lock_timeout") == [("0",)], "and the caller's own limit is as it was"
        run(publisher, "COMMIT")
    assert [row[3] for row in logged(place.superuser)] == ["in time"]


@pytest.mark.slow
def test_the_wait_at_a_commit_is_bounded_without_a_limit_of_ones_own(place: Place) -> None:
    with closing(psycopg2.connect(place.app)) as holder, closing(connect(place.app)) as publisher:
        run(holder, "SELECT flask_pg_sse.draw_v1(1)")  # and never more, as with a transaction of very many events
        run(publisher, "BEGIN")
        run(publisher, NOTIFY, ("orders", "late"))
        begun = time.monotonic()
        with pytest.raises(psycopg2.errors.LockNotAvailable, match=f"session {holder.info.backend_pid} "):
            run(publisher, "COMMIT")
        assert 7 < time.monotonic() - begun < 12


def test_pruning_that_does_not_happen_is_said(
    place: Place, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flask_pg_sse.engine.postgres.retention")
    monkeypatch.setattr(retention, "_EVERY", 0.05)
    monkeypatch.setattr(retention, "LATE", 0.3)
    holder = psycopg2.connect(place.app, application_name="a slow job")
    with closing(holder):
        run(holder, "SELECT flask_pg_sse.prune_v1('1 hour', 100)")
        app = make_app(place.app, SSE_LOG_OWNER="sse_owner")
        events = stream(app.test_client(), "/sse?channel=orders")
        assert next(events).event == "sse-open"
        named = f'is held by session {holder.info.backend_pid} of role "app" (application_name "a slow job", '
        eventually(lambda: len(caplog.messages) >= 2)
        assert all(record.levelname == "WARNING" and named in record.message for record in caplog.records)
        assert len(caplog.messages) < 4, "it is not said with every attempt"
        holder.rollback()
        eventually(lambda: "is pruned again" in caplog.messages[-1])
    events.close()


def test_pruning_that_fails_is_said_once_and_its_end(
    place: Place, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flask_pg_sse.engine.postgres.retention")
    monkeypatch.setattr(retention, "_EVERY", 0.02)
    rounds = 0
    prune = retention.prune

    def counted(*arguments: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return prune(*arguments)

    monkeypatch.setattr(retention, "prune", counted)
    app = make_app(place.app, SSE_LOG_OWNER="sse_owner")

    def lines() -> list[str]:
        with app.app_context():
            sse_cursor()  # the log is looked up again, as for every event
        return caplog.messages

    with closing(stream(app.test_client(), "/sse?channel=orders")) as events:
        assert next(events).event == "sse-open"
        execute(place.superuser, "REVOKE EXECUTE ON FUNCTION flask_pg_sse.prune_v1 FROM app")
        eventually(lambda: lines())
        before = rounds
        eventually(lambda: lines() and rounds > before + 5)
        assert len(caplog.messages) == 1 and "could not be pruned" in caplog.text
        execute(place.superuser, "GRANT EXECUTE ON FUNCTION flask_pg_sse.prune_v1 TO app")
        eventually(lambda: len(lines()) > 1)
        assert caplog.messages[1].startswith("The event log is pruned again, after ")
        assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_the_readme_has_the_same_grants() -> None:
    assert SECURITY.example("roles-sender").strip().replace(" sender", " shop") == example("grant-notify").strip()
