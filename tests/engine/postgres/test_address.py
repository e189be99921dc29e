"""The listener and the pools follow the address: to another server that it leads to, and away from dead connections."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse import notify
from flask_pg_sse.engine.postgres import pool, watch
from flask_pg_sse.engine.postgres.connect import ask_for_an_answer
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.client import eventually
from tests.support.cluster import Cluster, Standby, caught_up, promote
from tests.support.link import Link, through
from tests.support.log import InThread
from tests.support.postgres import execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]
LISTENING = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener'"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_EVERY", 0.5)
    monkeypatch.setattr(watch, "_AGAIN", 0.1)
    monkeypatch.setattr(pool, "_MOST_AGE", 1.0)


@contextmanager
def opened(app: Flask, url: str = "/sse?channel=orders") -> Iterator[Iterator[Received]]:
    with closing(stream(app.test_client(), url, timeout=30)) as events:
        assert next(events).event == "sse-open"
        # Heartbeats may bring an id.
        yield (event for event in events if not (event.event or "").startswith("sse-"))


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in list(caplog.records) if record.levelno >= level]


def listens_at(server: postgres.Server) -> bool:
    return execute(server.url(), LISTENING) == [(1,)]


@pytest.fixture
def promoted(cluster: Cluster) -> tuple[Cluster, Standby]:
    """A cluster with the event log, and a standby that has everything and has become a primary beside the old one."""
    execute(cluster.primary.url(), schema_sql())
    standby = cluster.standby()
    caught_up(standby, cluster.primary)
    return cluster, standby


@pytest.mark.slow
def test_the_listener_leaves_an_old_primary_that_lives_on(
    promoted: tuple[Cluster, Standby], make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    cluster, new = promoted
    app = make_app(cluster.url)
    with opened(app) as events, app.app_context():
        notify("orders", "before")
        assert next(events).data == "before"
        caught_up(new, cluster.primary)
        promote(new)
        cluster.lead_to(new, drop=False)
        execute(new.url(), "SELECT flask_pg_sse.notify('orders', 'after')")
        assert next(events).data == "after"
        assert listens_at(new)
        eventually(lambda: not listens_at(cluster.primary))
        notify("orders", "by the app")
        assert next(events).data == "by the app"
    [moved] = [text for text in said(caplog) if "The listener moves there" in text]
    assert execute(new.url(), "SELECT (pg_control_system()).system_identifier::text")[0][0] in moved


@pytest.mark.slow
def test_a_host_that_became_read_only_in_place_is_left(
    promoted: tuple[Cluster, Standby], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next beat: the look every half minute is not needed for it."""
    monkeypatch.setattr(watch, "_EVERY", 60.0)
    cluster, new = promoted
    hosts = f"{postgres.HOST}:{cluster.primary.port},{postgres.HOST}:{new.port}"
    url = f"postgresql://{postgres.USER}@{hosts}/postgres?target_session_attrs=read-write"
    app = make_app(url, SSE_HEARTBEAT=0.5)
    with opened(app) as events, app.app_context():
        notify("orders", "before")
        assert next(events).data == "before"
        caught_up(new, cluster.primary)
        promote(new)
        execute(cluster.primary.url(), "ALTER SYSTEM SET default_transaction_read_only = on")
        execute(cluster.primary.url(), "SELECT pg_reload_conf()")
        eventually(lambda: listens_at(new), 20)
        notify("orders", "after")
        assert next(events).data == "after"
    assert execute(new.url(), "SELECT count(*) FROM flask_pg_sse.event WHERE data = 'after'") == [(1,)]


