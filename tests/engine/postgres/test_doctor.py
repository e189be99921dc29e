"""`flask sse doctor`: each fault of the configuration, the database and the log is planted, found, and cured.

The cure is what doctor says, carried out; then it says nothing any more.
"""

from __future__ import annotations

import shlex
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask

from flask_pg_sse.cli.doctor import checks, event_log, setup
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import stream
from tests.engine.postgres.test_notify_blocked import asleep, fill
from tests.support.client import eventually
from tests.support.clock import needs_faketime, postgres_with_a_clock
from tests.support.cluster import Cluster
from tests.support.doctor import doctor, found
from tests.support.link import Link, through
from tests.support.log import PUBLISH, WAIT_FOR_A_STANDBY, InThread, connected, run, standby_away
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Running, execute, fresh_database, login_role
from tests.support.slow import but_one_slow
from tools import postgres

MakeApp = Callable[..., Flask]
# What an app has that wants no remedy.
HEALTHY = {"SECRET_KEY": "s3cret-key", "SSE_CHANNELS": ["orders"]}


def init(app: Flask, *options: str) -> None:
    result = app.test_cli_runner().invoke(args=["sse", "init", *options])
    assert result.exit_code == 0, result.output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory where no gunicorn runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def healthy(logged_url: str, make_app: MakeApp) -> Flask:
    return make_app(logged_url, **HEALTHY)


def test_a_healthy_setup_gives_no_warning(healthy: Flask) -> None:
    answer = doctor(healthy)
    assert answer.status == 0 and not answer.bad()
    asked = {line["name"] for line in answer.lines}
    assert asked >= {"settings", "database", "listen", "event log", "publishing", "pruning", "listeners"}


def test_a_person_gets_a_line_for_each_check_and_the_remedy_below(healthy: Flask) -> None:
    healthy.config["SSE_CHANNEL"] = "orders"
    result = healthy.test_cli_runner().invoke(args=["sse", "doctor"])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("warning settings: 'SSE_CHANNEL' is not"))
    assert lines[at + 1] == "        Remedy: Correct the key, or remove it."
    assert any(line.startswith("ok      database: PostgreSQL ") for line in lines)


# --- configuration


def test_unknown_key(healthy: Flask) -> None:
    healthy.config["SSE_CHANNEL"] = "orders"
    found(doctor(healthy), "settings", "warning", "'SSE_CHANNEL'", "Did you mean SSE_CHANNELS?")
    del healthy.config["SSE_CHANNEL"]
    assert doctor(healthy).status == 0


def test_a_value_that_cannot_be_read(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url, **HEALTHY)
    app.config["SSE_RETENTION"] = "a day"
    answer = doctor(app)
    found(answer, "settings", "fault", "SSE_RETENTION is 'a day'")
    assert not answer.of("database") and not answer.of("channels"), "they cannot be looked at"


def test_a_value_that_cannot_be_read_and_a_proxy(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url, **HEALTHY)
    app.config["SSE_HEARTBEAT"] = "often"
    found(doctor(app, "--url", "http://127.0.0.1:1"), "settings", "fault", "SSE_HEARTBEAT is 'often'")


def test_no_key(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url, SSE_CHANNELS=["orders"])
    line = found(doctor(app), "secret key", "warning", "no secret key")
    assert "SECRET_KEY" in line["remedy"]
    assert doctor(make_app(logged_url, **HEALTHY)).status == 0


@pytest.mark.parametrize("pattern", but_one_slow(["*", "**", "?*"]))
def test_channels_open_to_all(logged_url: str, make_app: MakeApp, pattern: str) -> None:
    app = make_app(logged_url, SECRET_KEY="s3cret-key", SSE_CHANNELS=[pattern])
    assert "SSE_CHANNELS" in found(doctor(app), "channels", "warning", "open to everybody")["remedy"]


