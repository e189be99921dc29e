"""The basic app that looks twice a second, and not twice a minute, which server its address leads to."""

from __future__ import annotations

from flask_pg_sse.engine.postgres import pool, watch
from tests.support.apps.basic import app

__all__ = ["app"]

watch._EVERY = 0.5
watch._AGAIN = 0.1
pool._MOST_AGE = 1.0
