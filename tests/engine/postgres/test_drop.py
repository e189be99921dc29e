"""`flask sse drop`: it asks, names what else would break, and takes the event log out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask

from flask_pg_sse import drop_schema_sql, notify, schema_sql, trigger_sql
from flask_pg_sse.cli.main import main
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]

OTHERS = """
    CREATE TABLE orders (id integer PRIMARY KEY);
    CREATE TABLE "Items" (id integer PRIMARY KEY);
    CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
        $$ BEGIN PERFORM flask_pg_sse.notify('items', 'x'); RETURN NULL; END $$;
    CREATE TRIGGER tell AFTER INSERT ON "Items" FOR EACH ROW EXECUTE FUNCTION tell();
    CREATE FUNCTION nightly() RETURNS void LANGUAGE sql AS $$ SELECT flask_pg_sse.notify('night', 'x') $$;
    CREATE FUNCTION unrelated() RETURNS integer LANGUAGE sql AS 'SELECT 1';
    CREATE VIEW recent AS SELECT id, channel FROM flask_pg_sse.event;
    CREATE VIEW newest AS SELECT max(id) AS id FROM recent;
    CREATE RULE told AS ON DELETE TO "Items" DO ALSO SELECT flask_pg_sse.notify('items', 'gone');
"""


def sse(app: Flask, *arguments: str, answer: str | None = None) -> tuple[int, list[str]]:
    result = app.test_cli_runner().invoke(args=["sse", *arguments], input=answer)
    return result.exit_code, result.output.splitlines()


def is_there(url: str) -> bool:
    return execute(url, "SELECT to_regnamespace('flask_pg_sse') IS NOT NULL") == [(True,)]


def test_it_names_what_would_break_and_asks(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    execute(database_url, schema_sql() + OTHERS + trigger_sql("orders"))
    code, said = sse(app, "drop", answer="n\n")
    assert code == 1 and is_there(database_url)
    assert said[1:-2] == [
        'Is dropped with it: rule told on table public."Items".',
        "Is dropped with it: view public.newest.",
        "Is dropped with it: view public.recent.",
        "Goes on without the log, by NOTIFY: the changes of public.orders (flask sse unwatch).",
        "Fails afterwards: public.nightly(), if it calls the log.",
        'Fails afterwards: writing to public."Items", whose triggers call public.tell().',
    ]
    code, said = sse(app, "drop", answer="y\n")
    assert code == 0 and said[-1] == "Dropped the event log." and not is_there(database_url)
    assert execute(database_url, "INSERT INTO orders VALUES (1); SELECT to_regclass('newest')::text") == [(None,)]
    assert execute(database_url, 'SELECT count(*) FROM "Items"') == [(0,)]
    code, said = sse(app, "drop")
    assert code == 0 and said[0].startswith("There is no event log (")


BY_TYPE = """
    CREATE TABLE archive (number integer, kept flask_pg_sse.event);
    CREATE TABLE bundles (number integer, kept flask_pg_sse.event[]);
    CREATE VIEW kept_ids AS SELECT number, (kept).id FROM archive;
    CREATE INDEX archive_kept ON archive (kept);
    CREATE FUNCTION newest() RETURNS SETOF flask_pg_sse.event LANGUAGE sql AS 'SELECT * FROM flask_pg_sse.event';
    CREATE FUNCTION id_of(flask_pg_sse.event) RETURNS bigint LANGUAGE sql AS 'SELECT $1.id';
    CREATE DOMAIN checked AS flask_pg_sse.event;
    CREATE TABLE checks (found checked);
    CREATE TYPE pair AS (number integer, kept flask_pg_sse.event);
    CREATE TABLE heirs (more text) INHERITS (flask_pg_sse.event);
    CREATE TABLE alike (LIKE flask_pg_sse.event);
    CREATE TABLE referring (id bigint REFERENCES flask_pg_sse.event);
"""


def test_it_names_what_has_the_type_of_the_logs_rows(database_url: str, make_app: MakeApp) -> None:
    execute(database_url, schema_sql() + BY_TYPE)
    _, said = sse(make_app(database_url), "drop", answer="n\n")
    assert sorted(said[1:-2]) == [
        "Is dropped with it: column found of table public.checks.",
        "Is dropped with it: column kept of composite type public.pair.",
        "Is dropped with it: column kept of table public.archive.",
        "Is dropped with it: column kept of table public.bundles.",
        "Is dropped with it: constraint referring_id_fkey on table public.referring.",
        "Is dropped with it: function public.id_of(flask_pg_sse.event).",
        "Is dropped with it: function public.newest().",
        "Is dropped with it: table public.heirs.",
        "Is dropped with it: type public.checked.",
        "Is dropped with it: view public.kept_ids.",
    ]


def test_nothing_is_asked_with_yes_and_nothing_is_said_of_the_logs_own(database_url: str, make_app: MakeApp) -> None:
    execute(database_url, schema_sql())
    code, said = sse(make_app(database_url), "drop", "--yes")
    assert code == 0 and [line.split(" (")[0] for line in said] == [
        "This deletes the event log with all its events",
        "Dropped the event log.",
    ]
    assert not is_there(database_url)
    assert sse(make_app(), "drop", "--sql") == (0, drop_schema_sql().splitlines())


def test_the_commands_are_there_without_an_app() -> None:
    assert {"drop", "erase", "unwatch", "watch"} <= main.commands.keys()


def test_connected_apps_are_told_of(database_url: str, make_app: MakeApp) -> None:
    execute(database_url, schema_sql())
    app = make_app(database_url)
    with app.app_context():
        notify("orders", "x")
        code, said = sse(app, "drop", "--yes")
    assert code == 0 and any(line.startswith("Apps are connected (") for line in said)


@pytest.mark.parametrize("yes", [True, False])
def test_a_role_that_does_not_own_the_log(database_url: str, make_app: MakeApp, yes: bool) -> None:
    execute(database_url, schema_sql() + "CREATE ROLE guest LOGIN")
    try:
        app = make_app(database_url.replace("postgres@", "guest@"))
        code, said = sse(app, "drop", *["--yes"] * yes, answer="y\n")
        assert code == 1 and "must be owner of schema flask_pg_sse" in said[-1] and "Run it as the role" in said[-1]
        assert is_there(database_url)
    finally:
        execute(database_url, "DROP ROLE guest")
