"""The main job: an event sent in a view, or with NOTIFY in psql, is in every stream that listens."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.support.client import open_stream
from tests.support.postgres import execute
from tests.support.servers import WebServer


def test_notify_in_a_view_reaches_every_stream(database_url: str, start_server: Callable[..., WebServer]) -> None:
    server = start_server(database_url)
    with open_stream(server.port, "orders") as first, open_stream(server.port, "orders") as second:
        server.post("/notify/orders", json.dumps({"data": {"id": 7}, "event": "created"}).encode())
        for stream in (first, second):
            message = stream.event()
            assert (message.event, message.json) == ("created", {"id": 7})


def test_plain_notify_from_psql_reaches_the_stream(database_url: str, start_server: Callable[..., WebServer]) -> None:
    server = start_server(database_url)
    with open_stream(server.port, "orders") as stream:
        execute(database_url, "NOTIFY orders, 'hello'")
        message = stream.event()
        assert (message.event, message.data, message.id) == ("message", "hello", None)