def test_channels_open_to_nobody(logged_url: str, make_app: MakeApp) -> None:
    answer = doctor(make_app(logged_url, SSE_CHANNELS=None))
    found(answer, "channels", "fault", "No channel is open to anybody")
    assert doctor(make_app(logged_url, **HEALTHY)).status == 0


def test_the_engine_for_tests(make_app: MakeApp) -> None:
    answer = doctor(make_app(SSE_BROKER_URL="memory://", **HEALTHY))
    found(answer, "broker", "fault", "memory://")
    assert not answer.of("database")


def test_poll(logged_url: str, make_app: MakeApp) -> None:
    line = found(doctor(make_app(logged_url, SSE_LISTEN_URL="poll", **HEALTHY)), "listen address", "warning", "poll")
    assert "direct connection" in line["remedy"]
    assert doctor(make_app(logged_url, SSE_LISTEN_URL=logged_url, **HEALTHY)).status == 0


# --- the database


def test_no_database(make_app: MakeApp, logged_url: str) -> None:
    answer = doctor(make_app(**HEALTHY))
    assert (
        "Set SSE_DATABASE_URL" in found(answer, "database", "fault", "No PostgreSQL database is configured")["remedy"]
    )
    assert not {"listen", "event log", "publishing"} & {line["name"] for line in answer.lines}, "they need it"


def test_a_database_that_cannot_be_reached(make_app: MakeApp, logged_url: str) -> None:
    port = logged_url.rpartition(":")[2].partition("/")[0]
    answer = doctor(make_app(logged_url.replace(port, "1"), **HEALTHY))
    line = found(answer, "database", "fault", "cannot be reached", "Connection refused")
    assert "SSE_DATABASE_URL is right" in line["remedy"]


def test_a_host_that_is_not_known(make_app: MakeApp, logged_url: str) -> None:
    host = logged_url.partition("@")[2].partition(":")[0]
    answer = doctor(make_app(logged_url.replace(host, "db.invalid"), **HEALTHY))
    line = found(answer, "database", "fault", "cannot be reached", "the host name 'db.invalid' cannot be resolved")
    assert "SSE_DATABASE_URL is right" in line["remedy"]


@pytest.mark.slow
def test_a_database_that_is_silent_costs_seconds(make_app: MakeApp, logged_url: str) -> None:
    with closing(__import__("socket").create_server(("127.0.0.1", 0))) as silent:
        answer = doctor(make_app(f"postgresql://a@127.0.0.1:{silent.getsockname()[1]}/a", **HEALTHY))
    found(answer, "database", "fault", "no answer in time")
    assert answer.seconds < 10


@pytest.fixture
def role(logged_url: str) -> Iterator[str]:
    with login_role(logged_url, "app") as name:
        yield name


