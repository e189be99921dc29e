"""Clients that are cut off at any byte and come back elsewhere have every event of the log once and in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from flask import Flask

from tests.support.eventsource import FOREIGN_IDS, Browser, check
from tests.support.postgres import execute
from tests.support.publishers import Publisher, head, install_log, logged
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]

LONG = os.environ.get("LONG") == "1"
CHANNELS = [f"room-{number}" for number in range(5)] + ["Zimmer " + "ü" * 60]  # the last travels under a hash
CHANNEL_SETS = [CHANNELS[:1], CHANNELS[:2], CHANNELS[1:4], CHANNELS[4:], CHANNELS, CHANNELS[5:]]
GEVENT = [("-w", "3"), ("-w", "1")]
GTHREAD = [("-k", "gthread", "--threads", "20"), ("-k", "gthread", "--threads", "20")]


@contextmanager
def publishing(app: Flask, url: str, channels: Sequence[str], *, pace: float, seed: int = 0) -> Iterator[None]:
    """Have all kinds of publishers go on for the time of the context, each of which must come to its end."""
    ways = ["own", "many", "sql", "transaction", "transaction"]
    publishers = [Publisher(app, url, way, channels, seed + number, pace) for number, way in enumerate(ways)]
    for publisher in publishers:
        publisher.start()
    try:
        yield
    finally:
        for publisher in publishers:
            publisher.stop()
        for publisher in publishers:
            publisher.join()
    assert not [publisher.failure for publisher in publishers if publisher.failure]


@contextmanager
def listening(browsers: Sequence[Browser]) -> Iterator[None]:
    for browser in browsers:
        browser.start()
    try:
        yield
    finally:
        for browser in browsers:
            browser.give_up()
        for browser in browsers:
            browser.join()


def run_to_the_end(browsers: Sequence[Browser], url: str, within: float) -> None:
    """Let every browser have all that was published, however often it is cut on the way."""
    target, deadline = head(url), time.monotonic() + within
    for browser in browsers:
        browser.finish(target, deadline)
    for browser in browsers:
        browser.join()


def report(name: str, browsers: Sequence[Browser], log: Sequence[object], seconds: float) -> None:
    resets = [reset.reason for browser in browsers for reset in browser.resets]
    print(
        f"\n{name}: {sum(browser.deliveries for browser in browsers)} deliveries of {len(log)} events to "
        f"{len(browsers)} browsers over {sum(browser.connections for browser in browsers)} connections in "
        f"{seconds:.0f} s; resets: { {reason: resets.count(reason) for reason in sorted(set(resets))} }"
    )


@pytest.mark.parametrize(
    ("workers", "cuts"),
    [(GEVENT, 6), pytest.param(GEVENT, 15, marks=pytest.mark.slow), pytest.param(GTHREAD, 15, marks=pytest.mark.slow)],
    ids=["gevent", "gevent for longer", "gthread"],
)
def test_no_event_is_lost_or_repeated_by_clients_that_are_cut_at_any_byte(
    database_url: str, start_server: Start, make_app: MakeApp, workers: list[tuple[str, ...]], cuts: int
) -> None:
    """Nothing else goes wrong here, so a reset is right only where an id that is not the log's was the last to come."""
    install_log(database_url)
    ports = [start_server(database_url, *options, FLASK_SSE_HEARTBEAT="0.5").port for options in workers]
    browsers = [Browser(ports, CHANNEL_SETS[seed % len(CHANNEL_SETS)], seed) for seed in range(12)]
    wanted = (200_000 if workers is GEVENT else 50_000) if LONG else 2_500
    begun = time.monotonic()
    with listening(browsers):
        with publishing(make_app(database_url), database_url, CHANNELS, pace=0.03):
            done = threading.Event()
            while sum(browser.deliveries for browser in browsers) < wanted or sum(
                browser.connections for browser in browsers
            ) < cuts * len(browsers):
                done.wait(0.1)
                assert time.monotonic() < begun + 60 + wanted / 100, "events come"
                assert not [browser.failure for browser in browsers if browser.failure]
        run_to_the_end(browsers, database_url, 60)
    log = logged(database_url)
    assert log == execute(database_url, "SELECT id, channel, data FROM flask_pg_sse.event ORDER BY id")
    report("cut at any byte", browsers, log, time.monotonic() - begun)
    for browser in browsers:
        check(browser, log)
        assert all(reset.asked in FOREIGN_IDS for reset in browser.resets), browser.resets
