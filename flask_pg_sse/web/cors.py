"""Cross-origin access: which sites' pages may read a stream."""

from __future__ import annotations

import re
from collections.abc import Collection

from flask import Response, request
from flask_cors import cross_origin
from flask_cors.core import FLASK_CORS_EVALUATED

from ..errors import ConfigurationError
from .state import current_state


def cross_origin_headers(response: Response) -> Response:
    """Let the pages of listed origins read the answer, and of no others, whatever CORS the app has besides.

    Flask runs a blueprint's functions before the app's, and flask-cors leaves a response alone that it has seen.
    """
    try:
        origins = current_state().runtime.settings.allowed_origins
    except ConfigurationError:  # the view has failed with it already
        return response
    # CORS(app) has had its hand on what an error handler returned, before any function that runs after a request.
    for name in [name for name, _ in response.headers if name.lower().startswith("access-control-")]:
        del response.headers[name]
    origin = request.environ.get("HTTP_ORIGIN", "").lower()
    if not origin and "*" not in origins:  # the site's own pages ask for no leave: spare the way through flask-cors
        setattr(response, FLASK_CORS_EVALUATED, True)
    else:
        _decide(response, origin, origins)
    if origins:
        response.vary.add("Origin")
    return response


def _decide(response: Response, origin: str, origins: Collection[str]) -> None:
    listed = bool(origin) and origin in origins
    # As a pattern of its own: flask-cors takes any text with brackets, an IPv6 origin say, for a regular expression.
    exactly = re.compile(re.escape(origin) + r"\Z", re.IGNORECASE)
    decide = cross_origin(
        origins=[exactly] if listed else "*" if "*" in origins else [],
        supports_credentials=listed,
        send_wildcard=not listed,
        always_send=False,
        automatic_options=False,
        vary_header=False,
        methods=["GET", "HEAD"],
        allow_headers="*",
        expose_headers=None,
        max_age=None,
        allow_private_network=False,
    )
    decide(lambda: response)()
