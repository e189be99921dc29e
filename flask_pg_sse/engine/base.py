"""The interface of an engine. An engine carries events from one process to the others, and may keep them in a log.

An `Engine` is one app's connection to its bus in one process. It hands everything that arrives to a `Sink`: the hub.
There are three engines: PostgreSQL (`engine/postgres/engine.py`), Redis' pub/sub (`engine/redis/engine.py`) and the
memory of one process (`engine/memory.py`). The tests in `tests/engine/test_contract.py` run over every engine. A new
engine registers itself there.

A position is one integer that rises over all channels: the id of the last event in the log that has been handed over.
Only the engine knows how ids are made; the hub only compares them. 0 means that there is no log.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..event import Event

# How many streams of one process may read the log at the same time. An engine has so many connections for them.
LOG_READERS = 2

# A channel, an event encoded for a stream, and the event's id in the log (0 if the log does not have it).
Item = tuple[str, bytes, int]


@dataclass(frozen=True, slots=True)
class Page:
    """The next events of some channels after an id, complete up to the id `upto`. The log ends with the id `head`.

    If the next event is larger than the allowed size, `too_large` is its id and its size in bytes, and `items` does not
    include it. If a stream cannot go on after the id, `refusal` is the reason (see `Look`), and `upto` is the last id
    before it that the log still has.
    """

    head: int
    upto: int
    items: Sequence[Item] = ()
    too_large: tuple[int, int] | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What the log says of ids that clients hold: its last id, and for each id after which no stream can go on, why.

    "too-old": events after it were pruned. "undone": the log had it and has lost it, by a failover or a restore.
    "future-id": it lies far beyond the log. 0 means all events in the log, and is always known.
    """

    head: int
    refusals: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Tail:
    """The last events of a channel: all with an id above `after`, up to the requested id."""

    channel: str
    after: int
    items: Sequence[Item]


class Readiness(enum.Enum):
    """Whether an engine receives the messages of other processes."""

    READY = "ready"
    AWAY = "away"  # the bus does not answer, or has stopped answering
    LOG_MISSING = "log missing"  # it answers, but has no event log, and the configuration requires one


@dataclass(frozen=True, slots=True)
class Status:
    """The state of an engine: its readiness, its position, and the number of channels that it listens to.

    `lag` is for how many seconds events may have been on their way: the time that the last beat took through the bus
    or, if the next one is overdue, for how long it is. None if the engine does not measure it.
    """

    readiness: Readiness
    position: int
    channels: int
    lag: float | None = None


@dataclass(frozen=True, slots=True)
class Disconnect:
    """A command to end the streams of a subject or on a channel. If both are given, a stream must match both."""

    subject: str | None
    channel: str | None


@dataclass(frozen=True, slots=True)
class Erased:
    """Events were erased from the log: none after the id `through`, and all on `channel` if it is not None."""

    through: int
    channel: str | None


# Commands from before a process heard them; None if they are not all known.
Earlier = Collection[Disconnect] | None
# The messages between processes, besides events. Each kind has its own type.
ControlMessage = Disconnect | Erased
# What sends the answer to a question: figures of workers. It waits for the bus. Raises `DatabaseUnavailable`.
Reply = Callable[[Sequence[Mapping[str, Any]]], None]
# What is called for each question of `flask sse status --all-hosts`, with its nonce. It must not wait.
Asked = Callable[[str, Reply], None]


class Ticket(Protocol):
    """The pending answer to `Engine.subscribe()`."""

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; return True if the engine receives all events on the channels."""

    def cancel(self) -> None:
        """End the wait. Called for every ticket that is not waited for any more before it is answered."""


class TooManyChannels(Exception):
    """The engine cannot listen to more channels in this process. Streams on the channels that it has can begin."""


class Sink(Protocol):
    """The receiver of an engine's events. The engine calls it from its own thread or greenlet, one call at a time."""

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        """Take one turn of events, in order. `position` is the position in the log after them."""

    def gap(self, reason: str, position: int) -> None:
        """Note that events and control messages may have been lost. The engine continues from `position`."""

    def pruned(self, through: int) -> None:
        """Note that the events up to the id `through` have been pruned from the log."""

    def ready(self, readiness: Readiness, *, why: str = "", silent_for: float = 0.0, earlier: Earlier = None) -> None:
        """Note a change of readiness. From `READY` on every control message arrives, unless `gap()` says otherwise.

        `why` says why the engine is not `READY`, and `silent_for` for how many seconds it has had no answer. With the
        first `READY` come the commands that were sent before.
        """

    def caught_up(self) -> None:
        """Note that all that came while the engine was not `READY` has been handed over, or `gap()` has told of it."""

    def control(self, message: ControlMessage) -> None:
        """Obey a message of another process. It arrives once, and before every event that was sent after it."""


class Bus(Protocol):
    """The methods of an engine that the hub calls."""

    def subscribe(self, channels: Iterable[str], client: Hashable) -> Ticket: ...

    def unsubscribe(self, channels: Iterable[str]) -> None: ...


class Engine(Protocol):
    """One app's bus in one process. All methods may be called from any thread or greenlet.

    A method that queries the bus raises `DatabaseUnavailable` if the bus does not answer. It raises `EventLogMissing`
    if the configuration requires a log and there is none.
    """

    def start(self, sink: Sink, asked: Asked | None = None) -> None:
        """Start to receive, and hand everything to `sink`. Publishing and reading work without it.

        `asked` is called for questions of other processes, where the engine can carry them.
        """

    def stop(self, timeout: float) -> None:
        """Stop what was started, within `timeout` seconds, and close all connections. Later calls open new ones."""

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> Ticket:
        """Add one subscription to each of `channels`. The engine counts them.

        Subscriptions of many clients are served in turn (`engine/turns.py`). Raises `TooManyChannels`.
        """

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Remove one subscription from each of `channels`."""

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        """Send events, in order and in one transaction.

        It is the transaction of the caller's `connection`, or a transaction of the engine if none is given. Returns the
        last event's id in the log if it is already known, otherwise None. With `durable=False` the events do not go to
        the log. Raises `PayloadTooLarge` for an event that this engine cannot carry, and TypeError if `connection` is
        for another kind of database.
        """

    def head(self, connection: Any = None) -> int:
        """Return the id up to which every event in the log can be read; 0 without a log.

        With a caller's `connection` it is what can be read there, as on a replica that lags.
        """

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        """Return the events after an id: at most `max_bytes`, or one larger event alone, up to `max_event` bytes."""

    def look(self, ids: Collection[int]) -> Look:
        """Tell which of these ids no stream can go on after."""

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        """Return the last events of each channel up to the id given for it, at most `max_bytes` for each channel."""

    def control(self, message: Disconnect) -> None:
        """Send a message to every process, including this one. If there is a log, it goes there and none misses it."""

    def now(self) -> float:
        """Return the time of the clock that all processes share, in seconds since the epoch."""

    def status(self) -> Status:
        """Return the engine's state, without a query to the bus."""
