"""The blueprint: parse the request, check permission, answer with a stream."""

from __future__ import annotations

import functools
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flask import Blueprint, Request, current_app, request
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import NotFound
from werkzeug.routing import PathConverter

from ..channels import check_channel, heard_unquoted, unquoted
from ..concurrency.greenlets import is_copy
from ..errors import ConfigurationError, InvalidChannel
from ..hub.admission import TryLater
from ..hub.stream import stream
from ..hub.subscription import Subscription, Terms
from ..hub.worker import Worker
from ..server import shutdown
from ..server.boot import when_booted
from ..server.capacity import why_no_stream
from ..server.connection import Connection
from ..settings import Settings, secret_keys
from ..tokens import Tokens, read_tokens, without_token
from . import after_response, authorize, work
from .api import ServerUrl, sse_cursor, sse_url
from .authorize import Authorizer, SubjectOf, check_hook, name_of
from .cors import cross_origin_headers, why_other_site
from .hosts import add_host, match_hosts
from .request import OR_SEVERAL, parse_query, position_of
from .response import Blocks, answer_without_session, ended, refusal, stream_response
from .state import EXTENSION, State, current_state

logger = logging.getLogger(__name__)


_F = TypeVar("_F", bound=Callable[..., Any])


class SSEBlueprint(Blueprint):
    """The blueprint, with the two hooks that check permission for all apps of the process.

    The hooks that an app gives to `register_blueprint()` or to `PgSSE` take precedence in that app.
    """

    default_authorize: Authorizer | None = None
    default_subject: SubjectOf | None = None

    def authorize(self, function: _F) -> _F:
        """Set `function(channel)` as the authorizer: it decides on channels that are neither public nor signed for.

        It runs in the request's context, where `session` and flask_login's `current_user` work, once for each such
        channel. `True` opens the channel, and `False` refuses it. An HTTP exception (`abort(401)`) becomes the answer.
        If the function fails, the stream does not begin now, and the browser tries again.

        Raises TypeError if `function` is not callable, or is a coroutine function. Raises RuntimeError if another
        authorizer is set already, because it decides for all apps of the worker. For one app, use
        `register_blueprint(sse_bp, authorize=…)`.
        """
        self.default_authorize = _only(self.default_authorize, function, "authorize")
        return function

    def subject(self, function: _F) -> _F:
        """Set `function()` as the function that names the client: by a string, a whole number, a UUID or None.

        This is usually the user's id; None means that the client is not known. `disconnect(subject=…)` finds streams by
        it, and `SSE_MAX_STREAMS_PER_CLIENT` counts by it. The function runs in the request's context, once for every
        stream. Raises the same errors as `authorize`.
        """
        self.default_subject = _only(self.default_subject, function, "subject")
        return function


def _only(before: Any, function: _F, name: str) -> _F:
    check_hook(function, name)
    if before is not None and before is not function:
        raise RuntimeError(
            f"@sse_bp.{name} was set before, to {name_of(before)}, and all apps of the worker share it. Give each app "
            f"its own: register_blueprint(sse_bp, {name}=…)."
        )
    return function


class _ChannelConverter(PathConverter):
    """A channel's name in a path, which may begin with a slash. For Flask's own, `/sse//a` is a misspelt `/sse/a`."""

    regex = ".+?"
    part_isolating = False  # it may contain slashes

    def to_url(self, value: object) -> str:
        if not {".", ".."}.isdisjoint(str(value).split("/")):
            raise InvalidChannel(
                f"The channel {value!r} cannot be a path: browsers take . and .. out. Use sse_url({value!r})."
            )
        return super().to_url(value)


# The commands (`cli/commands.py`) are `flask sse …`, even if an app gives the blueprint another name.
sse_bp = SSEBlueprint("sse", __name__, url_prefix="/sse", cli_group="sse")


