"""Roles and databases that are read-only by default, and servers that are standbys."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from flask import Flask
from psycopg2.extensions import parse_dsn

from flask_pg_sse import DatabaseUnavailable, disconnect, notify, sse_cursor
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.cluster import Cluster, Standby, promote
from tests.support.postgres import execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]


@pytest.mark.parametrize("logged", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["log", "no log"])
@pytest.mark.parametrize("place", ["ROLE", pytest.param("DATABASE", marks=pytest.mark.slow)])
def test_read_only_by_default(postgres_server: postgres.Server, make_app: MakeApp, place: str, logged: bool) -> None:
    """The package's own connections ask for what they need, from `flask sse init` on."""
    with fresh_database(postgres_server) as url:
        name = parse_dsn(url)["dbname"]
        role = f"reader_{name}"
        execute(url, f"CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE {name} TO {role}")
        try:
            execute(url, f"ALTER {place} {role if place == 'ROLE' else name} SET default_transaction_read_only = on")
            theirs = url.replace("postgres@", f"{role}@")
            assert execute(theirs, "SHOW default_transaction_read_only") == [("on",)]
            app = make_app(theirs, SECRET_KEY="secret")
            if logged:
                result = app.test_cli_runner().invoke(args=["sse", "init"])
                assert result.exit_code == 0, result.output
            with app.app_context():
                events = stream(app.test_client(), "/sse?channel=orders")
                assert next(events).event == "sse-open"
                assert (sse_cursor() is not None) == logged
                assert (notify("orders", "one") is not None) == logged
                notify("orders", "two", durable=False)
                assert [next(events).data for _ in range(2)] == ["one", "two"]
                disconnect(channel="orders")
                assert next(events).event == "sse-end"
            if logged:
                result = app.test_cli_runner().invoke(args=["sse", "prune", "--max-age", "0"])
                assert result.exit_code == 0 and "Deleted" in result.output, result.output
            app.extensions["pg_sse"].close()
        finally:
            execute(url, f"SET transaction_read_only = off; DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@pytest.fixture
def standby(cluster: Cluster) -> Standby:
    """A hot standby of a primary that has the event log."""
    execute(cluster.primary.url(), schema_sql())
    return cluster.standby()


@pytest.mark.slow
@pytest.mark.parametrize("event_log", ["auto", False], ids=["log", "no log"])
def test_a_standby_is_refused_with_the_remedy(
    cluster: Cluster,
    standby: Standby,
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    event_log: bool | str,
) -> None:
    caplog.set_level(logging.INFO, "flask_pg_sse")
    remedy = f"{postgres.HOST}:{standby.port} is a standby"
    app = make_app(standby.url(), SSE_EVENT_LOG=event_log)
    with app.app_context():
        for send in (notify, sse_cursor) if event_log else (notify,):
            with pytest.raises(DatabaseUnavailable, match=remedy) as caught:
                send(*(["orders", "x"] if send is notify else []))
            assert "SSE_DATABASE_URL" in str(caught.value) and "target_session_attrs=primary" in str(caught.value)
    with pytest.raises(AssertionError, match="unavailable"):
        first = next(stream(app.test_client(), "/sse?channel=orders", timeout=20))
        raise AssertionError(first.data)
    said = [record.getMessage() for record in caplog.records if record.name.endswith((".listener", ".outage"))]
    assert said and all(remedy in line and "target_session_attrs=primary" in line for line in said), said
    result = app.test_cli_runner().invoke(args=["sse", "init"])
    assert result.exit_code == 1 and remedy in result.output and "target_session_attrs=primary" in result.output
    app.extensions["pg_sse"].close()

    # And the remedy is one.
    hosts = f"{postgres.HOST}:{standby.port},{postgres.HOST}:{cluster.primary.port}"
    app = make_app(f"postgresql://{postgres.USER}@{hosts}/postgres?target_session_attrs=primary")
    with app.app_context():
        events = stream(app.test_client(), "/sse?channel=orders")
        assert next(events).event == "sse-open"
        notify("orders", "heard")
        assert next(events).data == "heard"


@pytest.mark.slow
def test_a_listener_on_a_standby_goes_on_when_it_becomes_the_primary(
    cluster: Cluster, standby: Standby, make_app: MakeApp
) -> None:
    app = make_app(standby.url())
    with app.app_context():
        with pytest.raises(DatabaseUnavailable):
            notify("orders", "x")
        cluster.primary.stop("immediate")
        promote(standby)

        def heard() -> bool:
            events = stream(app.test_client(), "/sse?channel=orders", timeout=10)
            if next(events).event != "sse-open":
                return False
            notify("orders", "heard")
            return next(events).data == "heard"

        eventually(heard, 30)
