"""Code of other roles in a schema that has the log's name: it never runs with the rights of those who use the log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any, NamedTuple

import psycopg
import psycopg2
import pytest
import sqlalchemy
from flask import Flask

from flask_pg_sse import EventLogMissing, disconnect, drop_schema_sql, notify, schema_sql, sse_cursor, sse_url
from flask_pg_sse.engine.postgres import installation
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.documents import Document
from tests.support.log import run
from tests.support.postgres import connect, execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]
SECURITY = Document("docs/security.md")
# What every call of the package is answered with. Each function takes what the app alone may read.
SIGNATURES = [
    "installed_v1() RETURNS TABLE (version integer, key bytea)",
    "version_v1() RETURNS integer",
    "head_v1() RETURNS bigint",
    "beat_v1(nonce text) RETURNS void",
    "enqueue_v1(channel text, fields json[], data text[]) RETURNS void",
    "publish_v1(channel text, fields json[], data text[]) RETURNS bigint",
    "page_v1(channels text[], after bigint, max_bytes bigint, max_event bigint) RETURNS TABLE (pruned_through bigint, "
    "head bigint, upto bigint, id bigint, channel text, fields json, data text, size bigint)",
    "tail_v1(channels text[], uptos bigint[], max_bytes bigint) RETURNS TABLE (channel text, complete_after bigint, "
    "id bigint, fields json, data text)",
    "prune_v1(max_age interval, batch integer) RETURNS integer",
    "holders_v1(name text) RETURNS text",
]


class Place(NamedTuple):
    """A database, and URLs of it for roles. `other` may CREATE in it."""

    superuser: str
    owner: str
    migrator: str
    app: str
    other: str


@pytest.fixture
def place(postgres_server: postgres.Server) -> Iterator[Place]:
    """The app has a table that only it may read. `owner` is the database's owner; `migrator` may CREATE too."""
    with fresh_database(postgres_server) as url:
        name = url.rpartition("/")[2]
        names = ("database_owner", "migrator", "app", "other")
        try:
            for role in names:
                execute(url, f"CREATE ROLE {role} LOGIN")
            execute(url, f"ALTER DATABASE {name} OWNER TO database_owner; GRANT CREATE ON DATABASE {name} TO migrator")
            execute(url, f"GRANT CREATE ON DATABASE {name} TO other; CREATE TABLE secret AS SELECT 'of the app' AS it")
            execute(url, "ALTER TABLE secret OWNER TO app")
            yield Place(url, *[url.replace("postgres@", f"{role}@") for role in names])
        finally:
            execute(url, f"ALTER DATABASE {name} OWNER TO postgres")
            for role in names:
                execute(url, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def attack(language: str = "plpgsql") -> str:
    """Return what the other role runs: a schema with the log's name, whose functions steal from those who call them.

    The functions may say that they change nothing. Then PostgreSQL may run them while it plans a statement, before any
    condition in that statement counts.
    """
    steal = "INSERT INTO loot.taken SELECT current_user, session_user, it FROM public.secret"
    functions = [
        "CREATE FUNCTION loot.steal() RETURNS integer LANGUAGE plpgsql AS "
        f"$$ BEGIN BEGIN {steal}; EXCEPTION WHEN insufficient_privilege THEN "
        "INSERT INTO loot.taken VALUES (current_user, session_user, NULL); END; RETURN 1; END $$"
    ]
    for signature in SIGNATURES:
        returns = signature.partition("RETURNS ")[2]
        if language == "plpgsql":
            body = (
                "BEGIN PERFORM loot.steal(); RETURN" + ("" if returns.startswith(("TABLE", "void")) else " 1") + "; END"
            )
        elif returns.startswith("TABLE"):
            columns = [f"NULL::{column.split()[1]}" for column in returns.strip("TABLE ()").split(", ")]
            body = f"SELECT {', '.join(columns)} FROM (SELECT loot.steal() AS it OFFSET 0) AS stolen WHERE it = 1"
        else:
            body = "SELECT loot.steal()" + ("" if returns == "void" else f"::{returns}")
        functions.append(f"CREATE FUNCTION flask_pg_sse.{signature} LANGUAGE {language} IMMUTABLE AS $$ {body} $$")
    return (
        "CREATE SCHEMA flask_pg_sse; GRANT USAGE ON SCHEMA flask_pg_sse TO PUBLIC; CREATE SCHEMA IF NOT EXISTS loot; "
        "CREATE TABLE IF NOT EXISTS loot.taken (who name, really name, what text); GRANT ALL ON loot.taken TO PUBLIC; "
        "GRANT USAGE ON SCHEMA loot TO PUBLIC; " + "; ".join(functions)
    )


def taken(place: Place) -> list[Any]:
    return execute(place.superuser, "TABLE loot.taken")


languages = pytest.mark.parametrize("language", [pytest.param("plpgsql", marks=pytest.mark.slow), "sql"])


def attempt(call: Callable[[], object]) -> None:
    with suppress(ConnectionError, EventLogMissing):
        call()


def use_everything(app: Flask, url: str) -> None:
    """Call everything of the package that calls functions of the log, on its own connections and on a caller's."""
    with app.app_context():
        attempt(lambda: notify("orders", "x"))
        attempt(sse_cursor)
        attempt(lambda: disconnect(subject="ann"))
        with closing(psycopg2.connect(url)) as connection:
            attempt(lambda: notify("orders", "x", connection=connection))
            connection.commit()
        with psycopg.connect(url) as connection_3:
            attempt(lambda: notify("orders", "x", connection=connection_3))
        engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg2:"))
        with engine.begin() as alchemy:
            attempt(lambda: notify("orders", "x", connection=alchemy))
        engine.dispose()
        with suppress(AssertionError):  # no stream without a log that is required
            events = stream(app.test_client(), "/sse?channel=orders&last_event_id=1", timeout=20)
            next(events)
            events.close()
    for command in (["init"], ["prune"]):
        app.test_cli_runner().invoke(args=["sse", *command])


@pytest.mark.slow
@languages
def test_a_schema_of_another_role_is_not_used(
    place: Place, make_app: MakeApp, caplog: pytest.LogCaptureFixture, language: str
) -> None:
    """It appears while the app runs, and then before it starts: the app goes on without the log, and says why."""
    app = make_app(place.app, SSE_HEARTBEAT=1)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
    assert next(events).event == "sse-open"
    execute(place.other, attack(language))
    with app.app_context():
        eventually(lambda: notify("orders", "x") is None and "no reason to trust" in caplog.text, 20)
        assert [next(events).data, notify("orders", "x")] == ["x", None]
    assert 'set SSE_LOG_OWNER = "other" in the app, or GRANT "app" TO "other"' in caplog.text
    assert [record.levelno for record in caplog.records if "no reason" in record.message] == [logging.ERROR]
    events.close()
    for required, url in (("auto", place.app), ("auto", place.superuser), (True, place.app)):
        use_everything(make_app(url, SECRET_KEY="k", SSE_EVENT_LOG=required), url)
    assert taken(place) == []
    assert 'GRANT "postgres"' not in caplog.text, "that would make the other role a superuser"
    with make_app(place.app, SSE_EVENT_LOG=True).app_context(), pytest.raises(EventLogMissing) as caught:
        notify("orders", "x")
    assert 'SSE_LOG_OWNER = "other"' in str(caught.value) and 'GRANT "app" TO "other"' in str(caught.value)
    # The functions do their harm where they are called.
    for function in ("installed_v1()", "head_v1()", "publish_v1('a', NULL, NULL)"):
        execute(place.app, f"SELECT * FROM flask_pg_sse.{function}")
    assert taken(place) == [("app", "app", "of the app")] * 3


@languages
def test_a_log_that_another_role_replaces_is_not_called(place: Place, make_app: MakeApp, language: str) -> None:
    """In one transaction of the log's owner and at once, so nobody finds that there is none in between."""
    execute(place.owner, schema_sql(["app"]))
    app = make_app(place.app, SECRET_KEY="k", SSE_HEARTBEAT=1, SSE_RETENTION=1)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
    assert next(events).event == "sse-open"
    with app.app_context(), closing(psycopg2.connect(place.app)) as connection:
        assert notify("orders", "x") is not None
        assert notify("orders", "x", connection=connection) is None
        connection.commit()
        assert [next(events).data, next(events).data] == ["x", "x"]
        execute(place.superuser, f"BEGIN; {drop_schema_sql()} SET ROLE other; {attack(language)}; COMMIT")
        attempt(lambda: notify("orders", "x", connection=connection))
        connection.rollback()
        assert taken(place) == []
    use_everything(app, place.app)
    log = app.extensions["pg_sse"].runtime.worker.engine.status
    eventually(lambda: log().position == 0, 20, "the listener has looked again")
    assert taken(place) == []
    events.close()


@pytest.mark.parametrize(
    "give",
    [
        "ALTER FUNCTION flask_pg_sse.head_v1() OWNER TO other",
        "ALTER FUNCTION flask_pg_sse.head_v1() SECURITY INVOKER",
        "ALTER FUNCTION flask_pg_sse.head_v1() SET search_path = public, pg_catalog",
        "CREATE FUNCTION flask_pg_sse.head_v1(integer) RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_functions_that_are_not_as_they_were_made(
    place: Place, make_app: MakeApp, caplog: pytest.LogCaptureFixture, give: str
) -> None:
    execute(place.superuser, schema_sql(["app"]))
    execute(place.superuser, give)
    with make_app(place.app).app_context():
        assert notify("orders", "x") is None
    assert "not as flask sse init makes them" in caplog.text and "head_v1" in caplog.text


@pytest.mark.parametrize(
    ("owner", "before", "config", "on"),
    [
        ("postgres", "", {}, True),
        ("database_owner", "", {}, True),
        ("pg_database_owner", "CREATE SCHEMA flask_pg_sse AUTHORIZATION pg_database_owner", {}, True),
        ("app", "CREATE SCHEMA flask_pg_sse AUTHORIZATION app", {}, True),
        ("migrator", "", {}, False),
        ("migrator", "GRANT app TO migrator", {}, True),
        ("migrator", "GRANT migrator TO app", {}, False),
        ("migrator", "", {"SSE_LOG_OWNER": "migrator"}, True),
        ("migrator", "", {"SSE_LOG_OWNER": "other"}, False),
    ],
)
def test_whom_an_app_trusts(
    place: Place, make_app: MakeApp, owner: str, before: str, config: dict[str, str], on: bool
) -> None:
    """`init` by one role and the app under another, on its own connections, a caller's and the listener's."""
    execute(place.superuser, before or "SELECT")
    url = {"postgres": place.superuser, "migrator": place.migrator, "app": place.app}.get(owner, place.owner)
    warnings = said(url, schema_sql(["app"], owner=config.get("SSE_LOG_OWNER")))
    owned_by = "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'flask_pg_sse'"
    assert execute(place.superuser, owned_by) == [(owner,)]
    needs = 'set SSE_LOG_OWNER = "migrator" in that app, or GRANT app TO migrator.'
    assert [needs in warning for warning in warnings] == ([] if on else [True])
    app = make_app(place.app, **config)
    with app.app_context(), closing(psycopg2.connect(place.app)) as connection:
        events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
        opened = next(events)
        assert (opened.event, bool(opened.id)) == ("sse-open", on)
        assert (notify("orders", "x") is not None) is on
        notify("orders", "of the caller's transaction", connection=connection)
        connection.commit()
        assert [next(events).data, next(events).data] == ["x", "of the caller's transaction"]
        events.close()
    assert execute(place.superuser, "SELECT count(*) FROM flask_pg_sse.event") == [(2 if on else 0,)]


def said(url: str, script: str) -> list[str]:
    with closing(connect(url)) as connection:
        run(connection, script)
        return [text for text in connection.notices if text.startswith("WARNING")]


def test_who_may_create_is_found_by_the_query_in_the_docs(place: Place) -> None:
    found = {row[0] for row in execute(place.app, SECURITY.example("roles-create"))}
    assert found & {"app", "migrator", "other", "database_owner", "postgres"} == {
        "migrator", "other", "database_owner", "postgres"
    }  # fmt: skip


def test_init_says_what_the_app_needs(place: Place, make_app: MakeApp) -> None:
    """At once, and not where the app has it already."""
    runner = make_app(place.migrator).test_cli_runner()
    result = runner.invoke(args=["sse", "init", "--grant-to", "app"])
    assert result.exit_code == 0 and "Granted to app." in result.stdout
    assert 'set SSE_LOG_OWNER = "migrator" in that app, or GRANT app TO migrator.' in result.stderr
    runner = make_app(place.migrator, SSE_LOG_OWNER="migrator").test_cli_runner()
    assert runner.invoke(args=["sse", "init", "--grant-to", "app"]).stderr == ""


def test_init_refuses_a_schema_of_another_role_in_words(place: Place, make_app: MakeApp) -> None:
    """Also where the schema is one's own, and something in it is another's."""
    execute(place.other, attack())
    execute(
        place.other,
        "CREATE FUNCTION flask_pg_sse.trap() RETURNS integer LANGUAGE sql AS 'SELECT loot.steal()';"
        "CREATE VIEW flask_pg_sse.installation AS SELECT flask_pg_sse.trap() AS version",
    )
    for url in (place.superuser, place.owner, place.migrator):
        for _ in range(2):
            result = make_app(url).test_cli_runner().invoke(args=["sse", "init"])
            (line,) = result.stderr.splitlines()
            assert result.exit_code == 1 and result.stdout == ""
            assert "belongs to other" in line and "no reason to trust" in line and "SSE_LOG_OWNER" in line
        execute(place.superuser, f"ALTER SCHEMA flask_pg_sse OWNER TO {url.partition('//')[2].partition('@')[0]}")
        result = make_app(url).test_cli_runner().invoke(args=["sse", "init"])
        assert result.exit_code == 1 and "what is in it to other" in result.stderr
        execute(place.superuser, "ALTER SCHEMA flask_pg_sse OWNER TO other")
    assert taken(place) == []


@pytest.mark.slow
def test_a_callers_role_decides_for_its_own_transaction_alone(place: Place, make_app: MakeApp) -> None:
    """The app trusts the log's owner, and the role of one transaction does not: the app's own events are logged."""
    execute(place.superuser, "GRANT app TO migrator")
    execute(place.migrator, schema_sql(["app"]))
    app = make_app(place.app)
    with app.app_context(), closing(psycopg2.connect(place.superuser)) as connection:
        assert notify("orders", "1") is not None
        with pytest.raises(EventLogMissing, match='role "postgres" has no reason to trust'):
            notify("orders", "2", connection=connection)
        connection.commit()
        assert notify("orders", "3") is not None
        connection.cursor().execute("SET ROLE app")
        assert notify("orders", "4", connection=connection) is None and logged(connection) == 3


def logged(connection: Any) -> int:
    connection.commit()
    with connection.cursor() as cursor:
        cursor.execute("RESET ROLE; SELECT count(*) FROM flask_pg_sse.event")
        (count,) = cursor.fetchone()
        cursor.execute("SET ROLE app")
    connection.commit()
    return int(count)


def test_a_role_that_is_not_trusted_any_more(
    place: Place, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the next call on; and what has become of the functions is looked at once in a minute."""
    execute(place.superuser, "GRANT app TO migrator")
    execute(place.migrator, schema_sql(["app"]))
    with make_app(place.app).app_context():
        assert notify("orders", "x") is not None
        execute(place.superuser, "REVOKE app FROM migrator")
        attempt(lambda: notify("orders", "x"))
        assert execute(place.superuser, "SELECT count(*) FROM flask_pg_sse.event") == [(1,)]
        assert "no reason to trust" in caplog.text
    monkeypatch.setattr(installation, "_CHECK_AGAIN", 0)
    with make_app(place.app, SSE_LOG_OWNER="migrator").app_context():
        assert notify("orders", "x") is not None
        execute(place.superuser, "ALTER FUNCTION flask_pg_sse.head_v1() OWNER TO other")
        assert notify("orders", "x") is None


# -- what else a database may have


def test_row_level_security_that_an_event_trigger_forces_on_every_table(place: Place, make_app: MakeApp) -> None:
    """As some hosts have it for new tables. The log's are behind functions, and `init` takes it back."""
    execute(
        place.superuser,
        """
        CREATE FUNCTION public.force_rls() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        DECLARE made record;
        BEGIN
            FOR made IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE command_tag = 'CREATE TABLE' LOOP
                EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', made.object_identity);
                EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', made.object_identity);
            END LOOP;
        END $$;
        CREATE EVENT TRIGGER force_rls ON ddl_command_end EXECUTE FUNCTION public.force_rls();
        ALTER ROLE app SET row_security = off
        """,
    )
    execute(place.owner, schema_sql(["app"]))
    everything_works(place, make_app, 2)
    execute(place.owner, "ALTER TABLE flask_pg_sse.event FORCE ROW LEVEL SECURITY")
    execute(place.owner, schema_sql())
    everything_works(place, make_app, 4)


def everything_works(place: Place, make_app: MakeApp, count: int) -> None:
    app = make_app(place.app)
    with app.app_context(), closing(psycopg2.connect(place.app)) as connection:
        log_id = notify("orders", "1")
        notify("orders", "2", connection=connection)
        connection.commit()
        events = stream(app.test_client(), f"/sse?channel=orders&last_event_id={log_id}", timeout=20)
        assert [next(events).event, next(events).data] == ["sse-open", "2"]
        events.close()
    assert "Deleted 0 events" in app.test_cli_runner().invoke(args=["sse", "prune"]).stdout
    assert execute(place.superuser, "SELECT count(*) FROM flask_pg_sse.event") == [(count,)]


def test_the_secret_key_is_replaced_under_load(place: Place, make_app: MakeApp) -> None:
    """Apps with the old key, with both, and with the new one, side by side as in a deploy: URLs and commands count."""
    execute(place.owner, schema_sql(["app"]))
    old, both, new = (
        make_app(place.app, SSE_CHANNELS=[], SECRET_KEY=key, SECRET_KEY_FALLBACKS=fallbacks)
        for key, fallbacks in (("old", []), ("new", ["old"]), ("new", []))
    )
    url = {}
    for name, app in (("old", old), ("new", new)):
        with app.test_request_context():
            url[name] = sse_url("orders", subject="ann", expires=60)
    stop = threading.Event()

    def publish() -> None:
        with both.app_context():
            while not stop.is_set():
                notify("orders", "x")

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        streams = [stream(both.test_client(), url[name], timeout=20) for name in ("old", "new") * 3]
        assert [next(one).event for one in streams] == ["sse-open"] * 6
        assert [next(one).data for one in streams] == ["x"] * 6
        with old.app_context():
            disconnect(subject="ann")
        assert [[event.event for event in one][-1] for one in streams] == ["sse-end"] * 6
        again = stream(both.test_client(), url["new"], timeout=20)
        assert next(again).event == "sse-open"
        with new.app_context():
            disconnect(subject="ann")
        assert [event.event for event in again][-1] == "sse-end"
    finally:
        stop.set()
        thread.join()
    assert new.test_client().get(url["old"]).status_code == 403
    assert old.test_client().get(url["new"]).status_code == 403
