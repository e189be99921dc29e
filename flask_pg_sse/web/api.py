"""What Flask developers call: `notify()` and its relatives, for the current app."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from flask import url_for
from markupsafe import escape

from ..channels import check_channel
from ..event import FIELDS
from ..runtime import Runtime
from ..tokens import Token, sign_token
from .authorize import to_subject
from .state import current_state

if TYPE_CHECKING:
    from collections.abc import Mapping


class CurrentApp:
    """The calls, for the current app. The module's functions are this class's methods."""

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

        data:        a `str` as it is, `bytes` as UTF-8, anything else as JSON through the app's JSON provider.
        event:       the event's name in the browser; `message` without one.
        id:          the event's id as the page sees it; without the event log also the browser's `Last-Event-ID`.
        retry:       the browser's reconnection time, in milliseconds.
        comment:     text that browsers ignore.
        sse_payload: the five above as one dict, the call of sse_relay_server; alone or not at all.
        durable:     whether the event goes to the event log, where there is one. One that does not reaches the streams
                     that are open, and is in no order with those of the log that its transaction sends.
        connection:  a psycopg2 or psycopg 3 connection, or an SQLAlchemy `Connection`, `Session` or `scoped_session`.
                     The event then belongs to its transaction: it leaves on commit, and never after a rollback. Without
                     it the event leaves at once, on a connection of the package's own.

        Returns the event's id in the log; None where it goes to none, and with `connection`, where it gets one on
        commit. Raises `InvalidChannel` and `InvalidEvent` (both `ValueError`) for what cannot be sent,
        `PayloadTooLarge` for what does not fit PostgreSQL's NOTIFY and goes to no log, the JSON provider's own error
        (TypeError as a rule) for data that it cannot write, `DatabaseUnavailable` (a `ConnectionError`),
        `DatabaseNotConfigured`, and `EventLogMissing` where the configuration requires a log and there is none.
        """
        fields: Mapping[str, Any] = {"event": event, "id": id, "retry": retry, "comment": comment}
        if sse_payload is not None:
            if data is not None or any(value is not None for value in fields.values()):
                raise TypeError("notify() takes sse_payload, or data, event, id, retry and comment; not both.")
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
        """Send one event for each of `items`, in order and in one transaction: all of them or none.

        An item is the data of its event; that and the rest are as in `notify()`.
        """
        if isinstance(items, str | bytes | dict):
            raise TypeError(f"notify_many() takes a list of items; for one {type(items).__name__} call notify().")
        fields = {"event": event, "retry": retry, "comment": comment}
        self._runtime().notify(channel, list(items), fields, connection, durable=durable)

    def sse_cursor(self) -> int | None:
        """Return the event log's head: whoever reads data after this call has all events up to it in them.

        For `sse_url(…, cursor=…)`: the page's stream then begins where its data end. None without a log. Read on a
        connection of the package's own. Raises `DatabaseUnavailable`, `DatabaseNotConfigured`, and `EventLogMissing`
        where the configuration requires a log and there is none.
        """
        return self._runtime().cursor()

    def disconnect(self, *, subject: str | int | uuid.UUID | None = None, channel: str | None = None) -> None:
        """End the streams of a subject, those on a channel, or with both those of that subject on that channel.

        In every worker on every host that has the same database and secret key, within a second; the browsers come
        back, and are asked anew who they are. So take the right away first. A worker that has lost the database at that
        moment obeys when it is back, if there is an event log, and otherwise not at all.

        Raises TypeError and ValueError for what is no subject, `InvalidChannel`, `ConfigurationError` without a secret
        key (any role of the database could otherwise do the same), `DatabaseUnavailable`, `DatabaseNotConfigured`,
        `EventLogMissing` as `sse_cursor()`.
        """
        if subject is None and channel is None:
            raise TypeError("disconnect() needs a subject, a channel, or both.")
        self._runtime().disconnect(
            None if subject is None else to_subject(subject), None if channel is None else check_channel(channel)
        )

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
        """Return the URL of a stream on one channel or several.

        sign:     open these channels, and no others, to whoever has the URL. `expires` and `subject` imply it.
        expires:  for how long, in seconds or as a timedelta; a stream ends then too. Without it the URL is good for as
                  long as the secret key.
        subject:  for whom: `disconnect(subject=…)` ends what was opened with the URL, and the number of streams is
                  counted by it. It can be read in the URL.
        cursor:   what `sse_cursor()` gave: the stream begins with what came after it.
        external: an absolute URL, not a path. Always absolute, under `SSE_SERVER_URL`, where that is set.

        Raises `InvalidChannel`, TypeError and ValueError for what no stream can have, and `ConfigurationError` if it is
        to sign and there is no secret key.
        """
        names = [channels] if isinstance(channels, str) else list(channels)
        if not names:
            raise ValueError("sse_url() needs at least one channel.")
        pairs = [("channel", check_channel(name)) for name in names]
        if cursor is not None:
            pairs.append(("last_event_id", str(cursor)))
        if sign or expires is not None or subject is not None:
            token = Token(
                frozenset(name for _, name in pairs[: len(names)]),
                None if expires is None else time.time() + _positive_seconds(expires),
                None if subject is None else to_subject(subject),
            )
            pairs.append(("token", sign_token(self._runtime().signing_keys("sse_url() that signs"), token)))
        query = urlencode(pairs)
        settings = self._runtime().settings
        if settings.server_url is not None:  # whose limits are its own
            return f"{settings.server_url}/?{query}"
        if (count := len(set(names))) > settings.max_channels:
            raise ValueError(f"sse_url() got {count} channels, and one stream has {settings.max_channels} at the most.")
        path = url_for(f"{current_state().blueprint_name}.stream", _external=external)
        return f"{path}{'&' if '?' in path else '?'}{query}"  # an app's url_defaults may stand in a query


# Seconds, some three hundred years: what is more, or no number, is a slip.
LONGEST = 1e10


def _positive_seconds(value: object) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"expires is a number of seconds or a timedelta, not {type(value).__name__}.")
    if not 0 < seconds < LONGEST:  # the inequalities are false for NaN too
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
# The name of the call in sse_server_postgres_listen_notify.
postgres_notify = notify


class ServerUrl:
    """What stands before `/?channel=…` in a stream's URL: the `sse_server_url` of the older projects' templates.

    Worked out where a template uses it, because each template gets it, also where no URL can be built. Not werkzeug's
    LocalProxy: that calls itself a `str`, and Jinja's `~` and `tojson` believe it.
    """

    def __str__(self) -> str:
        state = current_state()
        if state.runtime.settings.server_url is not None:
            return state.runtime.settings.server_url
        return url_for(f"{state.blueprint_name}.stream").partition("?")[0].rstrip("/")

    def __html__(self) -> str:  # tojson takes this too
        return str(escape(str(self)))

    def __add__(self, text: str) -> str:
        return str(self) + text
