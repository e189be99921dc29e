"""What other roles of the database send as if it came from the event log: it moves nobody's position."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.testing import Received, stream
from tests.client import eventually
from tests.conftest import connect, execute

MakeApp = Callable[..., Flask]
HUGE = 9_000_000_000_000_000_000


@pytest.fixture
def app(database_url: str, make_app: MakeApp) -> Iterator[Flask]:
    execute(database_url, schema_sql())
    app = make_app(database_url, SSE_HEARTBEAT=0.2)
    with app.app_context():
        yield app


@pytest.fixture
def forger(database_url: str) -> Iterator[Any]:
    """A role that may do nothing but connect; that is enough to hear and to send any NOTIFY."""
    execute(database_url, "CREATE ROLE forger LOGIN")
    connection = connect(database_url.replace("postgres@", "forger@"))
    connection.cursor().execute("LISTEN orders; LISTEN flask_pg_sse")
    yield connection
    connection.close()
    execute(database_url, "DROP ROLE forger")


def heard(forger: Any, channel: str = "orders") -> str:
    """Return the next payload that the forger hears on a channel."""
    found: list[str] = []

    def look() -> bool:
        forger.poll()
        found.extend(one.payload for one in forger.notifies if one.channel == channel)
        forger.notifies.clear()
        return bool(found)

    eventually(look)
    return found[0]


def send(forger: Any, payload: str, channel: str = "orders") -> None:
    forger.cursor().execute("SELECT pg_notify(%s, %s)", (channel, payload))


def opened(app: Flask, query: str = "") -> Iterator[Received]:
    """Return the events of a stream, without those that only tell its position."""
    events = stream(app.test_client(), f"/sse?channel=orders{query}")
    assert next(events).event == "sse-open"
    return (event for event in events if event.event != "sse-cursor")


def test_a_forged_id_suppresses_no_event(app: Flask, forger: Any, database_url: str) -> None:
    events = opened(app)
    log_id = notify("orders", "real")
    assert (next(events).data, log_id) == ("real", log_id)
    payload = heard(forger)
    forged = [
        re.sub(r'"i":\d+', f'"i":{HUGE}', payload),
        re.sub(r'"i":\d+', f'"i":{(log_id or 0) + 1}', payload),
        re.sub(r'"s":"\w+"', '"s":"0000000000000000"', re.sub(r'"i":\d+', f'"i":{HUGE}', payload)),
        "\x1e1" + json.dumps({"i": HUGE, "s": "x", "f": True}),
        "\x1e1" + json.dumps({"i": HUGE}) + "\nx",
        "\x1e1" + json.dumps({"i": -1, "s": "x"}) + "\nx",
        "\x1e1" + json.dumps({"i": "7", "s": "x"}) + "\nx",
        "\x1e1" + json.dumps({"f": True}),
        payload,  # one that was real, once more
    ]
    for text in forged:
        send(forger, text)
        log_id = notify("orders", "real")
        event = next(events)
        assert (event.data, event.id) == ("real", str(log_id))
    # The position that the worker keeps has not moved either: nothing is missing after it was cut off.
    execute(
        database_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener'",
    )
    log_id = notify("orders", "after")
    assert (next(events).id, log_id) == (str(log_id), log_id)


def test_a_forged_beat_moves_no_position(app: Flask, forger: Any, database_url: str) -> None:
    events = opened(app)
    beat = json.loads(heard(forger, "flask_pg_sse"))
    for number in range(3):
        for text in (
            json.dumps({**beat, "head": HUGE}),
            json.dumps({"beat": str(int(beat["beat"]) + number), "head": HUGE}),
            json.dumps({"head": HUGE}), "[]", "x", "",
        ):  # fmt: skip
            send(forger, text, "flask_pg_sse")
    runtime = app.extensions["pg_sse"].runtime
    execute(
        database_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener'",
    )
    log_id = notify("orders", "real")
    event = next(events)
    assert (event.event, event.data, event.id) == ("message", "real", str(log_id))
    assert runtime._process.hub.position < HUGE
