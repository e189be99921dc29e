"""What is logged while PostgreSQL or the event log is away: the cause once, then rarely, and how long it took."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.link import Link, through
from tests.support.postgres import execute
from tools import postgres

MakeApp = Callable[..., Flask]


def attempts(app: Flask) -> int:
    """How many attempts of the listener have failed since it last heard PostgreSQL."""
    listener: Any = app.extensions["pg_sse"].runtime.worker.engine._listener
    return int(listener._outage._repeats._messages)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def causes(said: list[str]) -> list[str]:
    return [text.split(". Next attempt in")[0] for text in said if "Next attempt in" in text]


def test_while_postgres_is_away_each_cause_is_said_once_and_the_end_with_its_length(
    postgres_server: postgres.Server, logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    with Link(postgres_server.port) as link:
        app = make_app(through(link, logged_url))
        events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
        assert next(events).event == "sse-open"
        assert not warnings(caplog)
        link.cut()
        eventually(lambda: attempts(app) >= 5)
        link.restore()
        eventually(lambda: attempts(app) == 0 and " works again after " in warnings(caplog)[-1])
        said = warnings(caplog)
        assert causes(said) and len(causes(said)) == len(set(causes(said))) < 5
        assert causes(said)[0].startswith("Lost the listener's connection: ")
        again = r"Listening to .* works again after [0-9.]+ s, at attempt \d+; the missed events have been read .*\."
        assert re.fullmatch(again, said[-1])
        assert len(said) == len(causes(said)) + 1
        with app.app_context():
            notify("orders", "heard")
        # After five seconds the stream is told that PostgreSQL is away.
        assert next(event for event in events if event.event != "sse-status").data == "heard"
        events.close()


def test_a_connection_that_is_lost_again_and_again_is_no_flood(
    logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(logged_url)
    events = stream(app.test_client(), "/sse?channel=orders", timeout=20)
    assert next(events).event == "sse-open"
    for number in range(8):
        execute(
            logged_url,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'flask_pg_sse listener'",
        )
        with app.app_context():
            notify("orders", str(number))
        assert next(events).data == str(number)
    events.close()
    said = warnings(caplog)
    assert len(causes(said)) == len(set(causes(said)))
    assert len(said) <= 4, said


def test_while_the_required_log_is_missing_it_is_said_once_and_the_end_with_its_length(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(database_url, SSE_EVENT_LOG=True)
    app.test_client().get("/sse?channel=orders")
    eventually(lambda: attempts(app) >= 5)
    assert [text for text in warnings(caplog) if text.startswith("The event log is off")] == [
        "The event log is off: the database has no event log. Remedy: flask sse init."
    ]
    assert len(causes(warnings(caplog))) == 1
    execute(database_url, schema_sql())
    eventually(lambda: attempts(app) == 0 and " works again after " in warnings(caplog)[-1])
    on = [text for text in warnings(caplog) if text.startswith("The event log is on")]
    assert len(on) == 1 and re.fullmatch(r"The event log is on, after [0-9.]+ s without it\.", on[0])
    listening = warnings(caplog)[-1]
    assert re.fullmatch(r"Listening to .* works again after [0-9.]+ s, at attempt \d+\.", listening)
