"""The basic app, with UNLISTEN at once."""

from __future__ import annotations

from flask_pg_sse.engine.postgres import listener

listener.PostgresListener.__init__.__kwdefaults__["linger"] = 0.0  # type: ignore[index]

from tests.support.apps.basic import app  # noqa: E402

__all__ = ["app"]
