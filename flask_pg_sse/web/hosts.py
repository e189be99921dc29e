"""Let the streams answer in apps that choose their rules by the host (`host_matching=True`), or by a subdomain."""

from __future__ import annotations

import functools
from typing import Any

from flask import current_app, has_request_context, request
from flask.blueprints import BlueprintSetupState
from werkzeug.routing import BaseConverter

# The part of a rule that takes any host. Flask gives it to the views, which ignore it.
_HOST = "sse_host"


class _HostConverter(BaseConverter):
    """A host in a rule, with its port. Flask's own would write an IPv6 address as %5B…%5D."""

    def to_url(self, value: Any) -> str:
        return str(value)


def match_hosts(registration: BlueprintSetupState) -> None:
    """Have the rules that follow answer at the host of the option `host`, or at any host.

    Without a host, a rule of an app with `host_matching=True` answers nowhere. Raises TypeError for an option with
    which no stream could be reached.
    """
    app: Any = registration.app
    host = registration.options.get("host")
    if not app.url_map.host_matching:
        if host is not None:
            raise TypeError("register_blueprint(sse_bp, host=…) needs an app with host_matching=True.")
        if registration.subdomain and not app.subdomain_matching:
            raise TypeError(
                f"register_blueprint(sse_bp, subdomain={registration.subdomain!r}) needs "
                "Flask(__name__, subdomain_matching=True), and the site's name as SERVER_NAME: without them every "
                "stream is 404."
            )
        return
    if registration.subdomain:
        raise TypeError("An app with host_matching=True has no subdomains: use register_blueprint(sse_bp, host=…).")
    app.url_map.converters[_HOST] = _HostConverter
    rules: Any = registration
    rules.add_url_rule = functools.partial(registration.add_url_rule, host=host or f"<{_HOST}:{_HOST}>")


def add_host(endpoint: str, values: dict[str, Any]) -> None:
    """Give `url_for()` the host of a stream: that of the request, or `SERVER_NAME`."""
    if _HOST not in values and current_app.url_map.is_endpoint_expecting(endpoint, _HOST):
        host = request.host if has_request_context() else current_app.config["SERVER_NAME"]
        if host:
            values[_HOST] = host
