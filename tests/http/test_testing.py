"""flask_pg_sse.testing: what users' own tests are written with."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from flask import Flask, abort
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from flask_pg_sse import (
    DatabaseNotConfigured,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PgSSE,
    disconnect,
    notify,
    notify_many,
    postgres_notify,
    sse_cursor,
    sse_url,
)
from flask_pg_sse.testing import Captured, capture, stream
from tests.support.client import eventually
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    """An app without any database."""
    app = make_app()

    @app.post("/orders/<int:number>")
    def create(number: int) -> str:
        notify("orders", {"id": number}, event="created")
        return ""

    return app


def streams(app: Flask) -> int:
    return len(app.extensions["pg_sse"].runtime.worker.streams[0])


# -- capture


def test_capture_records_what_views_send_without_a_database(app: Flask) -> None:
    with capture(app) as events:
        app.test_client().post("/orders/7")
        assert [event.json for event in events] == [{"id": 7}]  # it grows while the block runs
        app.test_client().post("/orders/8")
    assert [(event.channel, event.event, event.json) for event in events] == [
        ("orders", "created", {"id": 7}),
        ("orders", "created", {"id": 8}),
    ]


def test_captured_fields_are_those_that_would_have_travelled(app: Flask) -> None:
    with capture(app) as events, app.app_context():
        notify("a", b"\xc3\xa9", event="e", id=7, retry=500, comment="c", durable=False)
        notify("b")
        postgres_notify(channel="c", sse_payload={"event": "e", "id": 1, "data": [1], "retry": 200, "comment": "x"})
        notify_many("d", ["x", {"y": 1}], event="e")
    assert events == [
        Captured("a", "é", "e", "7", 500, "c"),
        Captured("b", "", None, None, None, None),
        Captured("c", "[1]", "e", "1", 200, "x"),
        Captured("d", "x", "e", None, None, None),
        Captured("d", '{"y": 1}', "e", None, None, None),
    ]


@pytest.fixture
def shop(make_app: MakeApp) -> Any:
    """The usual app: Flask-SQLAlchemy, here on SQLite. Each route saves an item, and tells of it in its own way."""
    app = make_app(None, SQLALCHEMY_DATABASE_URI="sqlite://", SECRET_KEY="x", subject=lambda: "ann")
    db = SQLAlchemy(app)

    class Item(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)

    def save_and_tell() -> None:
        db.session.add(item := Item())
        db.session.flush()
        notify("stock", {"id": item.id}, connection=db.session)

    @app.post("/right")
    def right() -> str:
        save_and_tell()
        db.session.commit()
        return ""

    @app.post("/too-late")
    def too_late() -> str:
        db.session.add(Item())
        db.session.commit()
        notify("stock", "too late", connection=db.session)
        return ""

    @app.post("/fails")
    def fails() -> str:
        save_and_tell()
        abort(409)

    @app.post("/savepoint")
    def savepoint() -> str:
        save_and_tell()
        inner = db.session.begin_nested()
        save_and_tell()
        inner.rollback()
        with db.session.begin_nested():
            notify("stock", "released", connection=db.session())
        db.session.commit()
        return ""

    with app.app_context():
        db.create_all()
    yield app  # without the context, which requests would share: Flask-SQLAlchemy has a session for each
    with app.app_context():
        db.engine.dispose()


def test_an_event_of_a_transaction_is_captured_when_it_commits_and_never_otherwise(shop: Flask) -> None:
    client = shop.test_client()
    with capture(shop) as events:
        client.post("/too-late")
        client.post("/fails")
        assert events == []
        client.post("/right")
        assert [event.channel for event in events] == ["stock"]
        client.post("/savepoint")
    assert [event.json if "{" in event.data else event.data for event in events] == [{"id": 2}, {"id": 3}, "released"]


def test_what_is_sent_on_a_drivers_own_connection_is_captured_at_the_call(database_url: str, app: Flask) -> None:
    connection = psycopg2.connect(database_url)
    try:
        with capture(app) as events, app.app_context():
            notify("orders", "x", connection=connection)
        assert [event.data for event in events] == ["x"]
        assert connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
    finally:
        connection.close()


def test_an_event_of_a_commit_that_fails_is_not_captured(app: Flask) -> None:
    engine = create_engine("sqlite://")
    with capture(app) as events, app.app_context(), engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.exec_driver_sql("CREATE TABLE a (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
        notify_many("orders", ["x", "y"], connection=connection)
        connection.commit()
        connection.exec_driver_sql("INSERT INTO b VALUES (7)")
        notify_many("orders", ["x", "y"], connection=connection)
        with pytest.raises(IntegrityError):
            connection.commit()
        assert [event.data for event in events] == ["x", "y"]
    engine.dispose()


def test_disconnect_is_captured(shop: Flask) -> None:
    with capture(shop) as events, shop.app_context():
        disconnect(subject=7)
        disconnect(subject="ann", channel="orders")
    assert events.disconnected == [("7", None), ("ann", "orders")]
    assert events.disconnected[1].channel == "orders"


def test_a_page_begins_where_its_data_end(shop: Flask) -> None:
    with shop.test_request_context(), capture(shop):
        first = sse_cursor()
        notify("stock", "after it")
        second = sse_cursor()
        assert first is not None and second is not None and first < second
        for cursor, ids in ((first, ["", str(second)]), (second, [""])):
            with stream(shop.test_client(), sse_url("stock", cursor=cursor)) as events:
                assert next(events).event == "sse-open"
                assert [next(events).id for _ in ids[1:]] == ids[1:]
                events.nothing()


def test_without_the_log_there_is_no_cursor(make_app: MakeApp) -> None:
    app = make_app(SSE_EVENT_LOG=False)
    with app.test_request_context(), capture(app):
        assert sse_cursor() is None and notify("a", "x") is None


def test_streams_within_capture_need_no_database(shop: Flask) -> None:
    client = shop.test_client()
    with capture(shop):
        events: Any = stream(client, "/sse?channel=stock")
        assert next(events).event == "sse-open"
        client.post("/too-late")
        events.nothing()
        client.post("/right")
        assert next(events).json == {"id": 2}
        events.nothing()
        with shop.app_context():
            disconnect(subject="ann")
        assert next(events).json == {"reason": "revoked"}
        events.close()
        left_open = stream(client, "/sse?channel=stock")
        next(left_open)
    assert [event.event for event in left_open] == ["sse-end"]


def test_nothing_says_which_event_came(shop: Flask) -> None:
    with capture(shop) as captured, stream(shop.test_client(), "/sse?channel=stock&channel=a") as events:
        events.nothing()  # opens the stream
        with shop.app_context():
            notify("stock", "in time", event="created")
        begun = time.monotonic()
        with pytest.raises(AssertionError, match=r"event='created', data='in time'.* no event was expected"):
            events.nothing()
        events.nothing()
        assert time.monotonic() - begun < 4, "it does not wait for the timeout, which is 5 s"
        assert [event.data for event in captured] == ["in time"]


def test_what_nothing_sends_is_no_event_of_another_stream(shop: Flask) -> None:
    client = shop.test_client()
    with capture(shop), shop.app_context(), stream(client, "/sse?channel=stock") as one:
        with stream(client, "/sse?channel=stock") as other:
            assert next(other).event == "sse-open"
            one.nothing()
            notify("stock", "x")
            assert next(other).data == "x"
        with stream(client, "/sse?channel=stock&last_event_id=0") as again:
            assert [next(again).event, next(again).data] == ["sse-open", "x"]


def test_nothing_with_a_database(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    with app.app_context(), stream(app.test_client(), "/sse?channel=a") as events:
        events.nothing()
        notify("b", "elsewhere")
        events.nothing()
        notify("a", "here")
        with pytest.raises(AssertionError, match="here"):
            events.nothing()


def test_every_error_without_a_database_names_capture(app: Flask) -> None:
    calls: list[Callable[[], object]] = [
        lambda: notify("a", "x"),
        lambda: notify("a", "x", connection=Session(create_engine("sqlite://"))),
        sse_cursor,
        lambda: disconnect(subject="ann"),
    ]
    for uri in (None, "sqlite://"):
        app.config.update(SQLALCHEMY_DATABASE_URI=uri, SECRET_KEY="x")
        with app.app_context():
            for call in calls:
                with pytest.raises((DatabaseNotConfigured, TypeError), match=r"flask_pg_sse\.testing\.capture\(app\)"):
                    call()
            with pytest.raises(AssertionError, match=r"(?s)500.*flask_pg_sse\.testing\.capture\(app\)"):
                next(stream(app.test_client(), "/sse?channel=a"))


def test_what_cannot_be_sent_fails_in_capture_too(app: Flask) -> None:
    with capture(app) as events, app.app_context():
        with pytest.raises(InvalidChannel):
            notify("a\nb", "x")
        with pytest.raises(InvalidEvent):
            notify("a", "x", event="sse-open")
        with pytest.raises(InvalidEvent):
            notify("a", [float("nan")])
        with pytest.raises(PayloadTooLarge):
            notify("a", "x" * 8000)
        with pytest.raises(TypeError):
            notify("a", object())
        with pytest.raises(TypeError):
            notify("a", "x", sse_payload={"data": "x"})
        with pytest.raises(TypeError):
            notify_many("a", "xyz")
        with pytest.raises(InvalidEvent):
            notify_many("a", ["fine", b"\xff"])
    assert events == []


def test_captures_may_be_nested_and_end_with_their_blocks(app: Flask) -> None:
    with app.app_context():
        with capture(app) as outer:
            notify("a", "1")
            with pytest.raises(ZeroDivisionError), capture(app) as inner:
                notify("a", "2")
                raise ZeroDivisionError
            notify("a", "3")
        with pytest.raises(ValueError, match="SSE_DATABASE_URL"):
            notify("a", "4")
    assert [event.data for event in inner] == ["2"]
    assert [event.data for event in outer if event.data != "2"] == ["1", "3"]


def test_capture_is_for_one_app(app: Flask, make_app: MakeApp) -> None:
    other = make_app()
    with capture(app) as ours, capture(other) as theirs:
        with app.app_context():
            notify("a", "ours")
        with other.app_context():
            notify("a", "theirs")
    assert [[event.data for event in events] for events in (ours, theirs)] == [["ours"], ["theirs"]]


def test_capture_sees_the_extension_objects_calls() -> None:
    app = Flask("tests")
    sse = PgSSE(app)
    with capture(app) as events, app.app_context():
        sse.notify("a", "x")
    assert [event.data for event in events] == ["x"]


def test_capture_of_an_extension_object_without_an_app() -> None:
    """As in the tests of a script, where no app is at hand."""
    sse = PgSSE(secret_key="k")
    engine = create_engine("sqlite://")
    with capture(sse) as events, Session(engine) as session:
        sse.notify("orders", {"id": 7}, connection=session)
        assert events == [] and sse.cursor() is not None
        session.commit()
        sse.disconnect(subject=7)
    assert [(event.channel, event.json) for event in events] == [("orders", {"id": 7})]
    assert events.disconnected == [("7", None)]
    engine.dispose()


def test_capture_without_the_blueprint_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="register_blueprint"), capture(Flask("tests")):
        pass


# -- stream


def test_stream_yields_events_as_a_browser_has_them(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    events = stream(app.test_client(), "/sse?channel=orders")
    opening = next(events)
    assert (opening.event, opening.json, opening.id) == ("sse-open", {}, "")
    with app.app_context():
        notify("orders", {"id": 7}, event="created", id="9", comment="not seen")
        notify("orders", "a\nb")
    created, plain = next(events), next(events)
    assert (created.event, created.json, created.id) == ("created", {"id": 7}, "9")
    assert (plain.event, plain.data, plain.id) == ("message", "a\nb", "9")
    events.close()


def test_closing_early_frees_the_stream(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    client = app.test_client()
    for _ in range(3):
        events = stream(client, "/sse?channel=orders")
        next(events)
        assert streams(app) == 1
        events.close()
        eventually(lambda: streams(app) == 0)  # the ticker forgets it


def test_a_stream_that_is_left_alone_is_freed(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    for event in stream(app.test_client(), "/sse?channel=orders"):
        assert event.event == "sse-open"
        break
    eventually(lambda: streams(app) == 0)


def test_silence_ends_in_a_timeout_that_leaves_nothing(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    before = set(threading.enumerate())
    events = stream(app.test_client(), "/sse?channel=orders", timeout=0.1)
    next(events)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        next(events)
    eventually(lambda: streams(app) == 0)
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert started == {f"pg-sse-{name}" for name in ("listener", "watch", "ticker", "pruner", "presence")}
    assert next(events, None) is None


def test_the_first_event_may_take_longer(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """If PostgreSQL does not answer, it is the end of the stream that says so, and not a TimeoutError."""
    monkeypatch.setattr("flask_pg_sse.hub.admission.OPEN_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        app = make_app(f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none")
        with stream(app.test_client(), "/sse?channel=orders", timeout=0.1) as events:
            assert next(events).json == {"reason": "unavailable"}


def test_heartbeats_are_no_events_and_do_not_put_the_timeout_off(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_HEARTBEAT=0.1)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=0.5)
    next(events)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        next(events)
    assert time.monotonic() - begun < 20


def test_each_event_has_the_whole_timeout(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=1.6)
    next(events)
    for number in range(4):  # all together take longer
        timer = threading.Timer(0.45, execute, (database_url, "SELECT pg_notify('orders', %s)", (str(number),)))
        timer.start()
        assert next(events).data == str(number)
        timer.join()
    events.close()


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [("/sse?channel=closed", "403", "SSE_CHANNELS"), ("/sse", "400", "channel="), ("/nothing", "404", "Not Found")],
)
def test_a_refused_stream_is_an_assertion_with_status_and_text(
    make_app: MakeApp, url: str, status: str, text: str
) -> None:
    client = make_app(SSE_CHANNELS=["open"]).test_client()
    with pytest.raises(AssertionError, match=f"(?s){status}.*{text}"):
        next(stream(client, url))


def test_a_page_that_is_no_stream_is_an_assertion(app: Flask) -> None:
    app.add_url_rule("/page", view_func=lambda: "page")
    with pytest.raises(AssertionError, match="text/html, not a stream"):
        next(stream(app.test_client(), "/page"))


def test_the_end_of_the_stream_ends_the_loop(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    events = stream(app.test_client(), "/sse?channel=orders")
    next(events)
    app.extensions["pg_sse"].close()
    assert [(event.event, event.json) for event in events] == [("sse-end", {"reason": "shutdown"})]


def test_two_streams_of_one_client(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    client: Any = app.test_client()
    first, second = (stream(client, f"/sse?channel={name}") for name in ("a", "b"))
    assert (next(first).event, next(second).event) == ("sse-open", "sse-open")
    with app.app_context():
        notify("b", "for b")
        notify("a", "for a")
    assert (next(first).data, next(second).data) == ("for a", "for b")
    first.close()
    second.close()
