"""Where LISTEN hears nothing: a real PgBouncer in transaction mode between the app and PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from flask import Flask

from flask_pg_sse import DatabaseUnavailable, notify, notify_many
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.client import eventually
from tests.support.log import InThread
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import execute
from tools import postgres

MakeApp = Callable[..., Flask]


@pytest.fixture
def through_pgbouncer(database_url: str) -> Iterator[str]:
    """The URL of the test's database through a PgBouncer of this test's own."""
    with pgbouncer(database_url) as url:
        yield url


def opened(app: Flask, url: str = "/sse?channel=orders") -> tuple[Received, Iterator[Received]]:
    events = stream(app.test_client(), url, timeout=20)
    return next(events), events


@pytest.mark.slow
def test_the_log_line_names_the_cause_and_events_of_the_log_still_come(
    database_url: str, through_pgbouncer: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    execute(database_url, schema_sql())
    app = make_app(through_pgbouncer)
    first, events = opened(app)
    assert first.event == "sse-open" and first.id
    said = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "PgBouncer" in said[0].getMessage() and "SSE_LISTEN_URL" in said[0].getMessage()
    with app.app_context():
        ids = [notify("orders", number) for number in range(3)]
        notify_many("orders", ["x" * 20000, "small"])
    received = [next(events) for _ in range(5)]
    assert [event.data for event in received] == ["0", "1", "2", "x" * 20000, "small"]
    assert [int(event.id) for event in received[:3]] == ids
    # Another channel, and one that resumes: also read from the log.
    _, others = opened(app, "/sse?channel=other")
    with app.app_context():
        notify("other", "heard")
    assert next(others).data == "heard"
    _, again = opened(app, f"/sse?channel=orders&last_event_id={ids[1]}")
    assert [next(again).data for _ in range(3)] == ["2", "x" * 20000, "small"]


def test_a_direct_connection_for_listen_is_the_cure(
    database_url: str, through_pgbouncer: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    execute(database_url, schema_sql())
    app = make_app(through_pgbouncer, SSE_LISTEN_URL=database_url)
    _, events = opened(app)
    with app.app_context():
        notify("orders", "logged")
        notify("orders", "not logged", durable=False)
    execute(database_url, "NOTIFY orders, 'raw'")
    assert [next(events).data for _ in range(3)] == ["logged", "not logged", "raw"]
    assert "PgBouncer" not in caplog.text


def test_without_the_log_a_deaf_stream_is_refused_and_not_kept_waiting_for_nothing(
    through_pgbouncer: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_pg_sse.hub.hub.OPEN_TIMEOUT", 0.5)
    monkeypatch.setattr("flask_pg_sse.engine.postgres.listener._ANSWER_WITHIN", 0.5)
    app = make_app(through_pgbouncer)
    first, _ = opened(app)
    assert (first.event, first.json) == ("sse-end", {"reason": "unavailable"})
    eventually(lambda: "SSE_LISTEN_URL" in caplog.text, 10)


@pytest.mark.slow
def test_an_event_is_not_sent_twice_when_the_server_behind_the_pooler_crashes(
    own_postgres: postgres.Server, make_app: MakeApp
) -> None:
    """It was committed, and waited for a standby. PgBouncer's message looks as if PostgreSQL had ended the session."""
    server = own_postgres
    execute(server.url(), schema_sql())
    errors: list[DatabaseUnavailable] = []
    with pgbouncer(server.url()) as url:
        app = make_app(url)

        def send() -> None:
            with app.app_context(), pytest.raises(DatabaseUnavailable) as caught:
                notify("orders", "once")
            errors.append(caught.value)

        with app.app_context():
            notify("orders", "before")
        execute(server.url(), "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        execute(server.url(), "SELECT pg_reload_conf()")
        sender = InThread(send)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        eventually(lambda: execute(server.url(), waiting) == [(1,)])
        server.stop("kill")
        server.options["synchronous_standby_names"] = ""
        server.start()
        sender.join()
        app.extensions["pg_sse"].close()
    assert "server conn crashed" in str(errors[0])
    assert execute(server.url(), "SELECT data FROM flask_pg_sse.event ORDER BY id") == [("before",), ("once",)]
