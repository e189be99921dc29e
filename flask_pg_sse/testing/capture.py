"""Collect what an app sends, without a database."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from flask import Flask

from ..engine.base import Disconnect
from ..engine.memory import Call, MemoryEngine
from ..engine.postgres.codec import to_payload
from ..engine.transactions import Outcome
from ..event import Event
from ..web.extension import PgSSE
from ..web.state import state_of

# The name of the event that `Stream.nothing()` sends, which no app has sent.
MARKER = "flask_pg_sse marker"


@dataclass(frozen=True, slots=True)
class Captured:
    """One event that the app sent: its channel, and its fields as they would have been sent."""

    channel: str
    data: str
    event: str | None
    id: str | None
    retry: int | None
    comment: str | None

    @property
    def json(self) -> Any:
        """The data, read as JSON."""
        return json.loads(self.data)


class Disconnected(NamedTuple):
    """One call of `disconnect()`, which equals the tuple `(subject, channel)`. The subject is a text."""

    subject: str | None
    channel: str | None


class Events(list[Captured]):
    """The events that an app sent, in their order, and in `disconnected` the calls of `disconnect()`."""

    def __init__(self) -> None:
        super().__init__()
        self.disconnected: list[Disconnected] = []


@contextmanager
def capture(app: Flask | PgSSE) -> Iterator[Events]:
    """Let an app run without a database, and collect the events that `notify()` sends.

    `app` may be a `PgSSE` object without an app, as scripts have it.

    The list grows while the block runs. Events are checked as usual, so an event that cannot be sent fails here too.
    That includes an event too large for NOTIFY, because no database is asked whether there is an event log. In the
    tests of an app that has one, set `SSE_EVENT_LOG = True`.

    With `connection=` an SQLAlchemy session or connection, of any database, an event is collected when its transaction
    commits, and never if it rolls back. On another connection, whose commit cannot be noticed, it is collected at the
    call.

    Streams that are opened within the block get the events, and `disconnect()` ends them. `sse_cursor()` returns a
    position that rises (None if `SSE_EVENT_LOG` is False). When the block ends, so do its streams.
    """
    runtime = app._runtime() if isinstance(app, PgSSE) else state_of(app).runtime
    engine = _CapturingEngine(runtime.settings.event_log)
    with runtime.running_on(engine):
        yield engine.events


class _CapturingEngine(MemoryEngine):
    """Keeps what is published for a test to read."""

    def __init__(self, event_log: bool | str) -> None:
        super().__init__(log=event_log is not False)
        self.events = Events()
        self._takes_any_size = event_log is True

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        if not (durable and self._takes_any_size):
            _ = [to_payload(event, channel) for event in events]  # raises PayloadTooLarge
        return super().publish(channel, events, durable=durable, connection=connection)

    def _send(self, channel: str, events: Sequence[Event], durable: bool) -> int | None:
        self.events.extend(_captured(channel, events))
        return super()._send(channel, events, durable)

    def _transaction_ended(self, outcome: Outcome, calls: list[Call]) -> None:
        super()._transaction_ended(outcome, calls)
        for channel, events, _ in calls if outcome is Outcome.FAILED else ():
            for one in _captured(channel, events):
                last = len(self.events) - 1 - self.events[::-1].index(one)
                del self.events[last]

    def control(self, message: Disconnect) -> None:
        self.events.disconnected.append(Disconnected(message.subject, message.channel))
        super().control(message)


def _captured(channel: str, events: Sequence[Event]) -> list[Captured]:
    return [
        Captured(channel, event.data, event.event, event.id, event.retry, event.comment)
        for event in events
        if event.event != MARKER
    ]
