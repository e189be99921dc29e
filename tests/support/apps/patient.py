"""The basic app, whose streams wait ten minutes for LISTEN."""

from __future__ import annotations

from flask_pg_sse.hub import hub

hub.OPEN_TIMEOUT = 600.0  # type: ignore[attr-defined]

from tests.support.apps.basic import app  # noqa: E402

__all__ = ["app"]
