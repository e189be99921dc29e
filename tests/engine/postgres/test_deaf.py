"""Where LISTEN hears nothing: a real PgBouncer in transaction mode between the app and PostgreSQL."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import ConfigurationError, DatabaseUnavailable, EventLogMissing, disconnect, notify, notify_many
from flask_pg_sse.engine.postgres import watch
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.client import eventually
from tests.support.link import Link, through
from tests.support.log import PUBLISH, WAIT_FOR_A_STANDBY, InThread, standby_away
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


def check_that_the_log_is_heard(app: Flask, events: Iterator[Received], url: str) -> Iterator[Received]:
    """Check that events of the log come, and no raw or ephemeral ones. Return the events of another channel."""
    with app.app_context():
        ids = [notify("orders", number) for number in range(3)]
        notify("orders", "ephemeral", durable=False)
        execute(url, "NOTIFY orders, 'raw'")
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
    return others


@pytest.mark.slow
def test_the_log_line_names_the_cause_and_events_of_the_log_still_come(
    database_url: str, through_pgbouncer: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    execute(database_url, schema_sql())
    app = make_app(through_pgbouncer)
    first, events = opened(app)
    assert first.event == "sse-open" and first.id
    [said] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "PgBouncer" in said and 'SSE_LISTEN_URL to a direct connection to PostgreSQL, or to "poll"' in said
    assert "raw and ephemeral ones not at all" in said
    check_that_the_log_is_heard(app, events, database_url)


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
    monkeypatch.setattr("flask_pg_sse.engine.postgres.listener.ANSWER_WITHIN", 0.5)
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
        with standby_away(server):
            sender = InThread(send)
            eventually(lambda: len(execute(server.url(), WAIT_FOR_A_STANDBY)) == 1)
            server.stop("kill")
            server.options["synchronous_standby_names"] = ""
            server.start()
        sender.join()
        app.extensions["pg_sse"].close()
    assert "server conn crashed" in str(errors[0])
    assert execute(server.url(), "SELECT data FROM flask_pg_sse.event ORDER BY id") == [("before",), ("once",)]


# -- SSE_LISTEN_URL = "poll"


def looks(url: str) -> int:
    query = "SELECT coalesce(sum(calls), 0)::int FROM pg_stat_user_functions WHERE funcname = 'head_v1'"
    return int(execute(url, query)[0][0])


def test_through_a_pooler_every_event_of_the_log_comes_once(
    logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    with pgbouncer(logged_url) as url:
        app = make_app(url, SSE_LISTEN_URL="poll", SECRET_KEY="secret")
        first, events = opened(app)
        assert first.event == "sse-open" and first.id
        beats = app.extensions["pg_sse"].runtime.worker.engine._listener._control.beats
        assert beats == 0, "it would wait for 5 s for one, which never comes back"
        others = check_that_the_log_is_heard(app, events, logged_url)
        with app.app_context():
            disconnect(channel="other")
        assert next(others).event == "sse-end"
        app.extensions["pg_sse"].close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_a_worker_at_rest_makes_one_indexed_query_a_second(logged_url: str, make_app: MakeApp) -> None:
    name = logged_url.rsplit("/", 1)[1]
    execute(logged_url, f"ALTER DATABASE {name} SET track_functions = 'all'")
    execute(logged_url, PUBLISH, ("elsewhere", ["{}"] * 5000, ["x"] * 5000))
    execute(logged_url, "VACUUM ANALYZE flask_pg_sse.event")
    with pgbouncer(logged_url) as url:
        app = make_app(url, SSE_LISTEN_URL="poll")
        kept = [opened(app, f"/sse?channel=room-{number}") for number in range(30)]
        for _ in range(4):  # PostgreSQL adds up a session's calls about once a second: let it come to rest
            seen = looks(logged_url)
            eventually(lambda seen=seen: looks(logged_url) > seen, 20)  # type: ignore[misc]
        scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'event'"
        before, scanned = looks(logged_url), execute(logged_url, scans)
        since = time.monotonic()
        eventually(lambda: looks(logged_url) >= before + 6, 20)
        assert 3 < time.monotonic() - since < 12
        assert execute(logged_url, scans) == scanned
        assert len(kept) == 30
        app.extensions["pg_sse"].close()


@pytest.mark.slow
@pytest.mark.parametrize("listen_url", ["poll", None], ids=["poll", "deaf"])
def test_nothing_is_lost_or_comes_twice_while_sessions_end_and_stray_notifications_come(
    logged_url: str, make_app: MakeApp, listen_url: str | None
) -> None:
    """With one session behind PgBouncer, which somebody has left listening to the channel."""
    with pgbouncer(logged_url, default_pool_size=1, server_idle_timeout=600) as url:
        app = make_app(url, SSE_LISTEN_URL=listen_url)
        _, events = opened(app)
        for number in range(200):
            if number % 40 == 20:
                query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                execute(logged_url, query + "AND pid <> pg_backend_pid()")
            if number % 40 == 21:
                eventually(lambda: listen_through(url), 10)
            execute(logged_url, PUBLISH, ("orders", ["{}"], [str(number)]))
        assert [next(events).data for _ in range(200)] == list(map(str, range(200)))
        execute(logged_url, PUBLISH, ("orders", ["{}"], ["last"]))
        assert next(events).data == "last"
        app.extensions["pg_sse"].close()


def listen_through(url: str) -> bool:
    try:
        execute(url, "LISTEN orders")
    except psycopg2.Error:
        return False
    return True


def test_poll_without_the_log_is_an_error_in_words(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(database_url, SSE_LISTEN_URL="poll")
    assert next(stream(app.test_client(), "/sse?channel=orders")).json == {"reason": "unavailable"}
    assert "flask sse init" in caplog.text and '"poll"' in caplog.text
    with app.app_context(), pytest.raises(EventLogMissing, match="flask sse init"):
        notify("orders", "x")
    execute(database_url, schema_sql())
    _, events = eventually(lambda: [one for one in [opened(app)] if one[0].event == "sse-open"])[0]
    with app.app_context():
        notify("orders", "heard")
    assert next(events).data == "heard"


def test_poll_and_no_use_of_the_log_is_a_wrong_configuration(database_url: str, make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match=r'SSE_LISTEN_URL is "poll".*SSE_EVENT_LOG is false'):
        make_app(database_url, SSE_LISTEN_URL=" POLL ", SSE_EVENT_LOG=False)


@pytest.mark.slow
def test_a_listener_that_was_deaf_hears_again_when_listen_works(
    logged_url: str, postgres_server: postgres.Server, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a pooler was put into session mode, or taken away."""
    monkeypatch.setattr(watch, "_EVERY", 0.5)
    monkeypatch.setattr(watch, "_TRY_AGAIN", 0.5)
    with pgbouncer(logged_url) as pooled, Link(urlsplit(pooled).port or 0) as address:
        app = make_app(through(address, logged_url))
        _, events = opened(app)
        address.lead_to(postgres_server.port)

        def hears() -> bool:
            return bool(app.extensions["pg_sse"].runtime.worker.engine._listener.hears)

        eventually(hears, 30)
        with app.app_context():
            notify("orders", "logged")
            notify("orders", "ephemeral", durable=False)
        assert [next(events).data for _ in range(2)] == ["logged", "ephemeral"]
        app.extensions["pg_sse"].close()
