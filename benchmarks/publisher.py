"""The publisher: it sends events at a given rate on the channels of one server; each event carries its time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psycopg2

from benchmarks.crowd import data_of
from flask_pg_sse import PgSSE

# Up to SINGLE events a second, each event has its own transaction. Above that, all events of each hundredth of a second
# share one.
SINGLE = 200
_TICK = 0.01
# Most events in one transaction.
_MANY = 1000


@dataclass
class Published:
    """The number of events on each channel, the time when the first was due, and the last one's delay in seconds."""

    counts: list[int]
    begun: float  # by the monotonic clock
    late: float


class Publisher:
    """Publishes through the event log or, for a server without one, by pg_notify().

    Channel number k has the name `prefix` + k. Each `publish()` numbers the events of each channel from 0.
    """

    def __init__(self, url: str, prefix: str, padding: int, *, log: bool) -> None:
        self._prefix = prefix
        self._padding = padding
        self._package = PgSSE(database_url=url) if log else None
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True

    def publish(self, rate: float, seconds: float, channels: int = 1) -> Published:
        """Send to the channels in turn, `rate` events a second in total, and at least one event."""
        total = max(1, round(rate * seconds))
        counts = [0] * channels
        begun = time.monotonic()
        sent = 0
        while sent < total:
            passed = time.monotonic() - begun
            due = min(total, int(passed * rate) + 1, sent + _MANY)
            if due <= sent:
                time.sleep(max(0.0, sent / rate - passed))
                continue
            if rate <= SINGLE or channels > 1:
                due = sent + 1
            channel = sent % channels
            at = time.monotonic_ns()
            numbers = range(counts[channel], counts[channel] + due - sent)
            self._send(channel, [data_of(number, at, self._padding) for number in numbers])
            counts[channel] += due - sent
            sent = due
            if rate > SINGLE and channels == 1:
                time.sleep(max(0.0, _TICK - (time.monotonic_ns() - at) / 1e9))
        return Published(counts, begun, time.monotonic() - begun - (total - 1) / rate)

    def _send(self, channel: int, data: list[str]) -> None:
        name = f"{self._prefix}{channel}"
        if self._package is None:
            with self._connection.cursor() as cursor:
                cursor.execute("SELECT count(pg_notify(%s, one)) FROM unnest(%s::text[]) AS one", (name, data))
        elif len(data) == 1:
            self._package.notify(name, data[0])
        else:
            self._package.notify_many(name, data)

    def close(self) -> None:
        self._connection.close()
        if self._package is not None:
            self._package.close()
