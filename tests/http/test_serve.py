"""The server that stands alone, as its users start it: `flask-pg-sse serve` and `gunicorn flask_pg_sse.serve:app`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.support.client import open_stream, request
from tests.support.postgres import execute
from tests.support.servers import WebServer, gunicorn

# One control socket for all tests would be a file in the home directory.
OPTIONS = ("--", "-c", "python:tests.support.apps.gunicorn_conf")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flask_pg_sse.cli.main", *arguments]


@pytest.fixture
def serve(start_server: Callable[..., WebServer]) -> Callable[..., WebServer]:
    """Start the server on a free port, with options of `flask-pg-sse serve` and variables of the environment."""

    def start(database_url: str, *options: str, **env: str) -> WebServer:
        own, _, gunicorns = " ".join(options).partition("--")

        def line(port: int) -> list[str]:
            return command("serve", "--port", str(port), *own.split(), *OPTIONS, *gunicorns.split())

        return start_server(database_url, command=line, ready="/livez", **env)

    return start


def first_event(port: int, path: str, database_url: str, channel: str) -> str | None:
    with request(port, path) as response:
        assert response.status == 200, response.read()
        assert response.next().event == "sse-open"
        execute(database_url, "SELECT pg_notify(%s, 'hello')", (channel,))
        return response.event().data


def test_an_event_from_psql_reaches_a_stream(database_url: str, serve: Callable[..., WebServer]) -> None:
    server = serve(database_url)
    for path in ("/?channel=orders", "/orders", "/channel=orders"):
        assert first_event(server.port, path, database_url, "orders") == "hello"


def test_gunicorn_serves_the_same_app(database_url: str, start_server: Callable[..., WebServer]) -> None:
    server = start_server(
        database_url, command=lambda port: gunicorn("flask_pg_sse.serve:app", port), ready="/livez", SSE_RETRY="77"
    )
    with request(server.port, "/orders") as response:
        opening = response.next()
        assert (opening.event, opening.retry) == ("sse-open", 77)
    open_stream(server.port, "orders", path="/").close()
