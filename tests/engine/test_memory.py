"""The engine in memory: what is its own, and an app that runs on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask

from flask_pg_sse import disconnect, notify, sse_cursor
from flask_pg_sse.engine import memory
from flask_pg_sse.engine.memory import MemoryEngine
from flask_pg_sse.event import Event
from flask_pg_sse.testing import stream
from tests.support.engines import Process

MakeApp = Callable[..., Flask]


def test_ids_lie_above_those_of_a_process_before() -> None:
    """A browser that comes back after a restart is told that it has missed something."""
    earlier = MemoryEngine().publish("a", [Event("x")]) or 0
    assert (MemoryEngine().publish("a", [Event("x")]) or 0) > earlier
    assert MemoryEngine().page(["a"], earlier, 100, 0).refusal == "too-old"


def test_old_events_are_pruned() -> None:
    process = Process(MemoryEngine(retention=1e-9), "a")
    first, second = (process.engine.publish("a", [Event("x")]) or 0 for _ in range(2))
    assert ("pruned", first) in process.sink.told
    assert process.engine.page(["a"], first - 1, 100, 0).refusal == "too-old"
    assert process.engine.head() == second


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 1000)
    engine = MemoryEngine()
    for _ in range(100):
        engine.publish("a", [Event("x" * 100)])
    page = engine.page(["a"], 0, 1_000_000, 0)
    before = page.items[0][2] - 1
    assert 5 < len(page.items) < 10
    assert engine.look([before - 1, before]).refusals == {before - 1: "too-old"}, "it says how far it goes back"


def test_channels_that_nobody_wants_are_forgotten() -> None:
    engine = MemoryEngine()
    for number in range(100):
        engine.subscribe([f"room-{number}"])
        engine.unsubscribe([f"room-{number}"])
    assert not engine._channels and engine.status().channels == 0


def test_an_app_without_a_database(make_app: MakeApp) -> None:
    """Streams, replay and disconnect() as on PostgreSQL."""
    app = make_app(None, SSE_BROKER_URL="memory://", SECRET_KEY="x", subject=lambda: "ann")
    with app.app_context():
        events = stream(app.test_client(), "/sse?channel=a")
        assert next(events).event == "sse-open"
        ids = [notify("a", text) for text in ("x", "y")]
        assert [(one.data, one.id) for one in (next(events), next(events))] == [("x", str(ids[0])), ("y", str(ids[1]))]
        assert sse_cursor() == ids[1]
        events.close()
        notify("a", "while it was away")
        events = stream(app.test_client(), f"/sse?channel=a&last_event_id={ids[0]}")
        assert [next(events).data for _ in range(3)] == ["{}", "y", "while it was away"]
        disconnect(subject="ann")
        assert next(events).json == {"reason": "revoked"}


def test_two_apps_do_not_hear_each_other(make_app: MakeApp) -> None:
    one, other = (make_app(None, SSE_BROKER_URL="memory://") for _ in range(2))
    events = stream(one.test_client(), "/sse?channel=a")
    next(events)
    for app in (other, one):
        with app.app_context():
            notify("a", app is one)
    assert next(events).json is True
    events.close()


def test_without_the_log_events_are_not_kept(make_app: MakeApp) -> None:
    app = make_app(None, SSE_BROKER_URL="memory://", SSE_EVENT_LOG=False)
    with app.app_context():
        assert notify("a", "x") is None and sse_cursor() is None
