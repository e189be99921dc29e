"""While nobody can notify: PostgreSQL's queue of notifications is full, or a commit with NOTIFY does not end."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import DatabaseUnavailable, notify
from flask_pg_sse.engine.postgres import pool
from flask_pg_sse.engine.postgres.obstacle import Obstacle
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.client import eventually
from tests.support.log import PUBLISH, WAIT_FOR_A_STANDBY, InThread, standby_away
from tests.support.postgres import Running, connect, execute
from tools import postgres

MakeApp = Callable[..., Flask]
LISTENER = "SELECT pid FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener'"


@contextmanager
def opened(app: Flask, channel: str) -> Iterator[Iterator[Received]]:
    with closing(stream(app.test_client(), f"/sse?channel={channel}", timeout=30)) as events:
        assert next(events).event == "sse-open"
        # Heartbeats may bring an id.
        yield (event for event in events if not (event.event or "").startswith("sse-"))


def warnings(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    said = [record.getMessage() for record in list(caplog.records) if record.levelno == logging.WARNING]
    return [text for text in said if text.startswith(beginning)]


def beats_of(app: Flask) -> int:
    """How many beats the listener has tried to send."""
    sent: int = app.extensions["pg_sse"].runtime.worker.engine._listener._control.beats
    return sent


@contextmanager
def asleep(url: str) -> Iterator[Any]:
    """A session that listens, and sleeps in a transaction."""
    with closing(psycopg2.connect(f"{url}?application_name=sleeper")) as sleeper, sleeper.cursor() as cursor:
        cursor.execute("LISTEN anything")
        sleeper.commit()
        cursor.execute("SELECT 1")
        yield sleeper


def fill(url: str) -> None:
    """Notify until the queue of notifications is full."""
    query = "SELECT pg_notify('filler', n || repeat('x', 7000)) FROM generate_series(1, 10) AS n"
    with (
        closing(connect(url)) as sender,
        sender.cursor() as cursor,
        pytest.raises(psycopg2.errors.ProgramLimitExceeded),
    ):
        while True:
            cursor.execute(query)


@pytest.mark.slow
@pytest.mark.parametrize("with_log", [True, False], ids=["log", "no log"])
def test_a_full_queue_costs_no_connection_and_no_stream_and_comes_to_an_end(
    running_postgres: Running, make_app: MakeApp, caplog: pytest.LogCaptureFixture, with_log: bool
) -> None:
    with running_postgres(max_notify_queue_pages="64") as server:
        if with_log:
            execute(server.url(), schema_sql())
        app = make_app(server.url(), SSE_HEARTBEAT=0.3)
        with app.app_context(), opened(app, "orders") as events:
            pid = execute(server.url(), LISTENER)
            with asleep(server.url()) as sleeper:
                holder = sleeper.info.backend_pid
                fill(server.url())
                eventually(lambda: warnings(caplog, "PostgreSQL's queue of notifications is full"), 20)
                beats = beats_of(app)
                with opened(app, "other") as others:
                    eventually(lambda: beats_of(app) > beats + 1, 20)
                    with opened(app, "third"):
                        assert execute(server.url(), LISTENER) == pid
                    sleeper.rollback()
                    # Nobody else moves the queue on.
                    eventually(lambda: warnings(caplog, "Transactions that notify can commit again"), 20)
                    for channel, heard in [("orders", events), ("other", others)]:
                        notify(channel, "after")
                        assert next(heard).data == "after"
            assert execute(server.url(), LISTENER) == pid
        app.extensions["pg_sse"].close()
    [full] = warnings(caplog, "PostgreSQL's queue of notifications is full")
    assert f"session {holder} of role" in full and '"sleeper", idle in transaction' in full
    assert not warnings(caplog, "Lost the listener's connection")


@pytest.mark.slow
@pytest.mark.parametrize("with_log", [True, False], ids=["log", "no log"])
def test_a_commit_that_waits_for_a_standby_costs_no_connection_and_no_stream(
    own_postgres: postgres.Server, make_app: MakeApp, caplog: pytest.LogCaptureFixture, with_log: bool
) -> None:
    url = own_postgres.url()
    if with_log:
        execute(url, schema_sql())
    app = make_app(url, SSE_HEARTBEAT=0.3)
    with opened(app, "orders") as events:
        pid = execute(url, LISTENER)
        with standby_away(own_postgres):
            if with_log:
                hanging = InThread(execute, url, PUBLISH, ("orders", ["{}"], ["hangs"]))
            else:
                hanging = InThread(execute, url, "CREATE TABLE written (); NOTIFY orders, 'hangs'")
            [(holder,)] = eventually(lambda: execute(url, WAIT_FOR_A_STANDBY))
            eventually(lambda: warnings(caplog, "No transaction that notifies can commit"), 20)
            beats = beats_of(app)
            with opened(app, "other"):
                eventually(lambda: beats_of(app) > beats + 3, 20)
                with opened(app, "third"):
                    assert execute(url, LISTENER) == pid
        hanging.join()
        assert next(events).data == "hangs"
        with app.app_context():
            notify("orders", "after")
        assert next(events).data == "after"
        assert execute(url, LISTENER) == pid
    [said] = warnings(caplog, "No transaction that notifies can commit")
    assert f"session {holder} of role" in said and "waiting for a synchronous standby" in said
    assert not warnings(caplog, "Lost the listener's connection")


@pytest.mark.slow
def test_a_publisher_whose_commit_is_not_confirmed_is_told_so(
    own_postgres: postgres.Server, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event comes when the standby is back. Who waits behind it is told who holds the lock, and sends nothing."""
    url = own_postgres.url()
    execute(url, schema_sql())
    app = make_app(url)
    with opened(app, "orders") as events, app.app_context():
        notify("orders", "before")
        assert next(events).data == "before"
        monkeypatch.setattr(pool, "TIMEOUT", 3.0)
        monkeypatch.setattr(pool, "PART_FOR_LOCKS", 0.2)  # the rest is left to find out who holds the lock
        with standby_away(own_postgres):
            with pytest.raises(DatabaseUnavailable, match=r"not confirmed, so the event may still come"):
                notify("orders", "may still come")
            [(holder,)] = execute(url, WAIT_FOR_A_STANDBY)
            with pytest.raises(DatabaseUnavailable) as caught:
                notify("orders", "never")
            said = str(caught.value)
            assert f"held by session {holder} of role" in said and "commit waits for a synchronous standby" in said
            assert "may still come" not in said
        assert next(events).data == "may still come"
        notify("orders", "after")
        assert next(events).data == "after"


def test_who_holds_the_queue_up_is_read_from_postgresqls_warning_in_any_language(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names a session that has not read the queue; others may have older transactions."""
    with asleep(database_url), asleep(database_url) as second, closing(connect(database_url)) as own:

        def run(query: str, args: Sequence[Any]) -> list[tuple[Any, ...]]:
            with own.cursor() as cursor:
                cursor.execute(query, args)
                rows: list[tuple[Any, ...]] = cursor.fetchall()
                return rows

        pid = second.info.backend_pid
        german = f"WARNUNG: NOTIFY-Schlange ist zu 100% voll\nDETAIL: Der Serverprozess mit PID {pid} gehört zu denen …"
        obstacle = Obstacle()
        obstacle.met(psycopg2.errors.ProgramLimitExceeded(), ["WARNUNG: 12", german], run)
        obstacle.met(psycopg2.errors.LockNotAvailable(), [], run)
    [full] = warnings(caplog, "PostgreSQL's queue of notifications is full")
    named = rf'session {pid} of role "postgres" \(application_name "sleeper", idle in transaction, for \d+ s\)'
    assert re.search(named, full), full
    [locked] = warnings(caplog, "No transaction that notifies can commit")
    assert "a session that is gone by now" in locked
