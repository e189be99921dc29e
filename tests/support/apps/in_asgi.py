"""The basic app as an ASGI app, by either wrapper. `uvicorn --interface wsgi` takes a2wsgi's if that is installed."""

from __future__ import annotations

from typing import Any

import a2wsgi
from uvicorn.middleware import wsgi

from tests.support.apps.basic import app

by_a2wsgi: Any = a2wsgi.WSGIMiddleware(app)  # type: ignore[arg-type]
by_uvicorn: Any = wsgi._WSGIMiddleware(app)  # type: ignore[arg-type]
