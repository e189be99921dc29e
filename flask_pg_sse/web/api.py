"""The functions that apps call, such as `notify()`. They work on the current app."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from flask import has_app_context, has_request_context, url_for
from markupsafe import escape

from ..channels import check_channel
from ..engine.base import Disconnect
from ..event import FIELDS
from ..runtime import Runtime
from ..tokens import Token, sign_token
from .after_response import call_after_response, is_possible
from .authorize import to_subject
from .request import OR_SEVERAL
from .state import current_state

if TYPE_CHECKING:
    from collections.abc import Mapping


# Bytes of a URL from which a token has the names alone, and the most that a URL has. gunicorn refuses a request whose
# first line has more than 4,094.
_LONG_URL = 2000
_LONGEST_URL = 4000


class CurrentApp:
    """The calls for the current app. The module's functions are methods of this class."""

    def _runtime(self) -> Runtime:
        return current_state().runtime

    def notify(
        self,
        channel: str,
        data: object = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        comment: str | None = None,
        sse_payload: Mapping[str, Any] | None = None,
        durable: bool = True,
        connection: Any = None,
    ) -> int | None:
        """Send an event to every stream that listens to `channel`, in any process on any host.

        data:        a `str` is sent as it is, `bytes` as UTF-8, anything else as JSON by the app's JSON provider.
        event:       the event's name in the browser; `message` by default.
        id:          the event's id in the page. Without the event log it is also the browser's `Last-Event-ID`.
        retry:       the browser's reconnection time, in milliseconds.
        comment:     text that browsers ignore.
        sse_payload: the five arguments above in one dict, as in sse_relay_server. Not together with them.
        durable:     whether the event goes to the event log, if there is one. An event that does not reaches only the
                     streams that are open, in no fixed order with events of the same transaction that are in the log.
        connection:  a psycopg2 or psycopg 3 connection, or an SQLAlchemy `Connection`, `Session` or `scoped_session`.
                     The event then belongs to its transaction: it is sent on commit, and never after a rollback.
                     Without it, the event is sent at once, on one of the package's own connections.

        Returns the event's id in the log. Returns None if the event does not go to a log, and None with `connection`,
        because the event then gets its id on commit.

        Raises `InvalidChannel` and `InvalidEvent` (both `ValueError`) for a channel or an event that cannot be sent;
        `PayloadTooLarge` for an event that does not fit PostgreSQL's NOTIFY and does not go to a log; the JSON
        provider's error, usually TypeError, for data that it cannot write; TypeError for several channels;
        `DatabaseUnavailable` (a `ConnectionError`); `DatabaseNotConfigured`; and `EventLogMissing` if the configuration
        requires a log and there is none, or if the app uses one and `connection` cannot: its role may not, or its
        database is another one.
        """
        _check_one(channel)
        fields: Mapping[str, Any] = {"event": event, "id": id, "retry": retry, "comment": comment}
        if sse_payload is not None:
            if data is not None or any(value is not None for value in fields.values()):
                raise TypeError("notify() takes either sse_payload or data, event, id, retry and comment, not both.")
            data, fields = _split_sse_payload(sse_payload)
        return self._runtime().notify(channel, [data], fields, connection, durable=durable)

    def notify_many(
        self,
        channel: str,
        items: Iterable[object],
        *,
        event: str | None = None,
        retry: int | None = None,
        comment: str | None = None,
        durable: bool = True,
        connection: Any = None,
    ) -> None:
        """Send one event for each of `items`, in their order and in one transaction: all of them or none.

        Each item is the data of one event. The other arguments, and the errors, are those of `notify()`.
        """
        _check_one(channel)
        if isinstance(items, str | bytes | dict):
            raise TypeError(f"notify_many() takes a list of items; for one {type(items).__name__} call notify().")
        fields = {"event": event, "retry": retry, "comment": comment}
        self._runtime().notify(channel, list(items), fields, connection, durable=durable)

    def sse_cursor(self, *, connection: Any = None) -> int | None:
        """Return the event log's head: data that are read after this call include all events up to it.

        Pass it to `sse_url(…, cursor=…)`: the page's stream then begins where the page's data end. None without a log.

        connection: where the page's data are read, if that is a read replica; the same kinds as for `notify()`. What
                    the replica does not have yet then comes on the stream. By default the head is read on one of the
                    package's own connections, to the primary.

        Raises `DatabaseUnavailable`, `DatabaseNotConfigured`, and `EventLogMissing` if the configuration requires a log
        and there is none, or if `connection` cannot use the app's.
        """
        return self._runtime().cursor(connection)

    def disconnect(
        self,
        *,
        subject: str | int | uuid.UUID | None = None,
        channel: str | None = None,
        after_response: bool = False,
    ) -> None:
        """End the streams of a subject or on a channel. With both arguments: of that subject on that channel.

        This reaches every worker on every host with the same database and secret key, within a second. The browsers
        then reconnect, and permission is checked again, so take the right away first. A worker that has lost the
        database at that moment obeys when it is connected again. Without an event log it then ends all streams that are
        not public.

        after_response: whether to wait until the current request has been answered, for a second after its view at
                        most. By then the cookie is cleared and the transaction has ended, so that no browser comes back
                        with the old right. If the database is away, the view does not fail: the streams of this worker
                        are ended, and the others' when it is back. By default it is sent at once, so that no event
                        which the view sends after it arrives. Elsewhere, as in a job, it is always sent at once.

        Raises TypeError and ValueError for a value that cannot be a subject; `InvalidChannel`; `ConfigurationError`
        without a secret key, because any role of the database could otherwise do the same; `DatabaseNotConfigured`. If
        it is sent at once, also `DatabaseUnavailable`, and `EventLogMissing` as `sse_cursor()` does.
        """
        if subject is None and channel is None:
            raise TypeError("disconnect() needs a subject, a channel, or both.")
        command = Disconnect(
            None if subject is None else to_subject(subject), None if channel is None else check_channel(channel)
        )
        runtime = self._runtime()
        send = runtime.sender_for_later() if after_response and is_possible() else None
        if send is None:
            runtime.disconnect(command)
        else:
            call_after_response(functools.partial(send, command))

    def sse_url(
        self,
        channels: str | Iterable[str],
        *,
        sign: bool = False,
        expires: float | timedelta | None = None,
        subject: str | int | uuid.UUID | None = None,
        cursor: int | str | None = None,
        external: bool = False,
    ) -> str:
        """Return the URL of a stream on one or several channels.

        sign:     sign the URL: it then opens these channels, and no others, to everybody who has it. `expires` and
                  `subject` imply it.
        expires:  how long the URL is valid, in seconds or as a timedelta. Streams that it opened end then too. By
                  default it is valid as long as the secret key.
        subject:  the client that the URL is for. `disconnect(subject=…)` ends the streams that it opened, and they
                  count for this client. The subject can be read in the URL.
        cursor:   the result of `sse_cursor()`: the stream begins with the events after it.
        external: return an absolute URL, not a path. If `SSE_SERVER_URL` is set, the URL is always absolute and begins
                  with that.

        Each channel's name is in the URL. If a signed URL has more than 2,000 bytes, its token alone has the names,
        compressed. More than 4,000 bytes are an error, because web servers refuse such a URL.

        Raises `InvalidChannel`, TypeError and ValueError for arguments that no stream can have, `ConfigurationError` if
        the URL must be signed and there is no secret key, and RuntimeError outside a request without `SSE_SERVER_URL`
        or `SERVER_NAME`.
        """
        names = [channels] if isinstance(channels, str) else list(channels)
        if not names:
            raise ValueError("sse_url() needs at least one channel.")
        pairs = [("channel", check_channel(name)) for name in names]
        if cursor is not None:
            pairs.append(("last_event_id", str(cursor)))
        signed = sign or expires is not None or subject is not None
        if signed:
            token = Token(
                frozenset(name for _, name in pairs[: len(names)]),
                None if expires is None else time.time() + _positive_seconds(expires),
                None if subject is None else to_subject(subject),
            )
            keys = self._runtime().signing_keys("sse_url() that signs")
            pairs.append(("token", sign_token(keys, token)))
        settings = self._runtime().settings
        if settings.server_url is not None:
            base = f"{settings.server_url}/"
        elif (count := len(set(names))) > settings.max_channels:  # that of another server may be higher
            too_many = f"sse_url() got {count} channels, and one stream has at most {settings.max_channels}."
            raise ValueError(f"{too_many} {OR_SEVERAL}")
        else:
            base = _url_of_the_streams("sse_url()", external=external)
        url = _with_query(base, pairs)
        if len(url) > _LONG_URL and signed:
            pairs[-1] = ("token", sign_token(keys, replace(token, alone=True)))
            url = _with_query(base, pairs[len(names) :])  # the token has the names too, compressed
        if len(url) > _LONGEST_URL:
            remedy = "Use" if signed else "Sign it (sign=True), which compresses the names; or use"
            raise ValueError(
                f"sse_url() got {len(names)} channels, whose URL has {len(url)} bytes, and web servers refuse more "
                f"than {_LONGEST_URL}. {remedy} fewer or shorter names, or several streams."
            )
        return url


