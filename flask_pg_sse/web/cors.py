"""Other sites: whose requests are refused at once, and whose pages may read a stream (by flask-cors)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from flask import Response, request
from flask_cors import cross_origin
from flask_cors.core import FLASK_CORS_EVALUATED

from ..errors import ConfigurationError
from .state import current_state

# What may open a stream, as a browser names it: fetch() and EventSource, and a page that a person opens by hand.
_DESTINATIONS = ("empty", "document")


def why_other_site(environ: Mapping[str, Any], origins: Collection[str]) -> str | None:
    """Return why a request is refused as another site's, or None. `origins` may read the streams.

    A browser says in each request which site's page makes it, and for what. A page of another site could not read the
    stream, but it could hold the user's places, and learn from the status which channels the user may listen to.
    Clients that are no browsers send none of these headers. https://www.w3.org/TR/fetch-metadata/
    """
    destination = environ.get("HTTP_SEC_FETCH_DEST", "empty")
    if destination not in _DESTINATIONS:
        return f"A stream cannot be used as {destination!r}: open it with EventSource or fetch()."
    if environ.get("HTTP_SEC_FETCH_SITE") != "cross-site" or _is_listed(_origin_of(environ), origins):
        return None
    return (
        "A page of another site asked for this stream. Its origin, such as https://www.example.org, must be in "
        "SSE_ALLOWED_ORIGINS."
    )


def _origin_of(environ: Mapping[str, Any]) -> str:
    return str(environ.get("HTTP_ORIGIN", "")).lower()


def _is_listed(origin: str, origins: Collection[str]) -> bool:
    return bool(origin) and (origin in origins or "*" in origins)


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
    origin = _origin_of(request.environ)
    if _is_listed(origin, origins):
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
