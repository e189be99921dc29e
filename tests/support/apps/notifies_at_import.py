"""The basic app, which sends an event while it is loaded."""

from __future__ import annotations

from flask_pg_sse import notify
from tests.support.apps.basic import app

with app.app_context():
    notify("orders", "loaded")

__all__ = ["app"]
