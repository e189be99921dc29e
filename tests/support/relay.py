"""sse_relay_server, the server that `flask-pg-sse serve` stands in for, and what a page gets from either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.support.client import Response, eventually, request
from tests.support.eventsource import Dispatched, Parser
from tests.support.postgres import execute
from tests.support.servers import WebServer

BREAKS = "every stream on the channel breaks"
NOTHING = "nothing"


def relay(port: int) -> list[str]:
    """Return its command line. Its `sse-relay-server` is this module's `main()`."""
    return [sys.executable, "-m", "sse_relay_server.main", "--host", "127.0.0.1", "--port", str(port)]


def ours(port: int) -> list[str]:
    options = ("--", "-c", "python:tests.support.apps.gunicorn_conf")
    return [sys.executable, "-m", "flask_pg_sse.cli.main", "serve", "--port", str(port), *options]


def start_both(start_server: Callable[..., WebServer], database_url: str, **env: str) -> dict[str, WebServer]:
    return {
        "theirs": start_server(database_url, command=relay, ready="/ready", **env),
        "ours": start_server(database_url, command=ours, ready="/livez", **env),
    }


class Page:
    """A stream as an EventSource reads it."""

    def __init__(self, port: int, path: str) -> None:
        self._response: Response = request(port, path, timeout=60)
        assert self._response.status == 200, self._response.read()
        self._parser = Parser("")
        self._events: list[Dispatched] = []

    def next(self) -> Dispatched:
        """Return the next event. Raises EOFError at the end of the stream."""
        response: Any = self._response
        while not self._events:
            if response.finished and not response.body:
                raise EOFError
            if not response.body:
                response._read_more()
            body, response.body = response.body.replace(b"\r\n", b"\n"), b""
            self._events += self._parser.feed(body)
        return self._events.pop(0)

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_on(servers: dict[str, WebServer], database_url: str, path: str) -> dict[str, Page]:
    """Open a stream on each server, and wait until both listen to PostgreSQL."""
    # Theirs has a connection for each stream, and does not say when it listens.
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query ~ '^LISTEN '"
    before = execute(database_url, query)
    pages = {whose: Page(server.port, path) for whose, server in servers.items()}
    assert pages["ours"].next().event == "sse-open"
    eventually(lambda: set(execute(database_url, query)) - set(before))
    return pages


def dispatched(page: Page, database_url: str, channel: str, payload: str) -> str:
    """Notify, and return what the page gets of it, as docs/migrate.md writes it."""
    for text in (payload, json.dumps({"event": "fence", "data": "fence"})):
        execute(database_url, "SELECT pg_notify(%s, %s)", (channel, text))
    found = []
    try:
        while (event := page.next()).event != "fence":
            name = "" if event.event == "message" else f"`{event.event}`: "
            number = f", id `{event.last_event_id}`" if event.last_event_id else ""
            found.append(f"{name}`{event.data}`{number}".replace("\n", "⏎"))
    except EOFError:
        return BREAKS
    assert len(found) <= 1
    return found[0] if found else NOTHING
