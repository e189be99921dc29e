"""The blueprint: parse the request, ask who may listen, answer with a stream."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue
from flask_cors import cross_origin

from . import access, shutdown
from .channels import check_channel
from .errors import ConfigurationError, EventLogMissing, InvalidChannel
from .extension import EXTENSION, ServerUrl, State, current_state, sse_cursor, sse_url
from .server import Connection, why_no_stream
from .settings import Settings
from .stream import StreamRequest, stream
from .subscription import Subscription

logger = logging.getLogger(__name__)

# Whatever the blueprint's name in an app, its commands (cli.py) are `flask sse …`.
sse_bp = Blueprint("sse", __name__, url_prefix="/sse", cli_group="sse")


class _StreamResponse(Response):
    """A response that tells its connection when the server has begun with it."""

    def __init__(self, body: Iterable[bytes], connection: Connection) -> None:
        # Passed through, so that what reads a whole body (a log, a compressor) fails or passes on, and does not wait
        # for the end of a stream.
        super().__init__(body, mimetype="text/event-stream", direct_passthrough=True)
        self._connection = connection
        # "no-transform" and nginx's own header keep proxies from collecting what should flow.
        self.headers["Cache-Control"] = "no-cache, no-transform"
        self.headers["X-Accel-Buffering"] = "no"

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        body, status, headers = self.get_wsgi_response(environ)
        self._connection.response_started(start_response(status, headers))
        return body


@sse_bp.record
def _set_up(registration: BlueprintSetupState) -> None:
    app: Any = registration.app
    registration.url_prefix = registration.url_prefix or "/"  # Flask itself takes no ""
    Settings.from_config(app.config)  # a wrong value is said at once, and read again at first use
    unknown = registration.options.keys() - _BLUEPRINT_OPTIONS
    if unknown:
        raise TypeError(f"register_blueprint(sse_bp) has unknown options: {', '.join(sorted(unknown))}.")
    if EXTENSION not in app.extensions:
        name = f"{registration.name_prefix}.{registration.name}".lstrip(".")
        app.extensions[EXTENSION] = State(app, name)
        app.context_processor(lambda: {"sse_url": sse_url, "sse_cursor": sse_cursor, "sse_server_url": ServerUrl()})
    shutdown.watch()  # here already, because under gthread only this runs in the main thread


# What Flask itself takes. Anything else is refused: a misspelt option about who may listen must not go unnoticed.
_BLUEPRINT_OPTIONS = frozenset({"url_prefix", "subdomain", "url_defaults", "name", "name_prefix", "cli_group"})


@sse_bp.get("", endpoint="stream", strict_slashes=False)
def _stream() -> ResponseReturnValue:
    return _answer(request.args.getlist("channel"))


@sse_bp.get("/<path:channel>", endpoint="channel")
def _channel(channel: str) -> ResponseReturnValue:
    return _answer([channel, *request.args.getlist("channel")])


def _answer(names: list[str]) -> ResponseReturnValue:
    state = current_state()
    runtime, settings = state.runtime, state.runtime.settings
    shutdown.watch()
    reason = why_no_stream(request.environ, shutdown.gunicorn_worker())
    if reason is not None:
        logger.error("%s", reason)
        return _refusal(500, reason)
    try:
        channels = tuple(dict.fromkeys(check_channel(name) for name in names))
    except InvalidChannel as error:
        return _refusal(400, str(error))
    if not channels:
        return _refusal(400, "The URL names no channel: add ?channel=NAME, once for each.")
    if len(channels) > settings.max_channels:
        most = settings.max_channels
        return _refusal(400, f"The URL names {len(channels)} channels, and one stream has {most} at the most.")
    for channel in channels:
        if not access.is_public(channel, settings.channels):
            return _refusal(403, _closed(channel, state))

    try:
        runtime.require_log()
    except EventLogMissing as error:
        return _refusal(500, str(error))
    connection = Connection(request.environ)
    # Last-Event-ID of an EventSource that reconnects; the query is for clients that cannot set a header.
    last_event_id = request.headers.get("Last-Event-ID") or request.args.get("last_event_id")
    if request.method == "HEAD":
        return _StreamResponse(iter(()), connection)  # a tuple would get a Content-Length, which no stream has
    subscription = Subscription(channels, settings.buffer_bytes)
    asked = StreamRequest(last_event_id or "", retry=settings.retry)
    response = _StreamResponse(stream(*runtime.streams, subscription, asked, connection), connection)
    if "flask_pg_sse.testing" in request.environ:
        request.environ["flask_pg_sse.testing"].append(subscription)
    return response


def _closed(channel: str, state: State) -> str:
    """Return why a channel is refused; say it loudly where nothing at all has been opened."""
    text = f"Channel {channel!r} is not open to you: it is not among the site's public channels (SSE_CHANNELS)."
    if not state.runtime.settings.channels and not state.warned_closed:
        state.warned_closed = True
        logger.warning(
            "A stream on channel %r was refused: no channel is open until SSE_CHANNELS names it. To open this one to "
            "everybody: %s",
            channel,
            access.how_to_open(channel),
        )
    if current_app.debug:
        return f"{text} To open it to everybody: {access.how_to_open(channel)}"
    return f"{text} Listen to one of those, or ask who runs the site to open it."


def _refusal(status: int, text: str) -> Response:
    return Response(text + "\n", status, mimetype="text/plain")


@sse_bp.after_request
def _cross_origin(response: Response) -> Response:
    """Let the pages of listed origins read the answer, and of no others, whatever CORS the app has besides.

    Flask runs a blueprint's functions before the app's, and flask-cors leaves a response alone that it has seen.
    """
    try:
        origins = current_state().runtime.settings.allowed_origins
    except ConfigurationError:  # the view has failed with it already
        return response
    origin = request.headers.get("Origin", "").lower()
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
    response = decide(lambda: response)()
    if origins:
        response.vary.add("Origin")
    return response
