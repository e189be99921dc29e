"""Helpers for the tests of apps that use this package; they need no database.

def test_order_is_announced(app, client):
    with capture(app) as events:
        client.post("/orders")
    assert events[0].channel == "orders"

`flask_pg_sse.testing.fixtures` has the same as a fixture of pytest.
"""

from __future__ import annotations

from flask import Flask

from ..web.state import state_of
from .capture import Captured, Disconnected, Events, capture
from .received import Received, Stream, parse, stream

__all__ = ["Captured", "Disconnected", "Events", "Received", "Stream", "capture", "close", "parse", "stream"]


def close(app: Flask) -> None:
    """End what the app has started in this process: its streams, threads and connections. The next use starts it again.

    A suite that makes an app for each test need not call it. What an app has started ends with the app, when Python's
    garbage collector frees it; `close()` ends it at once. Takes at most some seconds.
    """
    state_of(app).close()
