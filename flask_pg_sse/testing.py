"""Helpers for the tests of apps that use this package.

def test_order_is_announced(app, client):
    with capture(app) as events:
        client.post("/orders")
    assert events[0].channel == "orders"
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask import Flask
from flask.testing import FlaskClient

from .engine.memory import MemoryEngine
from .engine.postgres.codec import to_payload
from .event import Event
from .hub.subscription import Subscription
from .web.state import state_of

__all__ = ["Captured", "Received", "capture", "parse", "stream"]


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


@contextmanager
def capture(app: Flask) -> Iterator[list[Captured]]:
    """Collect the events that `notify()` would send, without a database.

    The list grows while the block runs. Events are checked as usual, so an event that cannot be sent fails here too.
    That includes an event too large for NOTIFY, because no database is asked whether there is an event log. In the
    tests of an app that has one, set `SSE_EVENT_LOG = True`. An event with a `connection=` is collected at the call,
    whether the transaction commits or not. `disconnect()` does nothing, and `sse_cursor()` returns None.
    """
    runtime = state_of(app).runtime
    capturing = _Capturing(logged=runtime.settings.event_log is True)
    previous, runtime.captured_by = runtime.captured_by, capturing
    try:
        yield capturing.events
    finally:
        runtime.captured_by = previous


class _Capturing(MemoryEngine):
    """Keeps the events that are published, for a test to read. `logged` allows events larger than a NOTIFY."""

    def __init__(self, *, logged: bool) -> None:
        super().__init__(log=False)
        self.events: list[Captured] = []
        self._logged = logged

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        if not (durable and self._logged):
            _ = [to_payload(event, channel) for event in events]  # raises PayloadTooLarge
        for event in events:
            self.events.append(Captured(channel, event.data, event.event, event.id, event.retry, event.comment))
        return super().publish(channel, events, durable=durable, connection=connection)


@dataclass(frozen=True, slots=True)
class Received:
    """One event as a browser would dispatch it. `id` is the last id in the stream so far; "" if there was none."""

    event: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        """The data, read as JSON."""
        return json.loads(self.data)


def stream(client: FlaskClient, url: str, timeout: float = 5.0) -> Generator[Received, None, None]:
    """Open a stream with Flask's test client, and yield its events. Needs a database.

    The first event is `sse-open`; once it has come, no event is missed. Or it is `sse-end`, with the reason why the
    stream cannot begin now. Closing the iterator, or leaving the test, ends the stream.

    Raises TimeoutError if an event does not come within `timeout` seconds. Only the first one may take longer: if
    PostgreSQL does not answer, it is an `sse-end` that says so. A refused stream raises AssertionError with the status
    and the text.
    """
    opened: list[Subscription] = []  # the view appends its subscription; the test client gives it a copy of the environ
    response = client.get(url, environ_overrides={"flask_pg_sse.testing": opened})
    try:
        if response.status_code != 200:
            raise AssertionError(f"GET {url} answered {response.status}: {response.get_data(as_text=True).strip()}")
        if response.mimetype != "text/event-stream":
            raise AssertionError(f"GET {url} answered {response.mimetype}, not a stream of flask_pg_sse.")
        events = parse(response.iter_encoded())
        while True:
            with _at_most(timeout, opened):
                event = next(events, None)
            if event is None:
                return
            yield event
    finally:
        response.close()


@contextmanager
def _at_most(timeout: float, subscriptions: Iterable[Subscription]) -> Iterator[None]:
    """End the streams, and raise TimeoutError, if the block takes longer than `timeout` seconds.

    Heartbeats do not end the wait. A stream that was told to reconnect later has no subscription here, and ends by
    itself.
    """
    too_late = threading.Event()

    def end() -> None:
        too_late.set()
        for subscription in subscriptions:
            subscription.end(b"", drop=True)

    timer = threading.Timer(timeout, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if too_late.is_set():
        raise TimeoutError(f"no event within {timeout} s")


def parse(chunks: Iterable[bytes]) -> Iterator[Received]:
    """Parse a stream as browsers do, and yield its events.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    last_id = ""
    name = ""
    data: list[str] = []
    for line in _lines(chunks):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Received(name or "message", "\n".join(data), last_id)
            name, data = "", []
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    rest = ""
    for chunk in chunks:
        # A CR at the end may be the first half of a CRLF.
        *lines, rest = re.split(r"\r\n|\r(?!\Z)|\n", rest + decoder.decode(chunk))
        yield from lines
