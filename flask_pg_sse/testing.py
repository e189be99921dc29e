"""For the tests of apps that use this package.

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
    """One event that the app sent: its channel and its fields, as they would have travelled."""

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
    """Collect what `notify()` would send, without any database.

    The list grows while the block runs. Events are checked as ever, so that what cannot be sent fails here too: also
    what is too large for NOTIFY, for nobody asks the database for its event log. Say `SSE_EVENT_LOG = True` in the
    tests of an app that has one. An event that is given a `connection=` is collected at the call, whatever becomes of
    the transaction. `disconnect()` does nothing, and `sse_cursor()` returns None.
    """
    runtime = state_of(app).runtime
    capturing = _Capturing(logged=runtime.settings.event_log is True)
    previous, runtime.captured_by = runtime.captured_by, capturing
    try:
        yield capturing.events
    finally:
        runtime.captured_by = previous


class _Capturing(MemoryEngine):
    """Keeps what is published as a test looks at it. `logged` says that events may be larger than a NOTIFY."""

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
    """One event as a browser would dispatch it; `id` is the last id that the stream has named, "" without one."""

    event: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        """The data, read as JSON."""
        return json.loads(self.data)


def stream(client: FlaskClient, url: str, timeout: float = 5.0) -> Generator[Received, None, None]:
    """Open a stream with Flask's test client and yield its events; needs a database.

    The first is `sse-open`, and once it is there, nothing is missed; or `sse-end`, which says why not now. Waits
    `timeout` seconds for each event, then raises TimeoutError; only a PostgreSQL that does not answer keeps the first
    one waiting longer, until `sse-end` says so. A refused stream raises AssertionError with the status and the text.
    Closing the iterator, or leaving the test, closes the stream.
    """
    opened: list[Subscription] = []  # the view adds its subscription: the test client hands the app a copy of environ
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
    """Wait for the stream inside; TimeoutError once it has taken too long. Heartbeats do not count as an answer.

    A stream that was told to come back later has no subscription, and ends by itself.
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
    """Parse a stream as browsers do.

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
