"""A model of the event log in memory, for the hub and the streams above it: their output must equal the log."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from flask_pg_sse.engine.base import ControlMessage, Item, Look, Page, Readiness, Tail
from flask_pg_sse.errors import DatabaseUnavailable
from flask_pg_sse.event import control_block
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.replay import Replay
from flask_pg_sse.hub.stream import stream
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.server.stall import SendProgress

FIRST = 100  # the log's head before its first event; ids have gaps


class Granted:
    """A ticket for a LISTEN that stands."""

    def wait(self, timeout: float) -> bool:
        return True

    def cancel(self) -> None:
        pass


class Quiet:
    """An engine that hears all channels at once, and on which nothing comes."""

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> Granted:
        return Granted()

    def unsubscribe(self, channels: Iterable[str]) -> None:
        pass


def item(channel: str, log_id: int, size: int) -> Item:
    """An event as bytes that say its id."""
    return (channel, (b"id: %d\ndata: [%d]" % (log_id, log_id)).ljust(size, b".") + b"\n\n", log_id)


def raw(channel: str, number: int) -> Item:
    return (channel, b"data: {%d}\n\n" % number, 0)


def logged_in(output: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"\[(\d+)\]", output)]


def raw_in(output: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"\{(\d+)\}", output)]


class IdleSink:
    """An engine's sink that does nothing."""

    def deliver(self, turn: Sequence[Item], position: int) -> None: ...

    def gap(self, reason: str, position: int) -> None: ...

    def pruned(self, through: int) -> None: ...

    def ready(self, readiness: Readiness, **about: Any) -> None: ...

    def caught_up(self) -> None: ...

    def control(self, message: ControlMessage) -> None: ...


class ModelLog:
    """The database of the model, with all `items`. Pages and tails have few bytes, and some attempts fail."""

    def __init__(self, seed: int, fails: float = 0.0) -> None:
        self.items: list[Item] = []
        self.pages = self.tail_reads = self.looks = 0
        self._highest = FIRST
        self._chooser = random.Random(seed)
        self._fails = fails

    @property
    def head(self) -> int:
        return self.items[-1][2] if self.items else FIRST

    def append(self, channel: str, size: int, gap: int = 1) -> Item:
        self._highest += gap
        new = item(channel, self._highest, size)
        self.items.append(new)
        return new

    def undo(self, events: int) -> None:
        """Lose the last events, as a failover to a replica that lags. Their ids are not given out again."""
        del self.items[max(0, len(self.items) - events) :]

    def on(self, channels: Iterable[str], after: int, upto: int | None = None) -> list[Item]:
        wanted = set(channels)
        return [i for i in list(self.items) if i[0] in wanted and i[2] > after and (upto is None or i[2] <= upto)]

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        self.pages += 1
        assert self.pages < 100_000, "a stream reads forever"
        self._fail()
        head = self.head
        if refusal := self._refusals([after]).get(after):
            return Page(head, 0, refusal=refusal)
        there = self.on(channels, after, head)
        if not there:
            return Page(head, max(after, head))
        most = self._chooser.randrange(20, 200) if not max_event else 0
        if len(there[0][1]) > max(most, max_event):
            return Page(head, after, [], (there[0][2], len(there[0][1])))
        kept, size = 1, len(there[0][1])
        while kept < len(there) and size + len(there[kept][1]) <= most:
            size += len(there[kept][1])
            kept += 1
        upto = there[kept - 1][2] if kept < len(there) else head
        return Page(head, upto, there[:kept])

    def look(self, ids: Collection[int]) -> Look:
        self.looks += 1
        self._fail()
        return Look(self.head, self._refusals(ids))

    def _refusals(self, ids: Collection[int]) -> dict[int, str]:
        known = {0, FIRST, *(one[2] for one in list(self.items))}
        return {log_id: "too-old" if log_id < FIRST else "undone" for log_id in ids if log_id not in known}

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        self.tail_reads += 1
        self._fail()
        found = []
        for channel, upto in uptos.items():
            there = self.on([channel], 0, upto)
            most = self._chooser.randrange(0, 6)
            kept = there[len(there) - most :] if most < len(there) else there
            after = FIRST if kept == there else (kept[0][2] - 1 if kept else upto)
            found.append(Tail(channel, after, kept))
        return found

    def _fail(self) -> None:
        if self._chooser.random() < self._fails:
            raise DatabaseUnavailable("The model says no.")


class Connection(SendProgress):
    def way(self) -> None:
        return None

    def cut(self) -> None:
        pass

    def gone(self) -> bool:
        return False

    def release_request(self) -> None:
        pass

    def release_response(self) -> None:
        pass

    def end(self) -> None:
        pass


class World:
    """A hub over a model log; `deliver()` hands over what the log has and the hub has not."""

    def __init__(self, log: ModelLog, heartbeat: float = 0.0) -> None:
        self.log = log
        self.hub = Hub(Quiet(), heartbeat=heartbeat, retry=1000)
        self.replay = Replay(self.hub, log, heartbeat=heartbeat)
        self.hub.deliver((), FIRST)
        self._handed_over = 0

    def deliver(self, most: int, extra: Sequence[Item] = ()) -> None:
        """Hand over a turn of at most so many events of the log, and others around them."""
        turn = self.log.items[self._handed_over : self._handed_over + most]
        self._handed_over += len(turn)
        position = turn[-1][2] if turn else self.hub.position
        half = len(extra) // 2
        self.hub.deliver([*extra[:half], *turn, *extra[half:]], position)

    def reconnect(self) -> None:
        """Tell the hub that the log has lost events."""
        self._handed_over = len(self.log.items)
        self.hub.gap("undone", self.log.head)

    @property
    def undelivered(self) -> int:
        return len(self.log.items) - self._handed_over

    def stream(self, subscription: Subscription, last_event_id: int | None) -> Iterable[bytes]:
        known = "" if last_event_id is None else str(last_event_id)
        connection: Any = Connection()
        subscription.connection = connection
        return stream(self.hub, self.replay, subscription, known, connection)


def opening_id(output: bytes) -> int:
    found = re.search(rb"event: sse-open\nid: (\d+)\n", output)
    assert found, output[:200]
    return int(found[1])


RESET = control_block("reset", {}).partition(b"\n")[0] + b"\n"  # how every sse-reset begins
