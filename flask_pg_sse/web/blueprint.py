"""The blueprint: parse the request, ask who may listen, answer with a stream."""

from __future__ import annotations

import functools
import logging
import math
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from flask import Request, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue
from flask_cors import cross_origin
from flask_cors.core import FLASK_CORS_EVALUATED
from werkzeug.datastructures import Headers
from werkzeug.exceptions import NotFound

from .. import access, event, shutdown
from ..admission import NotNow
from ..channels import check_channel
from ..errors import ConfigurationError, EventLogMissing, InvalidChannel
from ..runtime import Process
from ..server import Connection, why_no_stream
from ..settings import Settings, secret_keys
from ..stream import stream
from ..subscription import Subscription
from ..tokens import Token, read_token, without_token
from . import authorize as guard
from .api import EXTENSION, ServerUrl, State, current_state, sse_cursor, sse_url
from .authorize import SSEBlueprint

logger = logging.getLogger(__name__)

# Whatever the blueprint's name in an app, its commands (cli.py) are `flask sse …`.
sse_bp = SSEBlueprint("sse", __name__, url_prefix="/sse", cli_group="sse")


_HEADERS = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    # "no-transform" and nginx's own header keep proxies from collecting what should flow.
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)


class _Begins:
    """Mixed into a class of responses: tells the connection when the server has begun with this one."""

    def __init__(self, body: Iterable[bytes], begin: Callable[[Any], None]) -> None:
        """Make a response as Flask would. `begin` gets what `start_response` has returned."""
        super().__init__(body, headers=_HEADERS)  # type: ignore[call-arg]
        # What reads a whole body (a log, a compressor) fails or passes on, and does not wait for the end of a stream.
        self.direct_passthrough = True
        self._pg_sse_begin = begin

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        def start(*answer: Any) -> Any:
            write = start_response(*answer)
            self._pg_sse_begin(write)
            return write

        body: Iterable[bytes] = super().__call__(environ, start)  # type: ignore[misc]
        return body


class _StreamResponse(_Begins, Response):
    def get_wsgi_headers(self, environ: Any) -> Headers:
        """Return the headers as they are. Werkzeug would copy them, for what it may have to do to those of others."""
        return self.headers


@functools.cache
def _response_class(apps: type[Response]) -> type[Any]:
    """Return the class for an app's streams. Of the app's own `response_class` Flask would make it that one."""
    return _StreamResponse if apps is Response else type("StreamResponse", (_Begins, apps), {})


@sse_bp.record
def _set_up(registration: BlueprintSetupState) -> None:
    app: Any = registration.app
    registration.url_prefix = registration.url_prefix or "/"  # Flask itself takes no ""
    # A wrong value is said at once, and read again at first use.
    secret_keys(Settings.from_config(app.config), app.config)
    unknown = registration.options.keys() - _BLUEPRINT_OPTIONS
    if unknown:
        raise TypeError(f"register_blueprint(sse_bp) has unknown options: {', '.join(sorted(unknown))}.")
    if EXTENSION not in app.extensions:
        name = f"{registration.name_prefix}.{registration.name}".lstrip(".")
        app.extensions[EXTENSION] = State(app, name)
        app.context_processor(lambda: {"sse_url": sse_url, "sse_cursor": sse_cursor, "sse_server_url": ServerUrl()})
    app.extensions[EXTENSION].set_hooks(registration.options.get("authorize"), registration.options.get("subject"))
    shutdown.watch()  # here already, because under gthread only this runs in the main thread


# What Flask itself takes, and our own. Anything else is refused: a misspelt option about who may listen must not go
# unnoticed.
_BLUEPRINT_OPTIONS = frozenset(
    {"url_prefix", "subdomain", "url_defaults", "name", "name_prefix", "cli_group", "authorize", "subject"}
)


