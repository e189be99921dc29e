"""The interface of an engine: what carries events from one process to the others, and what keeps them.

An `Engine` is one app's connection to its bus in one process. It hands all that comes to a `Sink`, which is the hub.
PostgreSQL is one engine (`engine/postgres/engine.py`), one process's memory another (`engine/memory.py`). The tests in
`tests/engine/test_contract.py` run over every engine: a new one registers itself there.

A position is one whole number that rises over all channels: the id of the last event in the log that has been handed
over. Nobody but the engine knows how ids are made; the hub only compares them. 0 means that there is no log.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..event import Event

# A channel, an event as the bytes of a stream, and its id in the log; 0 for an event that is not kept.
Item = tuple[str, bytes, int]


@dataclass(frozen=True, slots=True)
class Page:
    """The next events of some channels: complete up to the id `upto`. The log reaches from `pruned_through` to `head`.

    Where the next event is larger than was allowed, `too_large` is its id and size, and it is not among `items`.
    """

    pruned_through: int
    head: int
    upto: int
    items: Sequence[Item]
    too_large: tuple[int, int] | None = None

    def why_not_from(self, after: int) -> str | None:
        """Return why nobody can go on from the id `after`, or None if one can. 0 stands for all that is kept."""
        if after > self.head:
            return "future-id"
        if after and after < self.pruned_through:
            return "too-old"
        return None


@dataclass(frozen=True, slots=True)
class Tail:
    """The last events of a channel: all those with ids above `after`, up to the id that was asked for."""

    channel: str
    after: int
    items: Sequence[Item]


class Readiness(enum.Enum):
    """Whether an engine hears what other processes send."""

    READY = "ready"
    AWAY = "away"  # the bus does not answer, or not any more
    LOG_MISSING = "log missing"  # it answers, and has no event log, which the configuration requires


@dataclass(frozen=True, slots=True)
class Status:
    """The state of an engine: whether it hears, its position, and on how many channels it listens."""

    readiness: Readiness
    position: int
    channels: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """End the streams of a subject, those on a channel or, where both are given, those that are both."""

    subject: str | None
    channel: str | None


# What processes tell each other, besides events. Each kind is a type of its own.
ControlMessage = Disconnect


class Ticket(Protocol):
    """The answer to come to `Engine.subscribe()`."""

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; tell whether all events on the channels are heard."""

    def cancel(self) -> None:
        """End the wait of all that wait for the same channels."""


class Sink(Protocol):
    """What an engine hands over to. Calls come one at a time, from a thread or greenlet of the engine's."""

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        """Take what came, in its order. `position` is the log's after it."""

    def gap(self, reason: str, position: int) -> None:
        """Take note that events may have been missed and cannot be had again. `position` is where it goes on."""

    def pruned(self, through: int) -> None:
        """Take note that the log has lost its events up to the id `through`."""

    def ready(self, readiness: Readiness) -> None:
        """Take note of a change: from `READY` on every control message is heard, or read in the log."""

    def control(self, message: ControlMessage) -> None:
        """Obey another process. It comes before any event that was sent after it."""


class Engine(Protocol):
    """One app's bus in one process. All methods may be called from any thread or greenlet.

    What asks the bus raises `DatabaseUnavailable` where it does not answer, and `EventLogMissing` where the
    configuration requires a log and there is none.
    """

    def start(self, sink: Sink) -> None:
        """Begin to hear, for `sink`. Publishing and reading need no start."""

    def stop(self, timeout: float) -> None:
        """End all that was started, within `timeout` seconds, and close all connections. Later calls open new ones."""

    def subscribe(self, channels: Iterable[str]) -> Ticket:
        """Hear each of `channels` one time more; the engine counts."""

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Hear each of `channels` one time less."""

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        """Send events in one transaction, in their order: the caller's, on whose `connection` they go, or an own one.

        Returns the last one's id in the log where it is known. Those that are not `durable` go to no log. Raises
        `PayloadTooLarge` for what this engine cannot carry, and TypeError for a connection to another kind of database.
        """

    def head(self) -> int:
        """Return the id up to which all events in the log can be read; 0 without a log."""

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        """Return the events after an id: `max_bytes` of them, or a larger one alone, up to `max_event` bytes."""

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        """Return at most the last `max_bytes` of events of each channel, up to an id for each."""

    def control(self, message: ControlMessage) -> None:
        """Have every process obey, this one too: through the log where there is one, so that none misses it."""

    def now(self) -> float:
        """Return the time, in seconds since the epoch, by the one clock that all processes share."""

    def status(self) -> Status:
        """Return the engine's state, without asking the bus."""
