"""The threads and connections of one app: started at first use, ended by close(), none left when either fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from flask import Flask

from flask_pg_sse import notify
from flask_pg_sse.hub.ticker import Ticker
from flask_pg_sse.testing import stream
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]


def sessions(url: str) -> list[str]:
    query = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'flask_pg_sse%'"
    return sorted(row[0] for row in execute(url, query))


def test_a_process_that_only_notifies_never_listens(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    assert sessions(database_url) == []
    with app.app_context():
        notify("orders", "x")
    assert sessions(database_url) == ["flask_pg_sse notify"]
    assert threading.active_count() == 1


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
