"""Helpers for the tests of apps that use this package; they need no database.

def test_order_is_announced(app, client):
    with capture(app) as events:
        client.post("/orders")
    assert events[0].channel == "orders"

`flask_pg_sse.testing.fixtures` has the same as a fixture of pytest.
"""

from __future__ import annotations

from .capture import Captured, Disconnected, Events, capture
from .received import Received, Stream, parse, stream

__all__ = ["Captured", "Disconnected", "Events", "Received", "Stream", "capture", "parse", "stream"]
