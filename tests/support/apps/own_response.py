"""The app of `direct` with a class of its own for responses, as Flask allows."""

from __future__ import annotations

from typing import Any

from flask import Response
from werkzeug.datastructures import Headers

from tests.support.apps.direct import app


class OwnResponse(Response):
    default_mimetype = "application/json"

    def __init__(self, response: Any = None, status: Any = None, headers: Any = None, mimetype: Any = None) -> None:
        super().__init__(response, status, headers, mimetype)  # what Flask gives
        self.own = "yes"

    @property
    def _body(self) -> str:
        return self.own

    def get_wsgi_headers(self, environ: Any) -> Headers:
        headers = super().get_wsgi_headers(environ)
        headers["X-Own"] = self._body
        return headers


app.response_class = OwnResponse

__all__ = ["app"]
