"""The engine in the memory of one process, for tests. `SSE_BROKER_URL = "memory://"` selects it.

It keeps events as the event log does. It receives only the events and commands of this process.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ..concurrency.locks import Lock
from ..event import Event, encode
from .base import Asked, Disconnect, Item, Look, Page, Readiness, Sink, Status, Tail
from .transactions import Outcome, follow

# At most this many bytes of events are kept.
KEPT_BYTES = 16 * 1024 * 1024
# As many ids, at one a microsecond.
_A_DAY = 86_400_000_000

# A call of `publish()`: its channel, its events, whether they are durable.
Call = tuple[str, Sequence[Event], bool]


class _Heard:
    """A ticket that is already answered, because this engine delivers from the moment of `subscribe()`."""

    def wait(self, timeout: float) -> bool:
        return True

    def cancel(self) -> None:
        pass


class MemoryEngine:
    """One app's events in one process; see `base.Engine`.

    With `log` events get ids and are kept for `retention` seconds. Each publisher hands its events to the sink in its
    own thread or greenlet, one publisher at a time. In a transaction of a caller's SQLAlchemy session or connection, of
    any database, they wait for its commit. On another connection, whose commit cannot be noticed, they are sent at
    once.
    """

    def __init__(self, *, log: bool = True, retention: float = 86400.0) -> None:
        self._log = log
        self._retention = retention
        # Ids begin at the clock's time in microseconds. So they are above all ids of an earlier process.
        self._pruned_through = int(time.time() * 1_000_000) if log else 0
        self._head = self._pruned_through
        self._kept: deque[tuple[float, Item]] = deque()  # the time of each, and the event; oldest first
        self._kept_bytes = 0
        self._channels: Counter[str] = Counter()
        # Not the same lock as `_turn`: the sink may hold its own lock while it subscribes.
        self._counting = Lock()
        self._sink: Sink | None = None
        self._turn = Lock()

    def start(self, sink: Sink, asked: Asked | None = None) -> None:
        with self._turn:
            self._sink = sink
            sink.ready(Readiness.READY, earlier=())
            sink.deliver((), self._head)

    def stop(self, timeout: float) -> None:
        self._sink = None

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> _Heard:
        with self._counting:
            self._channels.update(channels)
        return _Heard()

    def unsubscribe(self, channels: Iterable[str]) -> None:
        with self._counting:
            self._channels.subtract(channels)
            self._channels = +self._channels  # drops channels without a subscription

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        call = channel, events, durable
        if connection is not None and follow(connection, self._transaction_ended, call, used=False):
            return None
        return self._send(*call)

    def _transaction_ended(self, outcome: Outcome, calls: list[Call]) -> None:
        if outcome is Outcome.COMMITTED:
            for channel, events, durable in calls:
                self._send(channel, events, durable)

    def _send(self, channel: str, events: Sequence[Event], durable: bool) -> int | None:
        with self._turn:
            logged = self._log and durable
            ids = range(self._head + 1, self._head + 1 + len(events)) if logged else [0] * len(events)
            turn = [(channel, encode(event, id or None), id) for event, id in zip(events, ids, strict=True)]
            if logged:
                self._keep(turn)
            if self._sink is not None:
                self._sink.deliver(turn if channel in self._channels else (), self._head)
            return self._head if logged and events else None

    def _keep(self, turn: Sequence[Item]) -> None:
        now = time.monotonic()
        for item in turn:
            self._kept.append((now, item))
            self._kept_bytes += len(item[1])
            self._head = item[2]
        before = self._pruned_through
        while self._kept and (self._kept[0][0] <= now - self._retention or self._kept_bytes > KEPT_BYTES):
            _, item = self._kept.popleft()
            self._kept_bytes -= len(item[1])
            self._pruned_through = item[2]
        if self._sink is not None and self._pruned_through > before:
            self._sink.pruned(self._pruned_through)

    def head(self, connection: Any = None) -> int:
        return self._head

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        items: list[Item] = []
        size, head = 0, self._head
        if refusal := self.look([after]).refusals.get(after):
            return Page(head, after, refusal=refusal)
        for item in self._between(channels, after, head):
            if not items and len(item[1]) > max(max_bytes, max_event):
                return Page(head, after, [], (item[2], len(item[1])))
            size += len(item[1])
            if items and size > max_bytes:
                return Page(head, items[-1][2], items)
            items.append(item)
        return Page(head, max(after, head), items)

    def look(self, ids: Collection[int]) -> Look:
        kept = {item[2] for _, item in list(self._kept)}
        refusals = {}
        for id in set(ids) - kept - {0, self._pruned_through}:
            refusals[id] = "too-old" if id < self._pruned_through else "undone"
            if id > self._head + _A_DAY:
                refusals[id] = "future-id"
        return Look(self._head, refusals)

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        found = []
        for channel, upto in uptos.items():
            items: deque[Item] = deque()
            size, after = 0, self._pruned_through
            for item in reversed(self._between([channel], 0, upto)):
                size += len(item[1])
                if size > max_bytes:
                    after = item[2]
                    break
                items.appendleft(item)
            found.append(Tail(channel, after, list(items)))
        return found

    def _between(self, channels: Iterable[str], after: int, upto: int) -> list[Item]:
        wanted = set(channels)
        return [item for _, item in list(self._kept) if item[0] in wanted and after < item[2] <= upto]

    def control(self, message: Disconnect) -> None:
        with self._turn:
            if self._sink is not None:
                self._sink.control(message)

    def now(self) -> float:
        return time.time()

    def status(self) -> Status:
        readiness = Readiness.AWAY if self._sink is None else Readiness.READY
        return Status(readiness, self._head, len(self._channels))