# Python names a function so where a call does not fit it: "notify() got an unexpected keyword argument".
for _function in vars(CurrentApp).values():
    if callable(_function):
        _function.__qualname__ = _function.__name__


def _with_query(url: str, pairs: Sequence[tuple[str, str]]) -> str:
    # The URL may have a query from the app's url_defaults.
    return f"{url}{'&' if '?' in url else '?'}{urlencode(pairs)}"


def _url_of_the_streams(what: str, *, external: bool = False) -> str:
    """Return where the app has its streams. Raises RuntimeError, which names `what`, where Flask cannot know it."""
    if has_app_context():
        endpoint = f"{current_state().blueprint_name}.stream"
        try:
            return url_for(endpoint, _external=external)
        except RuntimeError:
            if has_request_context():
                raise
    raise RuntimeError(
        f"{what} was called outside a request, where the site's address is not known. Set SSE_SERVER_URL to where the "
        "streams are; or set SERVER_NAME to the site's host and port, and make the call in app.app_context()."
    )


def _check_one(channel: object) -> None:
    if isinstance(channel, list | tuple | set | frozenset | dict):
        raise TypeError(
            f"notify() sends to one channel, not to a {type(channel).__name__}. Call it for each of several channels, "
            "in one transaction: for channel in channels: notify(channel, data, connection=db.session)."
        )


