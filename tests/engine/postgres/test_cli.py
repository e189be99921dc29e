"""`flask sse …`: what the commands do to a real database, what they say, and that every failure is one line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from click.testing import Result
from flask import Blueprint, Flask

from flask_pg_sse import PgSSE, schema_sql, sse_bp
from flask_pg_sse.engine.postgres import installation, schema
from flask_pg_sse.engine.postgres.retention import BATCH
from tests.docs.test_readme import example
from tests.support.postgres import connect, execute, login_role

MakeApp = Callable[..., Flask]


def run(app: Flask, *arguments: str) -> Result:
    return app.test_cli_runner().invoke(args=["sse", *arguments])


def ok(app: Flask, *arguments: str) -> str:
    result = run(app, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def failure(app: Flask, *arguments: str) -> str:
    """Return the one line that a failing command prints."""
    result = run(app, *arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


def shown(url: str) -> str:
    host, database = url.rpartition("@")[2].split("/")
    return f"({host}, database {database})"


def installed(url: str) -> list[Any]:
    if execute(url, "SELECT to_regnamespace('flask_pg_sse')::text") == [(None,)]:
        return []
    return [row[0] for row in execute(url, "SELECT version FROM flask_pg_sse.installation")]


def fill(url: str, count: int, age: str = "0") -> None:
    execute(
        url,
        "INSERT INTO flask_pg_sse.event SELECT nextval('flask_pg_sse.event_id'), 'orders', '{}', 'x', "
        "clock_timestamp() - %s::interval FROM generate_series(1, %s)",
        (age, count),
    )


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may connect, and nothing else."""
    with login_role(database_url, "app") as name:
        yield name


def as_role(url: str, role: str) -> str:
    return url.replace("postgres@", f"{role}:hush-hush@")


# --- where the commands are


def plain(app: Flask) -> None:
    app.register_blueprint(sse_bp)


def renamed(app: Flask) -> None:
    app.register_blueprint(sse_bp, url_prefix="/live", name="live")


def twice(app: Flask) -> None:
    app.register_blueprint(sse_bp)
    app.register_blueprint(sse_bp, url_prefix="/live", name="live")


def nested(app: Flask) -> None:
    parent = Blueprint("parent", __name__, url_prefix="/parent")
    parent.register_blueprint(sse_bp)
    app.register_blueprint(parent)


def extension(app: Flask) -> None:
    PgSSE(app, name="live")


@pytest.mark.parametrize("register", [plain, renamed, twice, nested, extension])
def test_the_commands_come_with_the_blueprint(register: Callable[[Flask], None]) -> None:
    app = Flask("tests")
    register(app)
    assert {"sse"} == set(app.cli.commands)
    assert {"init", "prune"} <= set(run(app, "--help").output.split())
    assert run(Flask("tests"), "--help").exit_code == 2


def test_the_import_starts_nothing_and_pulls_in_no_server() -> None:
    code = """if True:
        import json, sys, threading
        import flask_pg_sse
        found = {"gevent", "gunicorn", "redis", "sqlalchemy"} & sys.modules.keys()
        print(json.dumps([sorted(found), threading.active_count()]))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [[], 1]


# --- init


def test_init_installs_and_says_so(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    where = shown(database_url)
    assert ok(app, "init") == f"Installed version 1 of the event log {where}.\n"
    assert installed(database_url) == [1]
    fill(database_url, 3)
    assert ok(app, "init") == f"Version 1 of the event log is already there {where}.\n"
    assert execute(database_url, "SELECT count(*) FROM flask_pg_sse.event") == [(3,)]


def test_init_upgrades_and_leaves_what_is_newer(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(database_url)
    read = schema.read_sql
    ok(app, "init")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "VERSION", 2)
        step = "ALTER TABLE flask_pg_sse.event ADD COLUMN origin text;"
        patch.setattr(schema, "read_sql", lambda name: step if name == "schema_2.sql" else read(name))
        assert "Upgraded the event log from version 1 to version 2 " in ok(app, "init")
    assert installed(database_url) == [2]
    assert "has version 2, and this flask_pg_sse brings version 1: left as it is " in ok(app, "init")
    assert installed(database_url) == [2]


def test_init_uses_the_database_of_the_app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As streams and notify() do: Flask-SQLAlchemy's, or the environment's, or that of an extension object."""
    alchemy, environment, extension = Flask("tests"), Flask("tests"), Flask("tests")
    for app in (alchemy, environment):
        app.register_blueprint(sse_bp)
    alchemy.config["SQLALCHEMY_DATABASE_URI"] = database_url.replace("postgresql:", "postgresql+psycopg:")
    assert "Installed" in ok(alchemy, "init")
    monkeypatch.setenv("DATABASE_URL", database_url)
    assert "already there" in ok(environment, "init")
    monkeypatch.delenv("DATABASE_URL")
    PgSSE(extension, database_url=database_url)
    assert "already there" in ok(extension, "init")