@sse_bp.record
def _set_up(registration: BlueprintSetupState) -> None:
    app: Any = registration.app
    registration.url_prefix = registration.url_prefix or "/"  # Flask itself does not accept ""
    app.url_map.converters["sse_channel"] = _ChannelConverter
    # A wrong value fails here already. The settings are read again at first use.
    secret_keys(Settings.from_config(app.config), app.config)
    unknown = registration.options.keys() - _BLUEPRINT_OPTIONS
    if unknown:
        raise TypeError(f"register_blueprint(sse_bp) has unknown options: {', '.join(sorted(unknown))}.")
    match_hosts(registration)
    if EXTENSION not in app.extensions:
        name = f"{registration.name_prefix}.{registration.name}".lstrip(".")
        app.extensions[EXTENSION] = State(app, name)
        work.watch(app)
        after_response.watch(app)
        # As `url_for`: also in macros that a template imports without its context.
        for name, thing in (("sse_url", sse_url), ("sse_cursor", sse_cursor), ("sse_server_url", ServerUrl())):
            app.jinja_env.globals[name] = thing
    app.extensions[EXTENSION].set_hooks(registration.options.get("authorize"), registration.options.get("subject"))
    app.extensions[EXTENSION].runtime.warn_of_unknown_keys()
    shutdown.watch()  # here already, because under gthread only this code runs in the main thread
    when_booted(app.extensions[EXTENSION].runtime.appear)


# Flask's options and the package's own. Any other option is refused: a misspelt hook must not go unnoticed.
_BLUEPRINT_OPTIONS = frozenset(
    {"url_prefix", "host", "subdomain", "url_defaults", "name", "name_prefix", "cli_group", "authorize", "subject"}
)


sse_bp.url_defaults(add_host)


