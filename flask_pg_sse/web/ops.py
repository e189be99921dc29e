"""The blueprint for those who operate the app: `/metrics`, closed until it is opened, `/livez` and `/readyz`."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from typing import Any

from flask import Blueprint, current_app, request
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue

from ..errors import ConfigurationError
from .authorize import check_hook
from .health import HEALTH
from .metrics import exposition
from .response import refusal
from .state import State, current_state

_EXTENSION = "pg_sse_ops"
_OPTIONS = frozenset({"url_prefix", "subdomain", "url_defaults", "name", "name_prefix", "authorize"})
_CLOSED = (
    "/metrics is closed: set SSE_OPS_TOKEN, and send it as Authorization: Bearer; or give "
    "register_blueprint(ops_bp, authorize=…) a function that returns True."
)

# A function without arguments, called in the request's context. Only True opens the metrics.
MaySee = Callable[[], bool]

ops_bp = Blueprint("sse_ops", __name__)


@ops_bp.record
def _set_up(registration: BlueprintSetupState) -> None:
    unknown = registration.options.keys() - _OPTIONS
    if unknown:
        raise TypeError(f"register_blueprint(ops_bp) has unknown options: {', '.join(sorted(unknown))}.")
    hook = registration.options.get("authorize")
    if hook is not None:
        check_hook(hook, "authorize")
    app: Any = registration.app
    app.extensions[_EXTENSION] = hook


for _name, _view in HEALTH.items():
    ops_bp.add_url_rule(f"/{_name}", _name, _view)


@ops_bp.get("/metrics")
def metrics() -> ResponseReturnValue:
    """Return the metrics of all workers of this app on this host."""
    state = current_state()
    if not _may_see(state):
        if current_app.extensions[_EXTENSION] is None and state.runtime.settings.ops_token is None:
            state.refusals.log("metrics", "%s", _CLOSED)
        answer = refusal(401, _CLOSED if current_app.debug else "Not authorized.")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer
    try:
        text, content_type = exposition(state.runtime, request.headers.get("Accept", ""))
    except ConfigurationError as error:
        state.refusals.log("no metrics", "%s", error, level=logging.ERROR)
        return refusal(500, str(error))
    return text, 200, {"Content-Type": content_type, "Cache-Control": "no-store"}


def _may_see(state: State) -> bool:
    token = state.runtime.settings.ops_token
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    if token is not None and kind.lower() == "bearer":
        # A header has no blanks at its ends, and a secret that is read from a file has a line end there.
        expected = (token.encode() if isinstance(token, str) else token).strip()
        # As bytes, in which werkzeug read it. The time that this takes does not depend on their content.
        if expected and hmac.compare_digest(given.strip().encode("latin-1", "replace"), expected):
            return True
    hook: MaySee | None = current_app.extensions[_EXTENSION]
    return hook is not None and hook() is True
