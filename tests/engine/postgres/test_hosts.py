"""A URL with several hosts: which of them is taken, how fast, and what is said of the others."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from flask import Flask

from flask_pg_sse import DatabaseUnavailable, notify
from flask_pg_sse.engine.postgres import connect
from flask_pg_sse.engine.postgres.connect import connect as own_connection
from flask_pg_sse.engine.postgres.connect import execute as own_execute
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.testing import stream
from tests.support.cluster import Cluster
from tests.support.link import Link
from tools import postgres

MakeApp = Callable[..., Flask]


def url_of(database_url: str, *ports: int, **options: str) -> str:
    """Return the URL of a database with other hosts."""
    name = database_url.rsplit("/", 1)[1]
    query = "&".join(f"{key}={value}" for key, value in options.items())
    return f"postgresql://postgres@{','.join(f'127.0.0.1:{port}' for port in ports)}/{name}?{query}"


def port_of(url: str) -> int:
    """Return the port of the server that answers at a URL."""
    with closing(own_connection(to_dsn(url, "the test"), "own")) as own:
        return int(own_execute(own, "SELECT inet_server_port()", timeout=5)[0][0])


@pytest.mark.slow
def test_a_first_host_that_loses_packets_does_not_use_up_the_time_of_the_second(
    postgres_server: postgres.Server, database_url: str, make_app: MakeApp
) -> None:
    with Link(postgres_server.port) as lost:
        lost.silence()
        app = make_app(url_of(database_url, lost.port, postgres_server.port))
        since = time.monotonic()
        with closing(stream(app.test_client(), "/sse?channel=orders", timeout=20)) as events, app.app_context():
            assert next(events).event == "sse-open"
            notify("orders", "heard")
            assert next(events).data == "heard"
        assert time.monotonic() - since < 8  # it was "unavailable" after ten
        app.extensions["pg_sse"].close()


def test_the_hosts_are_tried_in_order_and_the_refused_cost_nothing(
    postgres_server: postgres.Server, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_HEAD_START", 60.0)
    with socket.socket() as taken:  # and not listening
        taken.bind(("127.0.0.1", 0))
        nobody = taken.getsockname()[1]
        since = time.monotonic()
        assert port_of(url_of(database_url, nobody, nobody, postgres_server.port)) == postgres_server.port
        assert time.monotonic() - since < 30
        with pytest.raises(DatabaseUnavailable, match="refused"):
            port_of(url_of(database_url, nobody, nobody))


@pytest.mark.slow
def test_hosts_that_lose_packets_are_given_up_together(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_HEAD_START", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        since = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="no answer in time"):
            port_of(url_of(database_url, port, port, port, connect_timeout="3"))
        assert 3 < time.monotonic() - since < 9  # nine and more, one after the other


def test_a_connection_notices_a_network_that_vanishes(database_url: str) -> None:
    """And a URL may say otherwise."""
    for url, expected in [(database_url, 10000), (f"{database_url}?tcp_user_timeout=4000", 4000)]:
        with (
            closing(own_connection(to_dsn(url, "the test"), "own")) as own,
            closing(socket.socket(fileno=os.dup(own.fileno()))) as line,
        ):
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == expected
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


@pytest.mark.slow
def test_without_target_session_attrs_a_standby_that_stands_first_is_named_with_the_remedy(
    cluster: Cluster, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    standby = cluster.standby()
    url = url_of(cluster.primary.url(), standby.port, cluster.primary.port)
    app = make_app(url)
    with closing(stream(app.test_client(), "/sse?channel=orders", timeout=20)) as events:
        assert next(events).event == "sse-end"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    refused = [line for line in said if "A stream on channel" in line]
    assert len(refused) == 1 and len(said) > 1
    for line in set(said) - set(refused):
        assert f":{standby.port} is a standby" in line and "SSE_DATABASE_URL names several hosts" in line
        assert "add ?target_session_attrs=primary" in line
    with app.app_context(), pytest.raises(DatabaseUnavailable, match="target_session_attrs=primary"):
        notify("orders", "x")