@sse_bp.app_url_value_preprocessor
def _mask_token(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """Keep tokens out of access logs: gunicorn logs the request's line from the environ when the response has ended.

    Flask calls this before any `before_request` function, which may answer instead of the view. It also calls this if
    no view will run: for a CORS preflight, or for a URL of the blueprint with another method or a typing error. But
    QUERY_STRING stays as it is if no rule matches the URL: the app may pass the request on to another app, and the
    token may be that app's.
    """
    environ = request.environ
    query = environ.get("QUERY_STRING", "")
    if "token=" not in query and "%" not in query:
        return
    if endpoint is None or current_app.blueprints.get(request.blueprint or "") is sse_bp:
        names = ["RAW_URI", "REQUEST_URI"]
        if not isinstance(request.routing_exception, NotFound):
            names.append("QUERY_STRING")  # Flask's request object has its own copy
        for name in names:
            if name in environ:
                environ[name] = without_token(environ[name])


# `others` come from the app: the variable parts of its url_prefix, or its url_defaults.
@sse_bp.get("", endpoint="stream", strict_slashes=False)
def _stream(**others: object) -> ResponseReturnValue:
    return _answer([])


@sse_bp.get("/<sse_channel:channel>", endpoint="channel")
def _channel(channel: str, **others: object) -> ResponseReturnValue:
    try:
        request.environ["PATH_INFO"].encode("latin-1").decode()
    except UnicodeDecodeError:  # werkzeug has put U+FFFD for it; make it a character that no channel's name may have
        channel = channel.replace("\ufffd", "\udcff")
    return _answer([channel])


def _answer(names: list[str]) -> ResponseReturnValue:
    state = current_state()
    try:
        return _stream_or_refusal(names, state)
    except ConfigurationError as error:  # at first use: no database, or a value that was changed after registration
        return _cannot_serve(state, str(error))


def _cannot_serve(state: State, reason: str) -> ResponseReturnValue:
    """Refuse a stream that cannot be served until the app or its server is changed."""
    state.refusals.log(reason, "%s", reason, level=logging.ERROR)
    state.refusals.count("misconfigured")
    return refusal(500, reason)


def _wrong_request(state: State, status: int, reason: str, kind: str = "bad_request") -> ResponseReturnValue:
    """Refuse a request that is wrong, or not allowed, however often it is repeated."""
    state.refusals.log(f"{status}", "A stream was refused (%d): %s", status, reason)
    state.refusals.count(kind)
    return refusal(status, reason)


def _stream_or_refusal(names: list[str], state: State) -> ResponseReturnValue:
    # The object itself, because every access through Flask's proxy takes time.
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    environ = current.environ
    runtime, settings = state.runtime, state.runtime.settings
    if (reason := why_other_site(environ, settings.allowed_origins)) is not None:
        return _wrong_request(state, 403, reason, "other_site")
    worker = runtime.worker  # its creation has found gunicorn's worker, which the next line needs
    reason = why_no_stream(environ, shutdown.gunicorn_worker(), limited=settings.max_streams is not None)
    if reason is not None:
        return _cannot_serve(state, reason)
    try:
        query = parse_query(current.query_string, settings.max_channels)
    except ValueError as error:
        return _wrong_request(state, 414, str(error))
    tokens = read_tokens(runtime.keys(), query.get("token", ()))
    names = names + query.get("channel", [])
    try:
        channels = tuple(dict.fromkeys(map(check_channel, tokens.channels_with(names))))
    except InvalidChannel as error:
        return _wrong_request(state, 400, str(error))
    if not names and tokens.others:
        not_ours = "The URL's token, which has the channels, is not this site's, or was cut off."
        return _wrong_request(state, 403, not_ours, "closed")
    if not channels:
        return _wrong_request(state, 400, "The URL names no channel: add ?channel=NAME, once for each channel.")
    if len(channels) > settings.max_channels:
        too_many = f"The URL names {len(channels)} channels, and one stream has at most {settings.max_channels}."
        return _wrong_request(state, 400, f"{too_many} {OR_SEVERAL}")

    if not state.no_channels.isdisjoint(channels):
        no_channels = f"These names are no channels here: {', '.join(sorted(state.no_channels))}."
        return _wrong_request(state, 404, no_channels)

    if len(tokens.subjects(time.time())) > 1:
        several = "The URL's tokens are signed for different subjects. One stream is for one: reload the page."
        return _wrong_request(state, 403, several, "closed")

    last_event_id = position_of(environ.get("HTTP_LAST_EVENT_ID", ""), query)
    connection = Connection(environ)
    permission = _permission(state, channels, tokens)
    private = permission.asks
    try:
        if is_copy() and connection.fileno() >= 0:
            raise TryLater("unavailable", "a job that this worker has forked took the request, and cannot serve it")
        subscription = _admitted(current, state, worker, connection, channels, permission)
        if current.method == "HEAD":
            return stream_response(Blocks(connection), connection, settings, private=private)
        hub, replay = worker.streams
    except _Refused as why:
        state.refusals.count("closed")
        return refusal(403, str(why))
    except TryLater as later:
        return ended(later, last_event_id, state.refusals.later(channels[0], later), private=private)
    if environ.get("SERVER_SOFTWARE", "").startswith("Werkzeug/") and len(hub) + 1 >= _TABS:
        state.refusals.log("tabs", _NO_MORE_TABS, _TABS)
    refused = functools.partial(state.refusals.later, channels[0])
    hint = state.refusals.hint(authorize.hint_about(channels, tokens))
    body = stream(hub, replay, subscription, last_event_id, connection, refused, hint)
    response = stream_response(body, connection, settings, private=private, direct_write=settings.direct_write)
    if "flask_pg_sse.testing" in environ:
        environ["flask_pg_sse.testing"].append(subscription)
    return response


# As many connections browsers open to one site over HTTP/1.1.
_TABS = 6
_NO_MORE_TABS = (
    "%d streams are open on the development server. A browser opens no more connections to one site over HTTP/1.1: in "
    "another tab not even pages load. Close tabs; behind a proxy that speaks HTTP/2 to browsers there is no such limit."
)


class _Refused(Exception):
    """The client may not have this stream. The message says why."""


@dataclass(frozen=True, slots=True)
class _Permission:
    """What is known about a stream's permission before a hook is asked.

    tokens:     the URL's
    ends_at:    when a channel loses its last token, in seconds since the epoch; `math.inf` if none does
    authorizer: the hook that decides on the channels `to_ask`; None if the app has none
    subject:    the hook that names the client; None if the app has none
    unquoted:   the names on which the stream also hears raw notifications, if they are open to the client too
    to_ask:     the channels, and names of `unquoted`, that neither `SSE_CHANNELS` nor a token opens
    revocable:  whether `disconnect()` and missed commands end the stream: it has a channel that is not public
    """

    tokens: Tokens
    ends_at: float
    authorizer: Authorizer | None
    subject: SubjectOf | None
    unquoted: Collection[str]
    to_ask: Sequence[str]
    revocable: bool

    @property
    def asks(self) -> bool:
        """Whether one of the app's hooks is asked. The answer then depends on the client's cookies, for example."""
        return self.subject is not None or (self.authorizer is not None and bool(self.to_ask))


def _permission(state: State, channels: Collection[str], tokens: Tokens) -> _Permission:
    opened = tokens.channels
    authorizer = state.authorize or sse_bp.default_authorize
    patterns = ["*"] if state.open_to_all(authorizer) else state.runtime.settings.channels
    also = {name for name in map(unquoted, channels) if name} - set(channels) if state.hears_unquoted else set[str]()
    if authorizer is None:
        also = {name for name in also if name in opened or authorize.is_public(name, patterns)}
    closed = [name for name in (*channels, *also) if not authorize.is_public(name, patterns)]
    return _Permission(
        tokens,
        ends_at=tokens.expires_at((*channels, *also)),
        authorizer=authorizer,
        subject=state.subject or sse_bp.default_subject,
        unquoted=also,
        to_ask=[name for name in closed if name not in opened],
        revocable=bool(closed),
    )


def _admitted(
    current: Request,
    state: State,
    worker: Worker,
    connection: Connection,
    channels: Collection[str],
    permission: _Permission,
) -> Subscription:
    """Return the subscription if the client may have it. Raises `_Refused`, `TryLater`, and the hooks' HTTP errors."""
    settings = state.runtime.settings
    to_ask, now = permission.to_ask, time.time()
    if permission.ends_at <= now:
        raise TryLater("expired", since=now - permission.ends_at)
    closed = functools.partial(_closed, state=state, permission=permission)
    if to_ask and permission.authorizer is None:
        raise _Refused(closed(to_ask[0]))
    subscription = Subscription(channels, settings.buffer_bytes)
    subscription.connection = connection
    try:
        with worker.admission.place(subscription):
            if permission.revocable and current.method != "HEAD":
                worker.listen_soon(in_test="flask_pg_sse.testing" in current.environ)
            asked_at = time.monotonic()
            subjects = authorize.subjects_of(permission.subject, permission.tokens.subjects(now), state.refusals)
            if subjects is None:
                raise _Refused(
                    "This site cannot tell whose stream this would be. Ask the site's operator to look at its log."
                )
            clients = authorize.counted_under(subjects, current.remote_addr)
            end = _end_of(permission.ends_at, settings.max_age)
            terms = Terms(subjects, clients, asked_at, *end, revocable=permission.revocable)
            worker.admission.count_for(subscription, terms)
            also = set(permission.unquoted)
            for channel in to_ask:
                if authorize.may_listen(permission.authorizer, channel, state.refusals):
                    continue
                if channel not in also:
                    raise _Refused(closed(channel))
                also.remove(channel)
    except authorize.HookFailed as failed:
        raise TryLater("unavailable", since=failed.since) from None
    if also:
        subscription.channels |= {heard_unquoted(name) for name in also}
    return subscription


def _end_of(expires_at: float, max_age: float | None) -> tuple[float, str]:
    """Return the monotonic time at which a stream must end, and the reason."""
    ends = [(math.inf, "")]
    if max_age is not None:  # random, because streams that began together, as after a deploy, must not end together
        ends.append((time.monotonic() + max_age * random.uniform(0.9, 1.0), "max_age"))
    if expires_at < math.inf:
        ends.append((time.monotonic() + expires_at - time.time(), "expired"))
    return min(ends)


def _closed(channel: str, state: State, permission: _Permission) -> str:
    """Return why a channel is refused, and log it with the line that opens it."""
    patterns, asked = state.runtime.settings.channels, permission.authorizer is not None
    why = authorize.why_closed(channel, tokens=permission.tokens, patterns=patterns, asked=asked)
    hint = authorize.did_you_mean(channel, patterns)
    to_open = authorize.how_to_open(channel, patterns)
    state.refusals.log("closed", "A stream was refused: %s%s To open it to everybody: %s", why, hint, to_open)
    if current_app.debug:
        return why + hint + authorize.ways_to_open(channel, patterns)
    return f"{why} Log in, reload the page, or ask the site's operator to open it."


sse_bp.after_request(cross_origin_headers)
sse_bp.after_request(answer_without_session)
