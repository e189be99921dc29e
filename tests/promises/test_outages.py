"""The same clients while PostgreSQL is stopped and started, workers are killed and lines fall silent."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from flask import Flask

from tests.promises.test_resume import CHANNEL_SETS, CHANNELS, LONG, listening, publishing, report, run_to_the_end
from tests.support.client import eventually
from tests.support.eventsource import FOREIGN_IDS, Browser, check, for_ever
from tests.support.link import Link, through
from tests.support.postgres import connect, execute
from tests.support.processes import children
from tests.support.publishers import head, install_log, logged
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]


class Pruning(threading.Thread):
    """Takes what is older than `seconds` out of the log, a few events at a time and without a pause between."""

    def __init__(self, url: str, seconds: float) -> None:
        super().__init__(name="pruning")
        self.pruned = 0
        self._url = url
        self._seconds = seconds
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            with contextlib.suppress(psycopg2.Error):
                connection = connect(self._url)
                with contextlib.closing(connection), connection.cursor() as cursor:
                    while not self._stop_asked.wait(0.05):
                        query = "SELECT flask_pg_sse.prune_v1(make_interval(secs => %s), 50)"
                        cursor.execute(query, (self._seconds,))
                        self.pruned += cursor.fetchone()[0] or 0
            self._stop_asked.wait(0.05)

    def __enter__(self) -> Pruning:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_asked.set()
        self.join()


@pytest.fixture
def url(own_postgres: postgres.Server) -> str:
    install_log(own_postgres.url())
    # A past, for the pruning to have something to do from the first moment. Workers prune what is a day old themselves.
    execute(own_postgres.url(), "SELECT flask_pg_sse.publish_v1('past', array_fill('{}'::json, ARRAY[2000]), NULL)")
    execute(own_postgres.url(), "UPDATE flask_pg_sse.event SET created_at = now() - interval '1 hour'")
    return own_postgres.url()


@pytest.fixture
def line(own_postgres: postgres.Server) -> Iterator[Link]:
    """The connection between a worker and PostgreSQL."""
    with Link(own_postgres.port) as link:
        yield link


@pytest.mark.parametrize(
    "modes", [["immediate"], pytest.param(["fast", "immediate"] * (8 if LONG else 1), marks=pytest.mark.slow)], ids=len
)
def test_nothing_is_missing_after_postgres_workers_and_lines_were_away(
    own_postgres: postgres.Server,
    url: str,
    line: Link,
    start_server: Start,
    make_app: MakeApp,
    modes: list[postgres.StopMode],
) -> None:
    """The first server is near PostgreSQL, the second behind a line that falls silent; clients come through another."""
    options = {"FLASK_SSE_HEARTBEAT": "0.5", "FLASK_SSE_RETRY": "300"}
    near = start_server(url, "-w", "2", **options)
    far = start_server(through(line, url), "-w", "1", **options)
    chooser = random.Random(5)
    begun = time.monotonic()
    with Link(near.port) as to_near, Link(far.port) as to_far, Pruning(url, 60) as pruning:
        ports = [to_near.port, to_far.port]
        # The last three stay where they are: their streams live through all of it.
        browsers = [Browser(ports, CHANNEL_SETS[seed % len(CHANNEL_SETS)], seed) for seed in range(8)]
        browsers += [
            Browser([far.port], CHANNELS, 100, stays=for_ever),
            Browser([far.port], CHANNELS[:1], 101, for_ever),
        ]
        browsers += [Browser([near.port], CHANNELS, 102, stays=for_ever)]
        behind_the_line = browsers[8:10]
        with listening(browsers):
            for number, mode in enumerate(modes):
                with publishing(make_app(url), url, CHANNELS, pace=0.05, seed=10 * number):
                    events_come(browsers)
                    line.silence()
                    events_come(browsers[:1])
                    os.kill(chooser.choice(children(near.process.pid)), signal.SIGKILL)
                    to_near.cut()
                    to_near.restore()
                    if mode == "immediate":
                        line.cut()  # what was silent ends; else the worker has to find out by itself
                    line.restore()
                    events_come(behind_the_line)  # the worker has noticed
                    own_postgres.stop(mode)
                    own_postgres.start()
                    events_come(browsers)
            run_to_the_end(browsers, url, 60)
        eventually(lambda: pruning.pruned >= 2000, 20)
    log = logged(url)
    report("outages", browsers, log, time.monotonic() - begun)
    for browser in browsers:
        check(browser, log)
        assert all(reset.asked in FOREIGN_IDS for reset in browser.resets), browser.resets
    assert [browser.connections for browser in behind_the_line] == [1, 1], "their streams stayed open"
    assert "Traceback" not in near.log() + far.log()


def events_come(browsers: list[Browser]) -> None:
    """Wait until each has a few events more."""
    before = [browser.deliveries for browser in browsers]

    def all_have() -> bool:
        assert not [browser.failure for browser in browsers if browser.failure]
        return all(browser.deliveries >= had + 5 for browser, had in zip(browsers, before, strict=True))

    eventually(all_have, 40, "events come on every stream")


@pytest.mark.slow
def test_whoever_was_away_for_too_long_is_told_and_goes_on_from_there(
    own_postgres: postgres.Server, url: str, start_server: Start, make_app: MakeApp
) -> None:
    options = {"FLASK_SSE_HEARTBEAT": "0.2", "FLASK_SSE_RETENTION": "1.5"}
    ports = [start_server(url, "-w", "1", **options).port for _ in range(2)]
    begun = time.monotonic()
    browsers = [Browser(ports, CHANNEL_SETS[seed % len(CHANNEL_SETS)], seed, away=3.0) for seed in range(9)]
    browsers.append(Browser(ports[:1], CHANNELS, 100, for_ever))
    too_old = 0
    with Pruning(url, 1.5), listening(browsers):
        with publishing(make_app(url), url, CHANNELS, pace=0.05):
            events_come(browsers[-1:])
            own_postgres.stop("fast")
            own_postgres.start()

            def some_were_too_late() -> bool:
                assert not [browser.failure for browser in browsers if browser.failure]
                resets = [reset for browser in browsers for reset in browser.resets if reset.asked not in FOREIGN_IDS]
                return len(resets) >= (200 if LONG else 12)

            eventually(some_were_too_late, 300 if LONG else 90)
        run_to_the_end(browsers, url, 60)
    log = logged(url)
    report("retention too short", browsers, log, time.monotonic() - begun)
    for browser in browsers:
        check(browser, log)
        for reset in browser.resets:
            assert reset.reason == ("unknown-id" if reset.asked == "seed-7" or reset.asked == "0042" else "too-old")
            assert reset.id <= head(url)
            too_old += reset.asked not in FOREIGN_IDS
    assert too_old
