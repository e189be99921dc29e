"""Cross-origin access, by flask-cors: the sites whose pages may read a stream."""

from __future__ import annotations

import re

from flask import Response, request
from flask_cors import cross_origin
from flask_cors.core import FLASK_CORS_EVALUATED

from ..errors import ConfigurationError
from .state import current_state


def cross_origin_headers(response: Response) -> Response:
    """Let pages of the origins in `SSE_ALLOWED_ORIGINS` read the response. The app's own CORS settings do not matter.

    Flask runs a blueprint's `after_request` functions before the app's, and flask-cors does not change a response that
    it has already evaluated.
    """
    try:
        origins = current_state().runtime.settings.allowed_origins
    except ConfigurationError:  # the view has already failed with it
        return response
    # CORS(app) adds its headers to the response of an error handler, before any `after_request` function runs.
    for name in [name for name, _ in response.headers if name.lower().startswith("access-control-")]:
        del response.headers[name]
    origin = request.environ.get("HTTP_ORIGIN", "").lower()
    if origin and (origin in origins or "*" in origins):
        _allow(response, origin, with_credentials=origin in origins)
    else:
        setattr(response, FLASK_CORS_EVALUATED, True)
    if origins:  # even if this origin is not allowed: a cache must not serve one origin's answer to another
        response.vary.add("Origin")
    return response


def _allow(response: Response, origin: str, *, with_credentials: bool) -> None:
    """Add flask-cors' headers: for this origin with credentials, or for all origins without."""
    # A compiled pattern, because flask-cors treats a text with brackets, such as an IPv6 origin, as a pattern.
    this_origin = re.compile(re.escape(origin) + r"\Z", re.IGNORECASE)
    allow = cross_origin(
        origins=[this_origin] if with_credentials else "*",
        supports_credentials=with_credentials,
        send_wildcard=not with_credentials,
        methods=["GET", "HEAD"],
        allow_headers="*",
        # Flask answers OPTIONS, and `Vary` is set for every response.
        automatic_options=False,
        vary_header=False,
        # Given here, because the app's CORS_… configuration applies to options that are omitted.
        expose_headers=None,
        max_age=None,
        allow_private_network=False,
    )
    allow(lambda: response)()
