"""`sse-status`: a page can show that its stream is not live, five seconds after the database has gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from flask_pg_sse import schema_sql
from flask_pg_sse.engine.base import Readiness
from flask_pg_sse.hub import hub as hub_module
from flask_pg_sse.hub.subscription import Subscription
from tests.support.client import Message, Response, open_stream
from tests.support.link import Link, through
from tests.support.model import FIRST, ModelLog, World
from tests.support.postgres import execute
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
AWAY = b'event: sse-status\ndata: {"live": false}\n\n'
BACK = b'event: sse-status\ndata: {"live": true}\n\n'


@pytest.fixture
def line(database_url: str) -> Iterator[Link]:
    with Link(urlsplit(database_url).port or 0) as link:
        yield link


def next_of(response: Response, *passed_over: str) -> Message:
    message = response.event()
    while message.event in passed_over:
        message = response.event()
    return message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silence"])
@pytest.mark.parametrize("listens", ["log", "no log", "poll"])
def test_a_stream_is_told_after_five_seconds_and_again_after_what_it_missed(
    database_url: str, line: Link, start_server: Start, how: str, listens: str
) -> None:
    logged = listens != "no log"
    env = {"FLASK_SSE_HEARTBEAT": "1"}
    if logged:
        execute(database_url, schema_sql())
    if listens == "poll":
        env["FLASK_SSE_LISTEN_URL"] = "poll"
    server = start_server(through(line, database_url), **env)
    with open_stream(server.port, "a", timeout=20) as one, open_stream(server.port, "b", timeout=20) as other:
        begun = time.monotonic()
        getattr(line, how)()
        for response in (one, other):
            message = next_of(response, "sse-cursor")
            assert (message.event, message.json, message.id) == ("sse-status", {"live": False}, None)
        assert 4.5 < time.monotonic() - begun < 15
        send = "SELECT flask_pg_sse.notify('a', 'missed')" if logged else "NOTIFY a, 'missed'"
        execute(database_url, send)
        line.restore()
        missed = next_of(one, "sse-cursor")
        assert (missed.event, missed.data) == (("message", "missed") if logged else ("sse-reset", missed.data))
        message = next_of(one, "sse-cursor")
        assert (message.event, message.json) == ("sse-status", {"live": True})
        message = next_of(other, "sse-cursor", "sse-reset")
        assert (message.event, message.json) == ("sse-status", {"live": True})
        with open_stream(server.port, "a") as later:
            execute(database_url, send.replace("missed", "live"))
            for response in (one, later):
                assert next_of(response, "sse-cursor").data == "live"


@pytest.mark.slow
def test_a_short_interruption_is_not_told(logged_url: str, line: Link, start_server: Start) -> None:
    server = start_server(through(line, logged_url), FLASK_SSE_HEARTBEAT="1")
    with open_stream(server.port, "a") as response:
        for _ in range(3):
            line.cut()
            time.sleep(0.5)
            line.restore()
            execute(logged_url, "SELECT flask_pg_sse.notify('a', 'x')")  # it is over when this comes
            assert next_of(response, "sse-cursor").data == "x"
        time.sleep(6)
        execute(logged_url, "SELECT flask_pg_sse.notify('a', 'y')")
        assert next_of(response, "sse-cursor").data == "y"


class Clock:
    """The monotonic time, which stands still until it is moved."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(hub_module, "time", clock)
    return clock


def opened(world: World, channel: str) -> Subscription:
    stream = Subscription([channel], 1000)
    world.hub.open(stream)
    world.hub.go_live(stream)
    return stream


def come(stream: Subscription) -> bytes:
    output = b""
    while stream._buffer:
        output += stream.take() or b""
    return output


def test_each_stream_is_told_once(clock: Clock) -> None:
    log = ModelLog(1)
    world = World(log, heartbeat=1000)
    early = opened(world, "a")
    world.hub.ready(Readiness.AWAY)
    clock.now += 4.9
    world.hub.beat()
    assert come(early) == b""
    world.hub.ready(Readiness.LOG_MISSING)  # it is still the same outage
    clock.now += 0.2
    for _ in range(3):
        world.hub.beat()
    assert come(early) == AWAY
    behind = opened(world, "a")  # it has opened, and its client reads slowly
    behind.sent = FIRST
    behind.lineage = world.hub.lineage
    behind.fall_behind()
    world.hub.ready(Readiness.READY)
    missed = log.append("a", 20)
    world.deliver(1)
    assert come(early) == missed[1]
    world.hub.caught_up()
    world.hub.caught_up()
    assert come(early) == BACK
    assert come(behind) == b"", "it has not been told that it was away"
    for stream in (early, behind):
        world.hub.close(stream)


def test_a_stream_that_is_behind_is_told_too_and_again_when_it_has_caught_up(clock: Clock) -> None:
    log = ModelLog(1)
    world = World(log, heartbeat=1000)
    stream = opened(world, "a")
    stream.sent = FIRST
    stream.lineage = world.hub.lineage
    stream.fall_behind()
    world.hub.ready(Readiness.AWAY, silent_for=5.0)
    world.hub.beat()
    assert world.hub.liveness.tell_behind(stream) == AWAY and world.hub.liveness.tell_behind(stream) == b""
    world.hub.ready(Readiness.READY)
    world.hub.caught_up()
    missed = log.append("a", 20)
    world.deliver(1)
    output = b"".join(world.replay.read(stream)) + come(stream)
    assert output.endswith(BACK) and missed[1] in output
    world.hub.close(stream)
