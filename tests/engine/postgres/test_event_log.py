"""The event log as an app sees it: on, off or required; its position; what is kept in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from flask import Flask, render_template_string

from flask_pg_sse import (
    DatabaseUnavailable,
    EventLogMissing,
    PayloadTooLarge,
    PgSSE,
    drop_schema_sql,
    notify,
    notify_many,
    schema_sql,
    sse_cursor,
    sse_url,
)
from flask_pg_sse.testing import capture, stream
from tests.support.client import eventually
from tests.support.postgres import connect, execute

MakeApp = Callable[..., Flask]


def events(url: str) -> list[tuple[int, str, str]]:
    return execute(url, "SELECT id, channel, data FROM flask_pg_sse.event ORDER BY id")


# -- on, off, required


def test_auto_uses_the_log_where_it_is_installed(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url)
    with app.app_context():
        log_id = notify("orders", "kept")
    assert events(logged_url) == [(log_id, "orders", "kept")]


def test_one_log_line_says_whether_the_log_is_used(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    without = make_app(database_url)
    for _ in range(2):
        stream(without.test_client(), "/sse?channel=a").__next__()
        with without.app_context():
            notify("orders", "x")
    execute(database_url, schema_sql())
    app = make_app(database_url)
    for _ in range(2):
        stream(app.test_client(), "/sse?channel=a").__next__()
        with app.app_context():
            notify("orders", "x")
    said = [record.getMessage() for record in caplog.records if "event log is" in record.getMessage()]
    assert said == [
        "The event log is off: the database has no event log. Remedy: flask sse init.",
        "The event log is on.",
    ]


def test_false_leaves_the_log_alone(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url, SSE_EVENT_LOG=False)
    opened = stream(app.test_client(), "/sse?channel=orders&last_event_id=5")
    assert (next(opened).id, next(opened).json) == ("", {"reason": "no-log"})
    with app.app_context():
        assert notify("orders", "x") is None
        assert sse_cursor() is None
        with pytest.raises(PayloadTooLarge):
            notify("orders", "x" * 8000)
    event = next(opened)
    assert (event.data, event.id) == ("x", "")
    assert events(logged_url) == []
    # What others send through the log is heard all the same.
    execute(logged_url, "SELECT flask_pg_sse.notify('orders', 'of somebody else')")
    event = next(opened)
    assert (event.data, event.id) == ("of somebody else", "")


def test_true_makes_a_missing_log_an_error_until_it_is_there(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(database_url, SSE_EVENT_LOG=True)
    client = app.test_client()
    with app.app_context():
        with pytest.raises(EventLogMissing, match="flask sse init"):
            notify("orders", "x")
        with pytest.raises(EventLogMissing, match="flask sse init"):
            notify_many("orders", ["x"])
        with pytest.raises(EventLogMissing, match="flask sse init"):
            sse_cursor()
        assert next(stream(client, "/sse?channel=orders")).json == {"reason": "unavailable"}
        assert "flask sse init" in caplog.text
        assert client.head("/sse?channel=orders").status_code == 200
        notified = connect(database_url)
        with pytest.raises(EventLogMissing):
            notify("orders", "x", connection=notified)
        notified.close()
        # Installed while the app runs: found at the next call, and by streams when the listener looks again.
        execute(database_url, schema_sql())
        log_id = notify("orders", "x")
        opened = eventually(lambda: [s for s in [stream(client, "/sse?channel=orders")] if next(s).event == "sse-open"])
        assert log_id is not None and notify("orders", "y") == int(next(opened[0]).id) > log_id


def test_a_log_that_is_installed_while_streams_are_open_is_taken_into_use(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_pg_sse.engine.postgres.installation._LOOK_AGAIN", 0.1)
    app = make_app(database_url, SSE_HEARTBEAT=0.2)
    opened = stream(app.test_client(), "/sse?channel=orders")
    assert next(opened).id == ""
    execute(database_url, schema_sql())
    first = next(opened)
    assert (first.event, first.id != "") == ("sse-cursor", True), "from here on the stream can be resumed"
    with app.app_context():
        log_id = notify("orders", "x")
        assert (next(opened).id, log_id) == (str(log_id), log_id)
    again = stream(app.test_client(), f"/sse?channel=orders&last_event_id={first.id}")
    assert next(again).event == "sse-open"
    assert next(again).id == str(log_id)


def test_a_log_that_is_taken_away_is_an_error_once_and_then_not_used(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url)
    with app.app_context():
        assert notify("orders", "x")
        execute(logged_url, drop_schema_sql())
        with pytest.raises(DatabaseUnavailable, match=r"has none now\. Nothing was sent\. Remedy: flask sse init\."):
            notify("orders", "y")
        assert notify("orders", "y") is None


def test_a_log_that_is_installed_anew_is_taken_into_use(logged_url: str, make_app: MakeApp) -> None:
    """In one go, so that nobody ever finds none: its ids are signed with another key, and are of another log."""
    app = make_app(logged_url, SSE_HEARTBEAT=1)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
    assert next(events).event == "sse-open"
    execute(logged_url, drop_schema_sql() + schema_sql())
    with app.app_context():
        notify("orders", "of the new log, which the stream cannot know")
    assert next(event for event in events if event.event != "sse-cursor").event == "sse-reset"
    with app.app_context():
        log_id = notify("orders", "after the reset")
    event = next(event for event in events if event.event != "sse-cursor")
    assert (event.data, event.id) == ("after the reset", str(log_id))
    events.close()


def test_a_role_that_may_not_use_the_log_is_told_the_remedy(
    logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    execute(logged_url, "CREATE ROLE outsider LOGIN")
    try:
        url = logged_url.replace("postgres@", "outsider@")
        with make_app(url).app_context():
            assert notify("orders", "x") is None
        assert "flask sse init --grant-to" in caplog.text
        with make_app(url, SSE_EVENT_LOG=True).app_context(), pytest.raises(EventLogMissing, match="--grant-to"):
            notify("orders", "x")
    finally:
        execute(logged_url, "DROP ROLE outsider")


# -- its position


def test_the_cursor_is_the_head_of_the_log(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url)
    with app.test_request_context():
        before = sse_cursor()
        log_id = notify("orders", "x")
        assert sse_cursor() == log_id and before is not None and before < (log_id or 0)
        assert sse_url("orders", cursor=log_id) == f"/sse?channel=orders&last_event_id={log_id}"
        assert sse_url(["a", "b"], cursor=0) == "/sse?channel=a&channel=b&last_event_id=0"
        assert sse_url("orders", cursor=None) == "/sse?channel=orders"
        shown = render_template_string("{{ sse_url('orders', cursor=sse_cursor()) }}")
        assert shown == f"/sse?channel=orders&amp;last_event_id={log_id}"


def test_the_cursor_of_an_open_transaction_does_not_run_ahead(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url)
    with app.app_context():
        mine = psycopg2.connect(logged_url)
        notify("orders", "not committed yet", connection=mine)
        before = sse_cursor()
        mine.commit()
        assert before is not None and (sse_cursor() or 0) > before
        mine.close()


def test_the_cursor_without_a_log_is_none(database_url: str, make_app: MakeApp) -> None:
    with make_app(database_url).test_request_context():
        assert sse_cursor() is None
        assert sse_url("orders", cursor=sse_cursor()) == "/sse?channel=orders"


def test_the_extension_object_has_the_cursor(logged_url: str) -> None:
    sse = PgSSE(database_url=logged_url)
    try:
        log_id = sse.notify("orders", "x")
        assert sse.cursor() == sse.sse_cursor() == log_id
    finally:
        sse.close()


# -- what is kept


def test_events_of_one_transaction_are_in_order_and_equal_ones_are_two(logged_url: str, make_app: MakeApp) -> None:
    app = make_app(logged_url)
    opened = stream(app.test_client(), "/sse?channel=orders&channel=other")
    next(opened)
    with app.app_context():
        mine = psycopg2.connect(logged_url)
        for channel, data in (("orders", "same"), ("other", "x"), ("orders", "same"), ("orders", "last")):
            notify(channel, data, connection=mine)
        mine.commit()
        mine.close()
    assert [next(opened).data for _ in range(4)] == ["same", "x", "same", "last"]


@pytest.fixture
def retained(logged_url: str, make_app: MakeApp) -> Iterator[Flask]:
    yield make_app(logged_url, SSE_RETENTION=0.2, SSE_HEARTBEAT=0.2)


def test_old_events_leave_the_log_by_themselves(logged_url: str, retained: Flask) -> None:
    opened = stream(retained.test_client(), "/sse?channel=orders")
    next(opened)
    with retained.app_context():
        notify_many("orders", range(100))
        last = sse_cursor()
        eventually(lambda: not events(logged_url))
        assert sse_cursor() == last, "the head stays where it is"


def test_a_quiet_channel_outlives_the_retention(logged_url: str, make_app: MakeApp) -> None:
    """Its streams are told how far the log has come, so that they never grow too old to resume."""
    app = make_app(logged_url, SSE_HEARTBEAT=0.2)
    client = app.test_client()
    events = stream(client, "/sse?channel=quiet")
    first = last = int(next(events).id)
    with app.app_context():
        notify_many("busy", range(10))
        execute(logged_url, "SELECT flask_pg_sse.prune_v1('0', 1000)")
        [(pruned,)] = execute(logged_url, "SELECT pruned_through FROM flask_pg_sse.retention")
        assert first < pruned
        while last < pruned:
            told = next(events)
            assert (told.event, told.data) == ("sse-cursor", "{}")
            last = int(told.id)
        events.close()
        again = stream(client, f"/sse?channel=quiet&last_event_id={last}")
        assert next(again).event == "sse-open"
        log_id = notify("quiet", "heard")
        assert next(again).id == str(log_id)
    too_old = stream(client, f"/sse?channel=quiet&last_event_id={first}")
    assert next(too_old).event == "sse-open"
    assert next(too_old).json == {"reason": "too-old"}


def test_capture_takes_any_size_where_the_log_is_required(make_app: MakeApp) -> None:
    app = make_app(None, SSE_EVENT_LOG=True)
    with app.app_context(), capture(app) as captured:
        notify("orders", "x" * 100_000)
        with pytest.raises(PayloadTooLarge):
            notify("orders", "x" * 100_000, durable=False)
    assert len(captured) == 1
    app = make_app(None)
    with app.app_context(), capture(app), pytest.raises(PayloadTooLarge):
        notify("orders", "x" * 100_000)


# -- the size of an event that does not go there


def test_an_event_that_is_too_large_for_notify_is_refused_with_the_remedy_that_helps(
    logged_url: str, database_url: str, make_app: MakeApp
) -> None:
    def refused(url: str, durable: bool, **config: Any) -> str:
        with make_app(url, **config).app_context(), pytest.raises(PayloadTooLarge) as raised:
            notify("orders", "x" * 9000, durable=durable)
        return str(raised.value)

    install = "Install the event log (flask sse init), which carries any size"
    assert "Leave durable=False out: the event log carries any size; or send less" in refused(logged_url, False)
    assert f"{install}; or send less" in refused(database_url, True)
    assert f"{install}, and leave durable=False out; or send less" in refused(database_url, False)
    assert f"{install}, and set no SSE_EVENT_LOG; or" in refused(logged_url, True, SSE_EVENT_LOG=False)
    execute(logged_url, "CREATE ROLE outsider LOGIN")
    try:
        text = refused(logged_url.replace("postgres@", "outsider@"), True)
    finally:
        execute(logged_url, "DROP ROLE outsider")
    assert 'role "outsider" may not use it. Remedy: flask sse init --grant-to outsider' in text
