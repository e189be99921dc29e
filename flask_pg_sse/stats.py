"""Count what this process does: the table of all counters, and their values. No I/O.

Something is counted for each turn of events, and when a stream begins or ends, never for each delivery. Names and units
are as Prometheus wants them: https://prometheus.io/docs/practices/naming/. A label has one of a few fixed values, so
that channels, users and addresses never become time series.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .errors import (
    ConfigurationError,
    DatabaseUnavailable,
    EventLogMissing,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
)

_PREFIX = "flask_pg_sse_"
# The value of a label for all that is not in its list.
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Counter:
    """One counter: its name, its meaning, and the label's name and values if it has one. The unit is in the name."""

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """The names of the numbers: one for each of the label's values."""
        return tuple((self.name, value) for value in self.values) if self.label else ((self.name, ""),)


def _counter(name: str, help: str, label: str = "", *values: str) -> Counter:
    return Counter(_PREFIX + name, help, label, (*values, _OTHER) if label else ())


RECEIVED = _counter("received_events_total", "Events that came from PostgreSQL for the channels of open streams.")
DELIVERED = _counter("delivered_events_total", "Events handed to streams: an event counts once for each stream.")
DELIVERED_BYTES = _counter("delivered_bytes_total", "Bytes of the events handed to streams.")
OPENED = _counter("streams_opened_total", "Streams that have begun (sse-open was sent).")
ENDED = _counter(
    "streams_ended_total", "Streams that have ended, by reason; client: it closed the connection.", "reason",
    "client", "shutdown", "max_age", "expired", "revoked", "behind", "capacity", "unavailable", "stalled",
)  # fmt: skip
REFUSED = _counter(
    "streams_refused_total", "Requests for streams that were refused, by kind.", "kind",
    "shutdown", "capacity", "client_capacity", "unavailable", "expired", "revoked", "bad_request", "closed",
    "other_site", "misconfigured",
)  # fmt: skip
RESETS = _counter(
    "resets_total", "Times that a stream was told that events may be missing (sse-reset), by reason.", "reason",
    "reconnected", "too-old", "undone", "future-id", "unknown-id", "no-log",
)  # fmt: skip
FELL_BEHIND = _counter(
    "streams_fell_behind_total", "Times that a client was too slow, and its stream left the fan-out."
)
RECONNECTED = _counter("listener_reconnections_total", "Times that the listener heard PostgreSQL again after a loss.")
NOTIFIED = _counter("notify_calls_total", "Calls of notify() and notify_many() that succeeded.")
NOTIFY_ERRORS = _counter(
    "notify_errors_total", "Calls of notify() and notify_many() that failed, by kind.", "kind",
    "invalid", "too_large", "unavailable", "no_log", "misconfigured",
)  # fmt: skip
LOG_READS = _counter(
    "log_reads_total", "Queries of the event log for streams that had missed events, by kind.", "kind",
    "look", "tails", "page",
)  # fmt: skip
LOG_READ_ERRORS = _counter("log_read_errors_total", "Such queries that PostgreSQL did not answer.")

COUNTERS = (
    RECEIVED, DELIVERED, DELIVERED_BYTES, OPENED, ENDED, REFUSED, RESETS, FELL_BEHIND, RECONNECTED, NOTIFIED,
    NOTIFY_ERRORS, LOG_READS, LOG_READ_ERRORS,
)  # fmt: skip

_INDEX = {key: index for index, key in enumerate(key for counter in COUNTERS for key in counter.keys)}
# In front of the numbers: what they are, for readers of another version. Its length is a multiple of a number's size.
_HEADER = json.dumps(list(_INDEX)).encode() + b"\n"
_HEADER += b" " * (-len(_HEADER) % 8)
SIZE = len(_HEADER) + 8 * len(_INDEX)

# Counters by name and label value, as they are stored and sent.
Totals = dict[tuple[str, str], float]


def notify_error_kind(error: Exception) -> str:
    """Return the kind of a failed notification, as `NOTIFY_ERRORS` has it."""
    kinds: tuple[tuple[str, tuple[type[Exception], ...]], ...] = (
        ("too_large", (PayloadTooLarge,)),
        ("no_log", (EventLogMissing,)),
        ("unavailable", (DatabaseUnavailable,)),
        ("misconfigured", (ConfigurationError,)),
        ("invalid", (InvalidChannel, InvalidEvent, TypeError, ValueError)),
    )
    return next((kind for kind, errors in kinds if isinstance(error, errors)), _OTHER)


class Stats:
    """The counters of one worker. They may be kept in memory that outlives the process: `keep_in()`.

    `lock` is one for all threads that count; by default that of `threading`.
    """

    def __init__(self, lock: AbstractContextManager[object] | None = None) -> None:
        self._lock = lock or threading.Lock()
        self._values = memoryview(bytearray(8 * len(_INDEX))).cast("d")

    def keep_in(self, memory: Any) -> None:
        """Continue in a writable buffer of `SIZE` bytes, such as a file's memory map. `read_totals()` reads it."""
        view = memoryview(memory)
        view[: len(_HEADER)] = _HEADER
        values = view[len(_HEADER) : SIZE].cast("d")
        with self._lock:
            values[:] = self._values
            self._values = values

    def leave(self) -> None:
        """Continue in memory of this object's own again."""
        own = memoryview(bytearray(8 * len(_INDEX))).cast("d")
        with self._lock:
            own[:] = self._values
            self._values.release()
            self._values = own

    def count(self, counter: Counter, by: float = 1, of: str = "") -> None:
        """Add to a counter; `of` is the label's value.

        Not for code that the garbage collector may run: it could wait for a lock that its own thread holds.
        """
        index = _INDEX.get((counter.name, of))
        if index is None:
            index = _INDEX[counter.name, _OTHER]
        with self._lock:
            self._values[index] += by

    def delivered(self, received: int, events: int, size: int) -> None:
        """Count one turn: the events that came, those that streams were handed, and their bytes."""
        with self._lock:
            values = self._values
            values[_INDEX[RECEIVED.name, ""]] += received
            values[_INDEX[DELIVERED.name, ""]] += events
            values[_INDEX[DELIVERED_BYTES.name, ""]] += size

    def totals(self) -> Totals:
        with self._lock:
            return dict(zip(_INDEX, self._values, strict=True))

    def total(self, counter: Counter) -> float:
        """Return the sum of a counter over its label's values."""
        totals = self.totals()
        return sum(totals[key] for key in counter.keys)


def read_totals(data: bytes) -> Totals:
    """Read what `Stats.keep_in()` keeps, also of another version of the package. Raises ValueError."""
    header, _, _ = data.partition(b"\n")
    keys = json.loads(header)
    start = -(-(len(header) + 1) // 8) * 8
    values = memoryview(data)[start : start + 8 * len(keys)].cast("d")
    return {(name, value): number for (name, value), number in zip(keys, values, strict=True)}


def to_json(totals: Totals) -> list[list[Any]]:
    return [[name, value, number] for (name, value), number in totals.items()]


def from_json(rows: Iterable[Any]) -> Totals:
    """Read the result of `to_json()`. Raises ValueError and TypeError."""
    return {(str(name), str(value)): float(number) for name, value, number in rows}


def added(parts: Iterable[Mapping[tuple[str, str], float]]) -> Totals:
    """Add up counters of several workers."""
    totals: Totals = {}
    for part in parts:
        for key, number in part.items():
            totals[key] = totals.get(key, 0.0) + number
    return totals
