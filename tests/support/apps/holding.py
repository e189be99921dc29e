"""An app whose middleware holds each block of an answer back for a while, as one that collects and compresses does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from tests.support.apps.basic import app

_SECONDS = 1.3
_served = app.wsgi_app


def _hold(body: Any) -> Iterator[bytes]:
    try:
        for block in body:
            time.sleep(_SECONDS)
            yield block
    finally:
        body.close()


def _wsgi_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    body = _served(environ, start_response)
    return _hold(body) if environ["PATH_INFO"].startswith("/sse") else body


app.wsgi_app = _wsgi_app  # type: ignore[method-assign]
