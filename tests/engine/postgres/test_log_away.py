"""Streams that ask an event log which does not answer: each is told so in time, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql, sse_cursor
from flask_pg_sse.engine.base import Tail
from flask_pg_sse.engine.postgres import history, pool
from flask_pg_sse.engine.postgres.connect import connect as own_connection
from flask_pg_sse.engine.postgres.connect import execute as own_execute
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.errors import DatabaseUnavailable
from flask_pg_sse.event import end_block
from flask_pg_sse.hub.replay import _Attempts
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.link import Link, through
from tests.support.log import PUBLISH, WAIT_FOR_A_STANDBY, InThread, connected, logged, run, standby_away
from tests.support.model import FIRST, ModelLog, World
from tests.support.postgres import execute
from tools import postgres

MakeApp = Callable[..., Flask]
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'flask_pg_sse %'"


def test_streams_that_resume_do_not_wait_one_behind_the_other(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream has its own channel, and must ask the log for its last events; LISTEN is confirmed."""
    execute(database_url, schema_sql())
    monkeypatch.setattr(history, "_TAILS", "SELECT pg_sleep(60); " + history._TAILS)
    app = make_app(database_url)
    begun = next(stream(app.test_client(), "/sse?channel=a"))
    monkeypatch.setattr(pool, "TIMEOUT", 1.0)
    heard: list[str] = []

    def resume(number: int) -> None:
        [event] = stream(app.test_client(), f"/sse?channel=room-{number}&last_event_id={begun.id}", timeout=60)
        heard.append(event.data)

    since = time.monotonic()
    for thread in [InThread(resume, number) for number in range(20)]:
        thread.join()
    # One attempt for which they have waited, and one for those who came when it had begun; it was one for each.
    assert time.monotonic() - since < 10
    assert heard == ['{"reason": "unavailable"}'] * 20
    assert not app.extensions["pg_sse"].runtime.worker.streams[1]._unfilled