@pytest.mark.slow
def test_the_listener_does_not_follow_to_a_standby(
    promoted: tuple[Cluster, Standby], make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    cluster, standby = promoted
    app = make_app(cluster.url, SSE_LISTEN_URL=cluster.url)
    with opened(app) as events:
        cluster.lead_to(standby, drop=False)
        eventually(lambda: "it is a standby" in caplog.text, 20)
        execute(cluster.primary.url(), "SELECT flask_pg_sse.notify('orders', 'still heard')")
        assert next(events).data == "still heard"
    assert "The listener moves" not in caplog.text


class Alternating(Link):
    """Leads every second connection to another port."""

    def __init__(self, target: int, other: int) -> None:
        super().__init__(target)
        self._next = other

    def _accept(self) -> None:
        super()._accept()
        self._target, self._next = self._next, self._target


@pytest.mark.slow
def test_an_address_that_leads_now_here_now_there_is_a_warning_and_no_move(
    own_postgres: postgres.Server, postgres_server: postgres.Server, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    with Alternating(own_postgres.port, postgres_server.port) as address:
        app = make_app(through(address, own_postgres.url()))
        with opened(app) as events:
            eventually(lambda: "now to another" in caplog.text, 20)
            looks = watch_of(app)._sightings
            before = looks._unsteady_until
            eventually(lambda: looks._unsteady_until > before + 2)  # many looks later
            execute(own_postgres.url(), "NOTIFY orders, 'still heard'")
            assert next(events).data == "still heard"
        app.extensions["pg_sse"].close()
    [warning] = said(caplog)
    assert "target_session_attrs=primary" in warning


def watch_of(app: Flask) -> watch.AddressWatch:
    found: watch.AddressWatch = app.extensions["pg_sse"].runtime.worker.engine._watch
    return found


@pytest.mark.parametrize("required", ["auto", pytest.param(True, marks=pytest.mark.slow)], ids=["auto", "log required"])
def test_an_own_address_for_listen_that_leads_elsewhere_is_an_error_with_the_remedy(
    postgres_server: postgres.Server,
    logged_url: str,
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    required: bool | str,
) -> None:
    """Also where the listener has no connection, because the other database lacks the log."""
    with fresh_database(postgres_server) as other:
        app = make_app(logged_url, SSE_LISTEN_URL=other, SSE_EVENT_LOG=required)
        app.test_client().get("/sse?channel=orders")
        errors = eventually(lambda: [text for text in said(caplog, logging.ERROR) if "leads to" in text], 20)
        app.extensions["pg_sse"].close()
        for part in (logged_url.rsplit("/", 1)[1], other.rsplit("/", 1)[1], "Remedy: set SSE_LISTEN_URL to"):
            assert part in errors[0]


@pytest.mark.slow
def test_two_addresses_of_one_database_are_no_error(
    postgres_server: postgres.Server, logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    with Link(postgres_server.port) as line:
        app = make_app(logged_url, SSE_LISTEN_URL=through(line, logged_url))
        with opened(app) as events, app.app_context():
            eventually(lambda: watch_of(app)._looked_at > 0, 20)
            first = watch_of(app)._looked_at
            eventually(lambda: watch_of(app)._looked_at > first, 20)
            notify("orders", "heard")
            assert next(events).data == "heard"
        app.extensions["pg_sse"].close()
    assert not said(caplog)


@pytest.mark.slow
def test_connections_that_were_dropped_in_silence_cost_one_wait_and_no_error(
    postgres_server: postgres.Server, logged_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a NAT or a firewall does it: what stood is lost without a word, and new connections are let through."""
    monkeypatch.setattr(pool, "_MOST_AGE", 60.0)
    with Link(postgres_server.port) as line:
        app = make_app(through(line, logged_url))
        with opened(app) as events, app.app_context():
            start = threading.Barrier(4)

            def send() -> None:
                start.wait()
                with app.app_context():
                    for _ in range(5):
                        notify("orders", "before")

            for thread in [InThread(send) for _ in range(4)]:
                thread.join()
            received = [next(events) for _ in range(20)]
            threading.Event().wait(2 * pool._FRESH)
            line.silence()
            line.restore()
            waits = 0

            def counted(*arguments: Any) -> None:
                nonlocal waits
                try:
                    ask_for_an_answer(*arguments)
                except TimeoutError:
                    waits += 1
                    raise

            monkeypatch.setattr(pool, "ask_for_an_answer", counted)
            since = time.monotonic()
            for number in range(4):
                notify("orders", str(number))
            assert waits == 1
            with opened(app, f"/sse?channel=orders&last_event_id={received[-1].id}") as resumed:
                assert [next(resumed).data for _ in range(4)] == ["0", "1", "2", "3"]
            assert [next(events).data for _ in range(4)] == ["0", "1", "2", "3"]
            assert time.monotonic() - since < 22
        app.extensions["pg_sse"].close()
