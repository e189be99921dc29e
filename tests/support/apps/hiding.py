"""The basic app behind a middleware that hides the server's response from it, as those do that rewrite bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.support.apps.basic import app


class Hiding:
    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]]) -> None:
        self.wsgi_app = wsgi_app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
            write = start_response(status, headers, exc_info)
            return lambda data: write(data)

        return self.wsgi_app(environ, start)


app.wsgi_app = Hiding(app.wsgi_app)  # type: ignore[method-assign]

__all__ = ["app"]
