"""The threads and connections of one app: started at first use, ended by close(), none left when either fails."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, Response
from flask.sessions import NullSession, SecureCookieSessionInterface

from flask_pg_sse import disconnect, notify, sse_bp
from flask_pg_sse.hub.ticker import Ticker
from flask_pg_sse.testing import close, stream
from tests.support.client import eventually
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]


def sessions(url: str) -> list[str]:
    query = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'flask_pg_sse%'"
    return sorted(row[0] for row in execute(url, query))


END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'flask_pg_sse%'"


def test_a_process_that_only_notifies_never_listens(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    assert sessions(database_url) == []
    with app.app_context():
        notify("orders", "x")
    assert sessions(database_url) == ["flask_pg_sse notify"]
    assert threading.active_count() == 1


def test_the_databases_are_found_and_logged_once(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flask_pg_sse")
    app = make_app(database_url)
    found = app.extensions["pg_sse"].runtime.databases()  # as a command, or the server at its start
    with app.app_context():
        notify("orders", "x")
    assert app.extensions["pg_sse"].runtime.databases() == found
    assert caplog.text.count("Using PostgreSQL at") == 1


def test_close_ends_everything_and_the_next_use_starts_anew(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    for _ in range(3):
        events = stream(app.test_client(), "/sse/orders")
        assert next(events).event == "sse-open"
        with app.app_context():
            notify("orders", "x")
        assert next(events).data == "x"
        app.extensions["pg_sse"].close()
        assert next(events).json == {"reason": "shutdown"}
        events.close()
        assert threading.active_count() == 1


def test_a_start_that_fails_leaves_no_thread(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(database_url, TESTING=False, PROPAGATE_EXCEPTIONS=False)

    def fail(self: Ticker) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Ticker, "start", fail)
        assert app.test_client().get("/sse/orders").status_code == 500
    events = stream(app.test_client(), "/sse/orders")
    assert next(events).event == "sse-open"
    events.close()


def test_a_close_during_a_start_waits_for_it(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() by another thread in the middle of the first stream's start leaves nothing running."""
    app = make_app(database_url)
    runtime = app.extensions["pg_sse"].runtime
    in_start, closing = threading.Event(), threading.Event()
    real = Ticker.start

    def slow(self: Ticker) -> None:
        in_start.set()
        closing.wait(1)
        real(self)

    monkeypatch.setattr(Ticker, "start", slow)
    starting = threading.Thread(target=lambda: runtime.worker.streams)
    starting.start()
    in_start.wait(10)
    close = threading.Thread(target=runtime.close)
    close.start()
    closing.set()
    starting.join()
    close.join()
    assert threading.active_count() == 1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def one_test_of_a_suite(app: Flask, number: int) -> None:
    """Use an app as the README's tests do."""
    client = app.test_client()
    events = stream(client, "/sse/orders")
    assert next(events).event == "sse-open"
    with app.app_context():
        notify("orders", str(number))
    assert next(events).data == str(number)
    events.close()


def new_app(url: str) -> Flask:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS=["*"], SSE_DATABASE_URL=url)
    app.register_blueprint(sse_bp)
    return app


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Python's garbage collector runs only where it is asked to, as in a suite that makes little garbage."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_an_app_for_each_test_leaves_nothing_behind(
    database_url: str, logged_url: str, no_collections: None, count: int
) -> None:
    """Nobody closes them, and PostgreSQL's default is a hundred connections."""
    one_test_of_a_suite(new_app(database_url), 0)  # opens what Python and psycopg2 keep
    gc.collect()
    eventually(lambda: threading.active_count() == 1)
    before = descriptors()
    for number in range(count):
        url = logged_url if number % 2 else database_url
        app = new_app(url)
        one_test_of_a_suite(app, number)
        if not number % 3:  # a test that only notifies
            with (other := new_app(url)).app_context():
                notify("orders", "x")
            del other
        # Those of all databases. What ends them is in the background.
        eventually(lambda: len(sessions(database_url)) < 30)
    del app
    gc.collect()
    eventually(lambda: not sessions(database_url))
    eventually(lambda: threading.active_count() == 1)
    assert descriptors() <= before


def is_freed(gone: weakref.ref[Flask]) -> bool:
    """A thread that looks at the app at this moment refers to it."""
    gc.collect()
    return gone() is None


def test_an_app_is_freed_whose_factory_has_classes_of_its_own(database_url: str) -> None:
    """Their methods refer to the app, and a stream's response and session are of subclasses of them."""

    def create_app() -> Flask:
        app = new_app(database_url)
        app.secret_key = "x"

        class OwnResponse(Response):
            def app(self) -> Flask:
                return app

        class OwnNullSession(NullSession):
            def app(self) -> Flask:
                return app

        app.response_class = OwnResponse
        app.session_interface = SecureCookieSessionInterface()
        app.session_interface.null_session_class = OwnNullSession
        return app

    app = create_app()
    gone = weakref.ref(app)
    with stream(app.test_client(), "/sse/orders") as events:
        assert next(events).event == "sse-open"
    assert app.test_client().get("/sse").status_code == 400
    del app, events
    eventually(lambda: is_freed(gone))


def test_an_app_is_freed_whose_configuration_refers_to_it(database_url: str) -> None:
    """By the functions for the URLs too. The stream that goes on connects again with what they returned last."""

    def create_app() -> Flask:
        app = new_app(database_url)
        app.config.update(SECRET_KEY="x", URL=database_url)
        app.config.update(SSE_DATABASE_URL=lambda: app.config["URL"], SSE_LISTEN_URL=lambda: app.config["URL"])
        return app

    app = create_app()
    gone = weakref.ref(app)
    with app.test_request_context("/sse/orders"):
        body: Any = app.full_dispatch_request().response
    while b"sse-open" not in next(body):
        pass
    with app.app_context():
        disconnect(channel="other")
        notify("orders", "before")
    assert b"before" in next(body)
    del app
    eventually(lambda: is_freed(gone))
    execute(database_url, END_SESSIONS)
    while b"sse-reset" not in next(body):  # it hears again
        pass
    execute(database_url, "NOTIFY orders, 'after'")
    assert b"after" in next(body)
    body.close()
    eventually(lambda: threading.active_count() == 1)
    eventually(lambda: not sessions(database_url))


def test_a_stream_outlives_its_app_and_ends_what_it_had_started(database_url: str) -> None:
    app = new_app(database_url)
    gone = weakref.ref(app)
    hub, _ = app.extensions["pg_sse"].runtime.worker.streams
    with app.test_request_context("/sse/orders"):
        body: Any = app.full_dispatch_request().response
    while b"sse-open" not in next(body):
        pass
    execute(database_url, "NOTIFY orders, 'heard'")
    assert b"heard" in next(body)
    del app
    eventually(lambda: is_freed(gone))
    assert threading.active_count() > 1
    execute(database_url, "NOTIFY orders, 'still heard'")
    assert b"still heard" in next(body)
    body.close()
    eventually(lambda: threading.active_count() == 1)
    eventually(lambda: not sessions(database_url))
    assert len(hub) == 0


def test_close_ends_at_once_what_the_app_of_a_test_has_started(database_url: str) -> None:
    app = new_app(database_url)
    for number in range(3):
        one_test_of_a_suite(app, number)
        assert sessions(database_url)
        close(app)
        assert threading.active_count() == 1
        eventually(lambda: not sessions(database_url))
