"""The basic app, whose worker listens to ten channels at most."""

from __future__ import annotations

from flask_pg_sse.engine import listens

listens.ListenTable.__init__.__kwdefaults__["most"] = 10  # type: ignore[index]

from tests.support.apps.basic import app  # noqa: E402

__all__ = ["app"]
