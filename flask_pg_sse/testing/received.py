"""Read a stream of an app through Flask's test client, as a browser would."""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from flask.testing import FlaskClient

from ..event import Event, decode
from ..hub.subscription import Subscription
from ..web.state import state_of
from .capture import MARKER

# Events of the package that need no answer of a page.
_SILENT = ("sse-open", "sse-cursor")


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


def stream(client: FlaskClient, url: str, timeout: float = 5.0) -> Stream:
    """Open a stream with Flask's test client at the first event that is read, and yield its events.

    It needs a database, except within `capture()` and where `SSE_BROKER_URL` is "memory://".

    The first event is `sse-open`; once it has come, no event is missed. Or it is `sse-end`, with the reason why the
    stream cannot begin now. Closing the iterator, or leaving the test, ends the stream.

    Raises TimeoutError if an event does not come within `timeout` seconds. Only the first one may take longer: if
    PostgreSQL does not answer, it is an `sse-end` that says so. A refused stream raises AssertionError with the status
    and the text.
    """
    return Stream(client, url, timeout)


class Stream(Iterator["Received"]):
    """The events of a stream that `stream()` opened."""

    def __init__(self, client: FlaskClient, url: str, timeout: float) -> None:
        self._client = client
        self._opened: list[Subscription] = []
        self._events = _events(client, url, timeout, self._opened)

    def __next__(self) -> Received:
        return next(event for event in self._events if event.event != MARKER)  # of another stream's `nothing()`

    def nothing(self) -> None:
        """Check that no event has come since the last one that was read. Opens the stream if it is not open yet.

        It does not wait for a time: it sends an event of its own through the same engine, and checks that this one is
        the next. `sse-open` and `sse-cursor` are passed over. Raises AssertionError with the event that came, and what
        reading an event raises.

        What another thread or process sends at the same moment, or a transaction that has not committed, comes after.
        """
        while not self._opened:
            event = next(self._events, None)
            assert event is not None and event.event in _SILENT, f"{event} came, and no event was expected."
        marker = uuid.uuid4().hex
        channel = min(self._opened[0].channels)
        engine = state_of(self._client.application).runtime.worker.engine
        engine.publish(channel, [Event(marker, event=MARKER)])
        for event in self._events:
            if event.event == MARKER:
                if event.data == marker:
                    return
            elif event.event not in _SILENT:
                raise AssertionError(f"{event} came, and no event was expected.")
        raise AssertionError("The stream has ended.")

    def close(self) -> None:
        """End the stream."""
        self._events.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _events(
    client: FlaskClient, url: str, timeout: float, opened: list[Subscription]
) -> Generator[Received, None, None]:
    # The view appends its subscription to `opened`; the test client gives it a copy of the environ.
    response = client.get(url, environ_overrides={"flask_pg_sse.testing": opened})
    try:
        if response.status_code != 200:
            raise AssertionError(f"GET {url} answered {response.status}: {response.get_data(as_text=True).strip()}")
        if response.mimetype != "text/event-stream":
            raise AssertionError(f"GET {url} answered {response.mimetype}, not a stream of flask_pg_sse.")
        events = parse(response.iter_encoded())
        event = next(events, None)  # the stream itself bounds the wait for PostgreSQL
        while event is not None:
            yield event
            with _at_most(timeout, opened):
                event = next(events, None)
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
    return itertools.starmap(Received, decode(chunks))