def test_sql_is_printed_without_any_database(database_url: str, make_app: MakeApp) -> None:
    for app in (make_app(), make_app("postgresql://postgres@127.0.0.1:1/x")):
        assert ok(app, "init", "--sql") == schema_sql()
        script = ok(app, "init", "--sql", "--grant-to", "postgres")
        assert script == schema_sql(["postgres"])
    execute(database_url, script)
    assert installed(database_url) == [1]


def test_roles_are_let_in(database_url: str, make_app: MakeApp, role: str) -> None:
    app, theirs = make_app(database_url), make_app(as_role(database_url, role))
    said = ok(app, "init", "--grant-to", role, "--grant-to", "postgres")
    assert said == f"Installed version 1 of the event log {shown(database_url)}. Granted to {role}, postgres.\n"
    assert ok(theirs, "init") == f"Version 1 of the event log is already there {shown(database_url)}.\n"
    assert ok(theirs, "prune").startswith("Deleted 0 events")


def test_an_unknown_role_is_said_and_nothing_is_installed(database_url: str, make_app: MakeApp) -> None:
    line = failure(make_app(database_url), "init", "--grant-to", "postgres", "--grant-to", "nobody_here")
    assert line == (
        f'Error: The event log was not installed {shown(database_url)}: role "nobody_here" does not exist. Create the '
        "role first, or correct --grant-to. Nothing has been changed."
    )
    assert installed(database_url) == []
    result = run(make_app(database_url), "init", "--grant-to", "public")
    assert result.exit_code == 2 and "'public' is not one" in result.output


def test_a_role_without_the_right_learns_the_way(database_url: str, make_app: MakeApp, role: str) -> None:
    theirs = make_app(as_role(database_url, role))
    line = failure(theirs, "init")
    assert "permission denied for database" in line and '"flask sse init --sql --grant-to ROLE"' in line
    assert "hush" not in line
    assert installed(database_url) == []
    ok(make_app(database_url), "init")
    for arguments in ((), ("--grant-to", role)):
        line = failure(theirs, "init", *arguments)
        assert f"the event log belongs to postgres, and {role} may not act as that role" in line


def test_a_database_that_is_not_there_or_not_configured(make_app: MakeApp, database_url: str) -> None:
    line = failure(make_app(), "init")
    assert "No PostgreSQL database is configured" in line and "Set SSE_DATABASE_URL" in line
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        line = failure(make_app(f"postgresql://u:hush-hush@127.0.0.1:{port}/x"), "init")
    assert "cannot be reached" in line and "SSE_DATABASE_URL is right" in line and "hush" not in line
    line = failure(make_app(database_url + "_gone"), "init")
    assert "does not exist" in line
    assert "not a PostgreSQL URL (sqlite://…)" in failure(make_app("sqlite://"), "prune")


@pytest.mark.parametrize("command", ["init", "prune", "drop", "watch --list", "tail orders"])
def test_a_function_that_returns_no_url_of_postgresql_is_said(make_app: MakeApp, command: str) -> None:
    app = make_app(lambda: "mysql://me:s3cret@here/shop")
    said = failure(app, *command.split())
    assert "the result of SSE_DATABASE_URL() is not a PostgreSQL URL (mysql://…)" in said and "s3cret" not in said


def test_an_old_postgresql_is_refused(database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "OLDEST", 990000)
        line = failure(make_app(database_url), "init")
    assert "needs PostgreSQL 99 or newer, and this is 1" in line and line.endswith("the older version works too.")


