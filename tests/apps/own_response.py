"""The app of `direct` with a class of its own for responses, as Flask allows."""

from __future__ import annotations

from typing import Any

from flask import Response
from werkzeug.datastructures import Headers

from tests.apps.direct import app


class OwnResponse(Response):
    default_mimetype = "application/json"

    def __init__(self, *args: Any, own: int = 1, **options: Any) -> None:
        options.pop("direct_passthrough", None)
        super().__init__(*args, **options)

    def get_wsgi_headers(self, environ: Any) -> Headers:
        headers = super().get_wsgi_headers(environ)
        headers["X-Own"] = "yes"
        return headers


app.response_class = OwnResponse

__all__ = ["app"]