@pytest.mark.slow
def test_what_waits_for_a_lock_does_not_pile_up_in_postgresql(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would take all connections. And an event that notify() could not send is not sent later."""
    execute(database_url, schema_sql())
    app = make_app(database_url)
    with app.app_context():
        first = notify("orders", "first")
        with connected(database_url) as holder, monkeypatch.context() as patch:
            patch.setattr(pool, "TIMEOUT", 0.3)
            run(holder, "LOCK TABLE flask_pg_sse.event IN ACCESS EXCLUSIVE MODE")
            for _ in range(10):
                with pytest.raises(DatabaseUnavailable):
                    notify("orders", "not sent")
                with pytest.raises(DatabaseUnavailable):
                    sse_cursor()
            eventually(lambda: execute(database_url, SESSIONS)[0][0] <= 1, 20, "no session waits for nobody")
        last = notify("orders", "last")
    assert [(row[0], row[3]) for row in logged(database_url)] == [(first, "first"), (last, "last")]


def test_an_event_whose_connection_breaks_on_the_way_is_not_sent_twice(
    postgres_server: postgres.Server, database_url: str, make_app: MakeApp
) -> None:
    """PostgreSQL does not see that the line was cut, and goes on; the caller is told that the outcome is unknown."""
    execute(database_url, schema_sql())
    with Link(postgres_server.port) as line:
        app = make_app(through(line, database_url))

        def call() -> None:
            with app.app_context(), pytest.raises(DatabaseUnavailable):
                notify("orders", "once")

        with app.app_context():
            notify("orders", "first")
        with connected(database_url) as holder:
            run(holder, PUBLISH, ("other", ["{}"], ["holds the lock of those who publish"]))
            calling = InThread(call)
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            eventually(lambda: execute(database_url, waits)[0][0] == 1)
            line.drop()  # a new connection would stand
            calling.join()
            holder.commit()
        eventually(lambda: [row[3] for row in logged(database_url) if row[1] == "orders"] == ["first", "once"])
        with app.app_context():
            notify("orders", "last")
    assert [row[3] for row in logged(database_url) if row[1] == "orders"] == ["first", "once", "last"]


@pytest.mark.slow
def test_a_long_answer_may_take_its_time_and_silence_may_not(
    postgres_server: postgres.Server, database_url: str
) -> None:
    with Link(postgres_server.port) as line:
        line.slow_down()
        with closing(own_connection(to_dsn(through(line, database_url), "the test"), "own")) as own:
            since = time.monotonic()
            [(text,)] = own_execute(own, "SELECT repeat('x', 3000000)", timeout=2, limit=60)
            assert len(text) == 3_000_000
            assert time.monotonic() - since > 2, "the line is too fast for this test"
            with pytest.raises(TimeoutError):
                own_execute(own, "SELECT pg_sleep(60)", timeout=1, limit=60)
            execute(database_url, "SELECT pg_terminate_backend(%s)", (own.info.backend_pid,))  # it sleeps on


def test_what_waits_for_the_lock_of_notify_does_not_pile_up_either(
    own_postgres: postgres.Server, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its commit, where no statement's limit counts: here behind one that waits for a standby that is away."""
    url = own_postgres.url()
    execute(url, schema_sql())
    monkeypatch.setattr(pool, "TIMEOUT", 0.3)
    app = make_app(url)
    with standby_away(own_postgres):
        hanging = InThread(execute, url, PUBLISH, ("orders", ["{}"], ["hangs"]))
        eventually(lambda: len(execute(url, WAIT_FOR_A_STANDBY)) == 1)
        with app.app_context():
            for _ in range(10):
                with pytest.raises(DatabaseUnavailable):
                    notify("orders", "not kept", durable=False)
        eventually(lambda: execute(url, SESSIONS)[0][0] <= 1, 20, "no session waits for nobody")
    hanging.join()


class StandingStill(ModelLog):
    """Answers its `question`-th question, or fails, when it is let go on."""

    def __init__(self, question: int = 1) -> None:
        super().__init__(0)
        self._question = question
        self.asked = threading.Event()
        self.let = threading.Event()
        self.fails = False

    def _fail(self) -> None:
        if self.pages < self._question:
            return
        self.asked.set()
        assert self.let.wait(20)
        if self.fails:
            raise DatabaseUnavailable("The model says no.")

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        return []


@pytest.mark.parametrize(("size", "question"), [(10, 1), (10_000, 2)], ids=["a page", "a large event"])
def test_who_is_ended_while_the_log_is_read_is_not_sent_what_it_had(size: int, question: int) -> None:
    model = StandingStill(question)
    world = World(model)
    model.append("a", size)
    world.deliver(1)
    subscription = Subscription(["a"], 1000)
    world.hub.open(subscription)
    subscription.sent = FIRST
    output: list[bytes] = []
    reading = InThread(lambda: output.extend(world.replay.read(subscription)))
    assert model.asked.wait(20)
    subscription.end(end_block("revoked", 1000), drop=True)
    model.let.set()
    reading.join()
    assert output == []
    world.hub.close(subscription)


def test_what_cannot_be_read_is_not_asked_for_by_each_who_waits_for_it() -> None:
    model = StandingStill()
    model.fails = True
    world = World(model, heartbeat=15)
    attempts = _Attempts()
    failures: list[DatabaseUnavailable] = []

    def read() -> None:
        try:
            list(world.replay._alone(attempts, Subscription(["a"], 1000), lambda: model.page(["a"], FIRST, 0, 10**6)))
        except DatabaseUnavailable as error:
            failures.append(error)

    threads = [InThread(read) for _ in range(10)]
    eventually(lambda: sum(map(len, attempts.turns._waiting._waiting.values())) == 9)
    model.let.set()
    for thread in threads:
        thread.join()
    assert len(failures) == 10
    assert model.pages == 1