def test_init_waits_for_another_one_only_so_long(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(connect(database_url)) as other, other.cursor() as cursor:
        cursor.execute("BEGIN; " + schema_sql())
        monkeypatch.setattr(installation, "_TIMEOUT", 0.2)
        line = failure(make_app(database_url), "init")
        assert "did not finish in time" in line and "pg_stat_activity" in line
        cursor.execute("COMMIT")
    monkeypatch.undo()
    assert "already there" in ok(make_app(database_url), "init")


# --- prune


def test_prune_deletes_what_is_old(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_RETENTION=3600)
    ok(app, "init")
    fill(database_url, 2 * BATCH + 1, "2 hours")
    fill(database_url, 1, "59 minutes")
    fill(database_url, 2)
    assert ok(app, "prune") == f"Deleted 10001 events older than 3600 s {shown(database_url)}.\n"
    assert ok(app, "prune", "--max-age", "3000").startswith("Deleted 1 event older than 3000 s")
    assert ok(app, "prune", "--max-age", "0").startswith("Deleted 2 events older than 0 s")
    assert execute(database_url, "SELECT count(*) FROM flask_pg_sse.event") == [(0,)]
    for wrong in ("-1", "soon", "inf"):
        assert run(app, "prune", "--max-age", wrong).exit_code == 2
    assert "out of range" in failure(app, "prune", "--max-age", "nan")


def test_prune_leaves_it_to_another_one(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    ok(app, "init")
    fill(database_url, 2, "2 days")
    with closing(connect(database_url)) as other, other.cursor() as cursor:
        cursor.execute("BEGIN; SELECT flask_pg_sse.prune_v1(interval '1 day', 1)")
        first, second = ok(app, "prune").splitlines()
        cursor.execute("COMMIT")
    assert first.startswith("Deleted 0 events older than 86400 s")
    assert second == "Another session is pruning the log at this moment, so this command stopped."
    assert ok(app, "prune").startswith("Deleted 1 event ")


def test_prune_says_that_there_is_no_log(database_url: str, make_app: MakeApp, role: str) -> None:
    app = make_app(database_url)
    assert failure(app, "prune").endswith('It is not installed there: run "flask sse init".')
    execute(database_url, "CREATE SCHEMA flask_pg_sse")
    assert failure(app, "prune").endswith('It is not installed there: run "flask sse init".')
    ok(app, "init")
    line = failure(make_app(as_role(database_url, role)), "prune")
    assert f"flask sse init --grant-to {role}" in line


# --- the README


def test_a_role_may_publish_from_sql_alone(database_url: str, make_app: MakeApp, role: str) -> None:
    """The two grants of the README, and nothing that they do not give."""
    ok(make_app(database_url), "init")
    execute(database_url, example("grant-notify").replace(" shop", f" {role}"))
    theirs = as_role(database_url, role)
    execute(theirs, "SELECT flask_pg_sse.notify('orders', '{\"id\": 7}', event => 'created')")
    assert execute(database_url, "SELECT channel, data FROM flask_pg_sse.event") == [("orders", '{"id": 7}')]
    for denied in ("SELECT flask_pg_sse.head_v1()", "SELECT * FROM flask_pg_sse.event"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            execute(theirs, denied)


# --- sign


def test_sign_prints_a_path_or_the_whole_url(make_app: MakeApp) -> None:
    key = {"SECRET_KEY": "k" * 16}
    path = ok(make_app(**key), "sign", "orders")
    assert path.startswith("/sse?channel=orders&token=")
    named = make_app(**key, SERVER_NAME="shop.example", PREFERRED_URL_SCHEME="https")
    assert ok(named, "sign", "orders", "--external").startswith("https://shop.example/sse?channel=orders&token=")
    assert ok(named, "sign", "orders").startswith("/sse?")
    elsewhere = make_app(**key, SSE_SERVER_URL="https://sse.example")
    assert ok(elsewhere, "sign", "orders", "--external").startswith("https://sse.example/?channel=orders&token=")
    line = failure(make_app(**key), "sign", "orders", "--external")
    assert line.startswith("Error: The URL was not signed: ") and "SERVER_NAME" in line