@pytest.mark.slow
def test_wrong_password(own_postgres: postgres.Server, make_app: MakeApp) -> None:
    url = own_postgres.url()
    execute(url, schema_sql())
    execute(url, "CREATE ROLE app LOGIN PASSWORD 'hush-hush' SUPERUSER")
    rules = own_postgres.data_dir / "pg_hba.conf"
    rules.write_text("host all app 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    execute(url, "SELECT pg_reload_conf()")
    app = make_app(url.replace("postgres@", "app:s3cret-password@"), **HEALTHY)
    line = found(doctor(app), "database", "fault", 'password authentication failed for user "app"')
    assert "SSE_DATABASE_URL" in line["remedy"]
    assert doctor(make_app(url.replace("postgres@", "app:hush-hush@"), **HEALTHY)).status == 0


def test_several_hosts(logged_url: str, make_app: MakeApp) -> None:
    host = logged_url.partition("@")[2].partition("/")[0]
    several = logged_url.replace(host, f"{host},{host}")
    line = found(doctor(make_app(several, **HEALTHY)), "hosts", "warning", "SSE_DATABASE_URL names several hosts")
    assert "?target_session_attrs=primary" in line["remedy"]
    assert doctor(make_app(f"{several}?target_session_attrs=primary", **HEALTHY)).status == 0


def test_a_url_that_a_function_returns(logged_url: str, make_app: MakeApp) -> None:
    host = logged_url.partition("@")[2].partition("/")[0]
    several = logged_url.replace(host, f"{host},{host}")
    found(doctor(make_app(lambda: several, **HEALTHY)), "hosts", "warning", "names several hosts")
    assert doctor(make_app(lambda: logged_url, **HEALTHY)).status == 0

    def fails() -> str:
        raise ValueError("s3cret-password")

    line = found(doctor(make_app(fails, **HEALTHY)), "database", "fault", "function in SSE_DATABASE_URL failed")
    assert line["remedy"]
    answer = doctor(make_app(logged_url, SSE_LISTEN_URL=lambda: "poll", **HEALTHY))
    line = found(answer, "listen", "fault", "result of SSE_LISTEN_URL() is not a PostgreSQL URL")
    assert line["remedy"].startswith("Set SSE_LISTEN_URL to ") and len(answer.bad()) == 1


@pytest.mark.slow
def test_a_standby(cluster: Cluster, make_app: MakeApp) -> None:
    execute(cluster.primary.url(), schema_sql())
    standby = cluster.standby()
    answer = doctor(make_app(standby.url(), **HEALTHY))
    line = found(answer, "primary", "fault", "is a standby")
    assert len(answer.bad()) == 1, "once"
    assert "SSE_DATABASE_URL" in line["remedy"] and "target_session_attrs=primary" in line["remedy"]
    both = f"{standby.url()}?host={postgres.HOST}:{standby.port}&host={postgres.HOST}:{cluster.primary.port}"
    assert doctor(make_app(f"{both}&target_session_attrs=primary", **HEALTHY)).status == 0
    answer = doctor(make_app(cluster.primary.url(), SSE_LISTEN_URL=standby.url(), **HEALTHY))
    found(answer, "listen", "fault", "is a standby")
    assert len(answer.bad()) == 1, "once"


def test_a_role_that_is_read_only(logged_url: str, role: str, make_app: MakeApp) -> None:
    execute(logged_url, f"ALTER ROLE {role} SUPERUSER")
    execute(logged_url, f"ALTER ROLE {role} SET default_transaction_read_only = on")
    app = make_app(logged_url.replace("postgres@", f"{role}@"), **HEALTHY)
    line = found(doctor(app), "primary", "warning", f"role {role} are read-only")
    execute(logged_url, line["remedy"].partition(";")[0])
    assert doctor(app).status == 0


def test_the_remedies_hold_for_a_role_with_any_name(logged_url: str, make_app: MakeApp) -> None:
    with login_role(logged_url, "Bob's shop-app") as name:
        execute(logged_url, f'ALTER ROLE "{name}" SET default_transaction_read_only = on')
        app = make_app(logged_url.replace("postgres@", f"{quote(name)}:hush-hush@"), **HEALTHY)
        answer = doctor(app)
        execute(logged_url, found(answer, "primary", "warning", "read-only")["remedy"].partition(";")[0])
        line = found(answer, "event log", "fault", "may not use it")
        command = line["remedy"].removeprefix("Run flask sse ").partition(", run by")[0]
        assert make_app(logged_url).test_cli_runner().invoke(args=["sse", *shlex.split(command)]).exit_code == 0
        assert doctor(app).status == 0


@pytest.mark.slow
def test_an_unsteady_address(cluster: Cluster, running_postgres: Running, make_app: MakeApp) -> None:
    """A load balancer before two servers, each of which is a primary."""
    with running_postgres() as other:
        for server in (cluster.primary, other):
            execute(server.url(), schema_sql())
        ports = [cluster.primary.port, other.port]
        with Link(cluster.primary.port) as balancer:
            balancer.lead_in_turn(ports)
            app = make_app(through(balancer, cluster.primary.url()), **HEALTHY)
            line = found(doctor(app), "address", "fault", "now to one server, now to another")
            assert "the primary alone" in line["remedy"]
        assert doctor(make_app(cluster.primary.url(), **HEALTHY)).status == 0


def test_another_database_for_listen(postgres_server: postgres.Server, logged_url: str, make_app: MakeApp) -> None:
    with fresh_database(postgres_server) as other:
        answer = doctor(make_app(logged_url, SSE_LISTEN_URL=other, **HEALTHY))
        line = found(answer, "address", "fault", "does not arrive from the other")
        assert "Set SSE_LISTEN_URL to a direct connection to the database of SSE_DATABASE_URL" in line["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize("logged", [True, False], ids=["log", "no log"])
def test_pgbouncer_in_transaction_mode(postgres_server: postgres.Server, make_app: MakeApp, logged: bool) -> None:
    with fresh_database(postgres_server, logged=logged) as url, pgbouncer(url) as pooled:
        answer = doctor(make_app(pooled, **HEALTHY))
        line = found(answer, "listen", "warning" if logged else "fault", "LISTEN receives nothing", "PgBouncer")
        assert "SSE_LISTEN_URL to a direct connection" in line["remedy"]
        cured = doctor(make_app(pooled, SSE_LISTEN_URL=url, **HEALTHY))
        assert not [bad for bad in cured.bad() if "event log" not in bad], cured.output
        assert (cured.status == 0) == logged


@needs_faketime
@pytest.mark.slow
def test_clocks_that_differ(running_postgres: Running, make_app: MakeApp) -> None:
    with postgres_with_a_clock(running_postgres) as (url, put_off):
        execute(url, schema_sql())
        app = make_app(url, **HEALTHY)
        put_off("-3600")
        line = found(doctor(app), "clock", "warning", "3600 s behind")
        assert "NTP" in line["remedy"]
        put_off("+0")
        assert doctor(app).status == 0


@pytest.mark.slow
def test_a_queue_that_fills_and_one_that_is_full(running_postgres: Running, make_app: MakeApp) -> None:
    with running_postgres(max_notify_queue_pages="64") as server:
        execute(server.url(), schema_sql())
        app = make_app(server.url(), **HEALTHY)
        with asleep(server.url()) as sleeper:
            execute(server.url(), "SELECT pg_notify('filler', n || repeat('x', 7000)) FROM generate_series(1, 20) AS n")
            line = found(doctor(app), "notify queue", "warning", f"session {sleeper.info.backend_pid} of role",
                         '(application_name "sleeper", idle in transaction, for ')  # fmt: skip
            fill(server.url())
            answer = doctor(app)
            line = found(answer, "notify queue", "fault", f"session {sleeper.info.backend_pid} of role")
            found(answer, "publishing", "fault", "queue of notifications is full")
            assert "pg_terminate_backend()" in line["remedy"]
            execute(server.url(), "SELECT pg_terminate_backend(%s)", (sleeper.info.backend_pid,))
            eventually(lambda: doctor(app).status == 0, 10)


# --- the log


def test_a_missing_log(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, **HEALTHY)
    line = found(doctor(app), "event log", "warning", "has no event log")
    assert line["remedy"].startswith("Run flask sse init.")
    required = make_app(database_url, SSE_EVENT_LOG=True, **HEALTHY)
    found(doctor(required), "event log", "fault", "SSE_EVENT_LOG is true")
    polls = make_app(database_url, SSE_LISTEN_URL="poll", **HEALTHY)
    found(doctor(polls), "event log", "fault", 'SSE_LISTEN_URL is "poll", and the database has no event log')
    assert doctor(make_app(database_url, SSE_EVENT_LOG=False, **HEALTHY)).status == 0
    init(app)
    assert doctor(app).status == doctor(required).status == 0


def test_an_older_log(logged_url: str, healthy: Flask) -> None:
    execute(logged_url, "UPDATE flask_pg_sse.installation SET version = version - 1")
    line = found(doctor(healthy), "event log", "fault", "has version 0")
    assert line["remedy"] == "Run flask sse init."
    execute(logged_url, "UPDATE flask_pg_sse.installation SET version = version + 1")


def test_a_newer_log(logged_url: str, healthy: Flask) -> None:
    execute(logged_url, "UPDATE flask_pg_sse.installation SET version = version + 1")
    line = found(doctor(healthy), "event log", "warning", "knows version")
    assert "Upgrade flask_pg_sse" in line["remedy"]


def test_a_missing_grant(logged_url: str, role: str, make_app: MakeApp) -> None:
    theirs = make_app(logged_url.replace("postgres@", f"{role}:hush-hush@"), **HEALTHY)
    line = found(doctor(theirs), "event log", "fault", "may not use it")
    assert f"flask sse init --grant-to {role}" in line["remedy"]
    init(make_app(logged_url), "--grant-to", role)
    assert doctor(theirs).status == 0


def test_a_grant_of_one_function_alone(logged_url: str, role: str, make_app: MakeApp) -> None:
    execute(logged_url, f"GRANT USAGE ON SCHEMA flask_pg_sse TO {role}")
    execute(logged_url, f"GRANT EXECUTE ON FUNCTION flask_pg_sse.installed_v1() TO {role}")
    theirs = make_app(logged_url.replace("postgres@", f"{role}:hush-hush@"), **HEALTHY)
    line = found(doctor(theirs), "publishing", "fault", "may not send events through the log")
    assert "--grant-to" in line["remedy"]
    init(make_app(logged_url), "--grant-to", role)
    assert doctor(theirs).status == 0


def test_an_owner_that_is_not_trusted(database_url: str, make_app: MakeApp) -> None:
    migrator, app_role = (f"{name}_{uuid.uuid4().hex[:8]}" for name in ("migrator", "app"))
    database = database_url.rpartition("/")[2]
    execute(database_url, f"CREATE ROLE {migrator} LOGIN; CREATE ROLE {app_role} LOGIN")
    execute(database_url, f"GRANT CREATE ON DATABASE {database} TO {migrator}")
    try:
        init(make_app(database_url.replace("postgres@", f"{migrator}@")), "--grant-to", app_role)
        theirs = database_url.replace("postgres@", f"{app_role}@")
        line = found(doctor(make_app(theirs, **HEALTHY)), "event log", "fault", "has no reason to trust")
        assert f'SSE_LOG_OWNER = "{migrator}"' in line["remedy"]
        assert doctor(make_app(theirs, SSE_LOG_OWNER=migrator, **HEALTHY)).status == 0
    finally:
        execute(database_url, f"DROP OWNED BY {migrator}, {app_role} CASCADE; DROP ROLE {migrator}, {app_role}")


@pytest.mark.slow
def test_a_transaction_that_blocks_publishers(logged_url: str, healthy: Flask) -> None:
    with connected(f"{logged_url}?application_name=nightly") as holder:
        run(holder, PUBLISH, ("orders", ["{}"], ["holds it"]))
        pid = holder.info.backend_pid
        answer = doctor(healthy)
        line = found(answer, "publishing", "fault", f"session {pid} of role", '"nightly", idle in transaction')
        assert "pg_terminate_backend()" in line["remedy"]
        execute(logged_url, "SELECT pg_terminate_backend(%s)", (pid,))
    eventually(lambda: doctor(healthy).status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("logged", [True, False], ids=["log", "no log"])
def test_a_commit_that_blocks_publishers(own_postgres: postgres.Server, make_app: MakeApp, logged: bool) -> None:
    url = own_postgres.url()
    if logged:
        execute(url, schema_sql())
    app = make_app(url, **HEALTHY, SSE_EVENT_LOG=logged)
    with standby_away(own_postgres):
        line = found(doctor(app), "synchronous standby", "fault", "none is connected")
        assert "synchronous_standby_names" in line["remedy"]
        hanging = InThread(execute, url, "CREATE TABLE written (); NOTIFY orders, 'hangs'")
        [(holder,)] = eventually(lambda: execute(url, WAIT_FOR_A_STANDBY))
        line = found(doctor(app), "publishing", "fault", f"session {holder} of role", "synchronous standby")
        assert "synchronous_standby_names" in line["remedy"]
    hanging.join()
    assert doctor(app).status == 0


def old_events(url: str, count: int, age: str) -> None:
    execute(
        url,
        "INSERT INTO flask_pg_sse.event SELECT flask_pg_sse.draw_v1(1), 'orders', '{}', 'x', clock_timestamp() - "
        "%s::interval FROM generate_series(1, %s)",
        (age, count),
    )


def test_pruning_that_does_not_happen(logged_url: str, healthy: Flask) -> None:
    old_events(logged_url, 10, "2 days")
    line = found(doctor(healthy), "pruning", "warning", "48.0 h old, and SSE_RETENTION is 24.0 h", "Nothing prunes")
    assert "flask sse prune" in line["remedy"]
    assert healthy.test_cli_runner().invoke(args=["sse", "prune"]).exit_code == 0
    assert doctor(healthy).status == 0


def test_pruning_that_is_held_up(logged_url: str, healthy: Flask) -> None:
    old_events(logged_url, 10, "2 days")
    with connected(f"{logged_url}?application_name=stuck") as holder:
        run(holder, "SELECT flask_pg_sse.prune_v1('3 days', 1)")
        pid = holder.info.backend_pid
        line = found(doctor(healthy), "pruning", "warning", f"held by session {pid} of role", '"stuck"')
        assert "pg_terminate_backend()" in line["remedy"]
        # It waits for the session's end, at most 10 s: before that, pruning would leave the events to that session.
        assert execute(logged_url, "SELECT pg_terminate_backend(%s, 10000)", (pid,)) == [(True,)]
    assert healthy.test_cli_runner().invoke(args=["sse", "prune"]).exit_code == 0
    assert doctor(healthy).status == 0


@pytest.mark.slow
@pytest.mark.parametrize("kept_by", ["transaction", "prepared transaction", "autovacuum off"])
def test_a_log_that_outgrows_its_events(
    running_postgres: Running, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, kept_by: str
) -> None:
    monkeypatch.setattr(event_log, "_OLD", 0.0)
    with running_postgres(max_prepared_transactions="2", autovacuum="off") as server:
        url = server.url()
        execute(url, schema_sql())
        app = make_app(url, **HEALTHY)
        with connected(f"{url}?application_name=report") as reader:
            if kept_by == "transaction":
                reader.set_session(isolation_level="REPEATABLE READ")
                run(reader, "SELECT count(*) FROM flask_pg_sse.event")
                words = [f"session {reader.info.backend_pid} of role", '"report"']
            elif kept_by == "prepared transaction":
                run(reader, "CREATE TABLE left_over (); PREPARE TRANSACTION 'forgotten'")
                words = ["the prepared transaction 'forgotten'"]
            else:
                words = ["autovacuum is off"]
            old_events(url, 12_000, "2 days")
            assert app.test_cli_runner().invoke(args=["sse", "prune"]).exit_code == 0
            eventually(lambda: execute(url, "SELECT n_dead_tup > 10000 FROM pg_stat_all_tables WHERE relname = 'event'")
                       == [(True,)], 20)  # fmt: skip
            line = found(doctor(app), "log size", "warning", *words)
            if kept_by == "prepared transaction":
                execute(url, "ROLLBACK PREPARED 'forgotten'")
            reader.rollback()
        assert line["remedy"]
        execute(url, "VACUUM flask_pg_sse.event")
        eventually(lambda: doctor(app).status == 0, 20)  # up to version 14, the statistics come half a second later


def test_rows_left_in_pending(logged_url: str, healthy: Flask) -> None:
    execute(logged_url, "SET session_replication_role = replica; SELECT flask_pg_sse.notify('orders', 'lost')")
    line = found(doctor(healthy), "log tables", "warning", "stay in flask_pg_sse.pending and were never sent (1)")
    execute(logged_url, line["remedy"].partition("and ")[2].partition(".")[0] + ".pending")
    assert doctor(healthy).status == 0


@pytest.mark.parametrize(
    "left",
    [
        "ALTER TABLE flask_pg_sse.event ENABLE TRIGGER replicated",
        "ALTER TABLE flask_pg_sse.pending DISABLE TRIGGER publish",
        "DROP INDEX flask_pg_sse.retention_has_one_row; ALTER TABLE flask_pg_sse.retention DISABLE TRIGGER one_row; "
        "INSERT INTO flask_pg_sse.retention SELECT * FROM flask_pg_sse.retention; "
        "ALTER TABLE flask_pg_sse.retention ENABLE ALWAYS TRIGGER one_row",
    ],
    ids=["trigger", "trigger off", "two rows"],
)
def test_what_a_restore_leaves(logged_url: str, healthy: Flask, left: str) -> None:
    execute(logged_url, left)
    line = found(doctor(healthy), "log tables", "fault")
    assert line["remedy"] == "Run flask sse init."
    init(healthy)
    assert doctor(healthy).status == 0


def test_a_sequence_behind_the_log(logged_url: str, healthy: Flask) -> None:
    """Events of a server whose clock was ahead were restored into this one."""
    old_events(logged_url, 1, "1 minute")
    execute(logged_url, "UPDATE flask_pg_sse.event SET id = id + 3600 * 4000000::bigint")
    line = found(doctor(healthy), "log tables", "fault", "behind the last event")
    execute(logged_url, line["remedy"].partition(", as")[0])
    assert doctor(healthy).status == 0


# --- the workers


def test_a_listener_that_is_awake(healthy: Flask) -> None:
    with closing(stream(healthy.test_client(), "/sse?channel=orders")) as events:
        assert next(events).event == "sse-open"
        answer = doctor(healthy)
        found(answer, "listeners", "ok", "Listeners, of all hosts: 1.")
        assert answer.status == 0


# --- doctor itself


def test_the_log_examines_its_tables_once(healthy: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = setup.Setup.execute

    def execute(self: setup.Setup, query: str, *args: Any, **options: Any) -> Any:
        asked.append(query)
        return ask(self, query, *args, **options)

    monkeypatch.setattr(setup.Setup, "execute", execute)
    assert doctor(healthy).status == 0
    assert sum("examine_v1" in query for query in asked) == 1


def test_each_check_has_a_limit_and_none_can_break_the_others(healthy: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, asked = checks.LIMIT, threading.Event()

    def hangs(setup: Any) -> None:
        monkeypatch.setattr(checks, "LIMIT", limit)  # the others have their time, on a busy machine too
        asked.wait(60)

    def breaks(setup: Any) -> None:
        raise ValueError("s3cret-password")

    monkeypatch.setattr(checks, "LIMIT", 0.5)
    monkeypatch.setattr(checks, "CHECKS", {"hangs": hangs, "breaks": breaks, **checks.CHECKS})
    answer = doctor(healthy)
    asked.set()
    found(answer, "hangs", "fault", "within 0.5 s")
    found(answer, "breaks", "fault", "ValueError")
    assert len(answer.bad()) == 2 and answer.of("log size")


def test_a_role_with_no_rights_at_all_gets_lines_and_no_traceback(
    logged_url: str, role: str, make_app: MakeApp
) -> None:
    theirs = make_app(logged_url.replace("postgres@", f"{role}:hush-hush@"), **HEALTHY)
    answer = doctor(theirs)
    assert [bad for bad in answer.bad() if "may not use it" in bad] == answer.bad()
    assert not [line for line in answer.lines if "check itself failed" in line["text"]]
