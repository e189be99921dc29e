"""sse_relay_server, the server that `flask-pg-sse serve` stands in for, and what a page gets from either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

from tests.support.client import Response, eventually, request
from tests.support.eventsource import Dispatched, Parser
from tests.support.postgres import execute
from tests.support.redis import RedisServer
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
        # Where a stream of theirs breaks, it first writes a traceback, which takes seconds on a busy machine.
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


class Bus(Protocol):
    """What both servers listen to."""

    def send(self, channel: str, payload: str) -> object: ...

    def listeners(self) -> set[object]:
        """Return those that listen: one for each stream of theirs, which does not say when it does."""


class PostgresBus:
    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, channel: str, payload: str) -> None:
        execute(self._url, "SELECT pg_notify(%s, %s)", (channel, payload))

    def listeners(self) -> set[object]:
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query ~ '^LISTEN '"
        return set(execute(self._url, query))


class RedisBus:
    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def send(self, channel: str, payload: str) -> None:
        self._server.publish(channel, payload)

    def listeners(self) -> set[object]:
        clients: str = self._server.ask("CLIENT", "LIST", "TYPE", "pubsub").decode()
        return {line.split()[0] for line in clients.splitlines() if " sub=0" not in line}


def open_on(servers: dict[str, WebServer], bus: Bus, path: str) -> dict[str, Page]:
    """Open a stream on each server, and wait until both listen."""
    ours = Page(servers["ours"].port, path)
    assert ours.next().event == "sse-open"
    before = bus.listeners()
    theirs = Page(servers["theirs"].port, path)
    eventually(lambda: bus.listeners() - before)
    return {"theirs": theirs, "ours": ours}


def send_with_fence(bus: Bus, channel: str, payload: str) -> None:
    """Send a payload, and behind it an event at which `dispatched()` ends, which takes its id back."""
    bus.send(channel, payload)
    bus.send(channel, json.dumps({"event": "fence", "data": "fence", "id": ""}))


def dispatched(page: Page) -> str:
    """Return what a page gets up to the fence, as docs/migrate.md writes it."""
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