@sse_bp.app_url_value_preprocessor
def _mask_token(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """Keep tokens out of access logs: gunicorn writes the request's line from these when the response has ended.

    Flask calls this before any `before_request`, which may answer in the view's place, and also where no view will be
    asked: for a CORS preflight, for one of our URLs with another method, or with a slip in it. But the query of what no
    rule at all is for stays: an app may pass that on to another, whose token it is.
    """
    environ = request.environ
    if "token=" not in environ.get("QUERY_STRING", ""):
        return
    if endpoint is None or current_app.blueprints.get(request.blueprint or "") is sse_bp:
        names = ["RAW_URI", "REQUEST_URI"]
        if not isinstance(request.routing_exception, NotFound):
            names.append("QUERY_STRING")  # Flask's request has its own copy
        for name in names:
            if name in environ:
                environ[name] = without_token(environ[name])


# `others` are an app's: parts of its url_prefix, or its url_defaults.
@sse_bp.get("", endpoint="stream", strict_slashes=False)
def _stream(**others: object) -> ResponseReturnValue:
    return _answer([])


@sse_bp.get("/<path:channel>", endpoint="channel")
def _channel(channel: str, **others: object) -> ResponseReturnValue:
    try:
        request.environ["PATH_INFO"].encode("latin-1").decode()
    except UnicodeDecodeError:  # werkzeug has put U+FFFD for it; here too it becomes what no channel's name may hold
        channel = channel.replace("\ufffd", "\udcff")
    return _answer([channel])


def _answer(names: list[str]) -> ResponseReturnValue:
    # The object itself: each look through Flask's proxy takes its time.
    here: Request = request._get_current_object()  # type: ignore[attr-defined]
    environ = here.environ
    state = current_state()
    runtime, settings = state.runtime, state.runtime.settings
    process = runtime.process  # which has found out what worker it is in
    reason = why_no_stream(environ, shutdown.gunicorn_worker())
    if reason is not None:
        logger.error("%s", reason)
        return _refusal(500, reason)
    try:
        query = _query(here.query_string, settings.max_channels)
        channels = tuple(dict.fromkeys(check_channel(name) for name in names + query.get("channel", [])))
    except InvalidChannel as error:
        return _refusal(400, str(error))
    except ValueError as error:
        return _refusal(414, str(error))
    if not channels:
        return _refusal(400, "The URL names no channel: add ?channel=NAME, once for each.")
    if len(channels) > settings.max_channels:
        most = settings.max_channels
        return _refusal(400, f"The URL names {len(channels)} channels, and one stream has {most} at the most.")

    # Last-Event-ID of an EventSource that reconnects; the query is for clients that cannot set a header.
    last_event_id = environ.get("HTTP_LAST_EVENT_ID") or query.get("last_event_id", [""])[0]
    connection = Connection(environ)
    try:
        subscription = _admitted(here, state, process, connection, channels, query.get("token", [""])[0])
        if here.method == "HEAD":
            return _response(_Blocks(connection), connection, settings)
        hub, replay = process.streams
    except _Refused as refused:
        return _refusal(403, str(refused))
    except EventLogMissing as error:
        return _refusal(500, str(error))
    except NotNow as later:
        return _ended(later.reason, last_event_id)
    body = stream(hub, replay, subscription, last_event_id, connection)
    response = _response(body, connection, settings, direct_write=settings.direct_write)
    if "flask_pg_sse.testing" in environ:
        environ["flask_pg_sse.testing"].append(subscription)
    return response


class _Refused(Exception):
    """This client may not have this stream; the text says why."""


def _admitted(
    here: Request, state: State, process: Process, connection: Connection, channels: Collection[str], signed: str
) -> Subscription:
    """Return the stream that the client may have. Raises `_Refused`, `NotNow`, and HTTP errors of the app's."""
    asked_at = time.monotonic()
    runtime, settings = state.runtime, state.runtime.settings
    token = read_token(runtime.keys(), signed) if signed else None
    if token is not None and token.expires_at is not None and token.expires_at <= time.time():
        raise NotNow("expired")
    authorize = state.authorize or sse_bp.default_authorize
    opened = token.channels if token is not None else frozenset[str]()
    to_ask = [name for name in channels if name not in opened and not access.is_public(name, settings.channels)]
    closed = functools.partial(_closed, state=state, asked=authorize is not None, bad_token=bool(signed) and not token)
    if to_ask and authorize is None:
        raise _Refused(closed(to_ask[0]))
    subscription = Subscription(channels, settings.buffer_bytes, access.Terms(asked_at=asked_at))
    subscription.connection = connection
    try:
        with process.admission.place(subscription):
            subjects = guard.subjects_of(state.subject or sse_bp.default_subject, token)
            if subjects is None:
                raise _Refused("This site cannot tell whose stream this would be. Ask who runs it to look at its log.")
            each = settings.max_streams_per_client is not None
            clients = access.counted_under(subjects, here.remote_addr) if each else ()
            terms = access.Terms(subjects, clients, asked_at, *_end_of(token, settings.max_age))
            process.admission.hold_as(subscription, terms)
            process.wait_until_decidable(asks=bool(to_ask) and here.method != "HEAD")
            for channel in to_ask:
                if not guard.may_listen(authorize, channel):
                    raise _Refused(closed(channel))
    except guard.HookFailed:
        raise NotNow("unavailable") from None
    return subscription


# Bytes of a query beside its channels, and for each channel: its name with every byte as %XX, and again in the token.
_QUERY_BYTES = 16384
_QUERY_BYTES_EACH = 1200
# Parameters that are none of ours: a site may add some to every URL.
_OTHER_PARAMETERS = 100


def _query(raw: bytes, max_channels: int) -> dict[str, list[str]]:
    """Return the parameters of a query. ValueError where it is larger than any that could be answered.

    Looked at before it is taken apart, which for a million parameters takes a second.
    """
    most = _QUERY_BYTES + max_channels * _QUERY_BYTES_EACH
    if len(raw) > most:
        raise ValueError(f"The URL's query has {len(raw)} bytes, and {most} at the most are read.")
    if raw.count(b"&") >= max_channels + _OTHER_PARAMETERS:
        raise ValueError(
            f"The URL's query has {raw.count(b'&') + 1} parameters; one stream has {max_channels} channels."
        )
    found: dict[str, list[str]] = {}
    for parameter in raw.split(b"&"):
        name, _, value = parameter.replace(b"+", b" ").partition(b"=")
        found.setdefault(_unquoted(name), []).append(_unquoted(value))
    return found


def _unquoted(raw: bytes) -> str:
    """Return a name or a value. Bytes that are not UTF-8 become lone surrogates, which no channel's name may hold."""
    return unquote_to_bytes(raw).decode("utf-8", "surrogateescape")


def _end_of(token: Token | None, max_age: float | None) -> tuple[float, str]:
    """Return the monotonic time at which a stream has to end, and why."""
    ends = [(math.inf, "")]
    if max_age is not None:  # not all at once that were opened at once, as after a deploy
        ends.append((time.monotonic() + max_age * random.uniform(0.9, 1.0), "max_age"))
    if token is not None and token.expires_at is not None:
        ends.append((time.monotonic() + token.expires_at - time.time(), "expired"))
    return min(ends)


def _closed(channel: str, state: State, *, asked: bool, bad_token: bool) -> str:
    """Return why a channel is refused; say it loudly where nothing at all has been opened."""
    patterns = state.runtime.settings.channels
    if not patterns and not asked and not state.warned_closed:
        state.warned_closed = True
        logger.warning(
            "A stream on channel %r was refused: no channel is open until SSE_CHANNELS names it. To open this one to "
            "everybody: %s",
            channel,
            access.how_to_open(channel),
        )
    debug = current_app.debug
    return guard.closed_text(channel, debug=debug, bad_token=bad_token, patterns=patterns, asked=asked)


def _response(
    body: Iterable[bytes], connection: Connection, settings: Settings, *, direct_write: bool | str = False
) -> Response:
    begin = functools.partial(
        connection.response_started, body=id(body), direct_write=direct_write, send_timeout=settings.send_timeout
    )
    response: Response = _response_class(current_app.response_class)(body, begin)  # type: ignore[arg-type]
    return response


class _Blocks:
    """The body of a stream that ends at once. (Of a tuple werkzeug would say the length.)"""

    def __init__(self, connection: Connection, *blocks: bytes) -> None:
        self._connection = connection
        self._blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._blocks)

    def close(self) -> None:  # werkzeug iterates over nothing for HEAD, and closes even so
        self._connection.stop_reading()


def _refusal(status: int, text: str) -> Response:
    return current_app.response_class(text + "\n", status, mimetype="text/plain")


def _ended(reason: str, last_event_id: str) -> Response:
    """Refuse for the moment: a browser's EventSource comes back after this, and never after an error status.

    The client's position goes back to it as the event's id: a page that fetches a new URL can go on from there.
    """
    settings = current_state().runtime.settings
    block = event.end_block(reason, settings.retry, id=event.to_log_id(last_event_id))
    connection = Connection(request.environ)
    return _response(_Blocks(connection, *() if request.method == "HEAD" else (block,)), connection, settings)


@sse_bp.after_request
def _cross_origin(response: Response) -> Response:
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
