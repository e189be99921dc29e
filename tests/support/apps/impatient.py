"""The basic app where a stream that finds no room for a large event is told so after a second."""

from __future__ import annotations

from flask_pg_sse.hub import replay
from tests.support.apps.basic import app

__all__ = ["app"]

replay._LARGE_TIMEOUT = 1.0