# The longest time in seconds, some three hundred years. A longer one is a mistake.
LONGEST = 1e10


def _positive_seconds(value: object) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"expires is a number of seconds or a timedelta, not {type(value).__name__}.")
    if not 0 < seconds < LONGEST:  # NaN fails this too
        raise ValueError(f"expires is a number of seconds from now, greater than 0, not {seconds!r}.")
    return float(seconds)


def _split_sse_payload(payload: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(payload, dict):
        raise TypeError(f"sse_payload is a dict of {', '.join(sorted(FIELDS))}, not {type(payload).__name__}.")
    unknown = sorted(payload.keys() - FIELDS)
    if unknown:
        raise TypeError(f"sse_payload has unknown keys ({', '.join(unknown)}); known: {', '.join(sorted(FIELDS))}.")
    return payload.get("data"), {key: payload.get(key) for key in FIELDS - {"data"}}


_current_app = CurrentApp()
notify = _current_app.notify
notify_many = _current_app.notify_many
sse_url = _current_app.sse_url
sse_cursor = _current_app.sse_cursor
disconnect = _current_app.disconnect
# The name of this function in sse_server_postgres_listen_notify.
postgres_notify = notify


class ServerUrl:
    """The part of a stream's URL before `/?channel=…`: `sse_server_url` in the older projects' templates.

    The URL is built only when a template uses it, because every template gets this object, even where no URL can be
    built. werkzeug's LocalProxy does not work here: it claims to be a `str`, and Jinja's `~` and `tojson` then treat it
    as one.
    """

    def __str__(self) -> str:
        state = current_state()
        if state.runtime.settings.server_url is not None:
            return state.runtime.settings.server_url
        return _url_of_the_streams("sse_server_url").partition("?")[0].rstrip("/")

    def __html__(self) -> str:  # Jinja's tojson uses this too
        return str(escape(str(self)))

    def __add__(self, text: str) -> str:
        return str(self) + text
