"""Streams with the same set of channels, and ways through many of them that stop nobody else for long."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from .. import concurrency as wakeup
from .block import Block, Position
from .subscription import Subscription

_T = TypeVar("_T")

# After so many offers other greenlets get their turn: a few milliseconds of work.
OFFERS_BETWEEN_YIELDS = 250


class SubscriberSet:
    """The streams with one set of channels, and where those of them stand that have got all."""

    __slots__ = ("_members", "_streams", "channels", "position", "scattered")

    def __init__(self, channels: frozenset[str]) -> None:
        self.channels = channels
        # In their order: neighbours in memory are served one after another.
        self._members: dict[Subscription, None] = {}
        self._streams: tuple[Subscription, ...] | None = None
        now = time.monotonic()
        self.position = Position(told_at=now, active_at=now, shared=True)
        self.scattered = False  # whether some may know less of the log than those who stand there: see `Heartbeats`

    def add(self, subscription: Subscription) -> None:
        self._members[subscription] = None
        self._streams = None
        subscription.channels = self.channels  # equal, and then the same object for all

    def remove(self, subscription: Subscription) -> None:
        del self._members[subscription]
        self._streams = None

    def __len__(self) -> int:
        return len(self._members)

    @property
    def streams(self) -> tuple[Subscription, ...]:
        if self._streams is None:
            self._streams = tuple(self._members)
        return self._streams


class Heartbeats:
    """When which groups are to get a sign of life, found without asking all: users have a channel each, thousands.

    A stream needs one `heartbeat` (seconds) after its last block. What comes meanwhile puts that off, so that to ask at
    the time that was foreseen is not too late. Where events that are not in the log keep a stream from being quiet, it
    is told a position that has moved on within two heartbeats.
    """

    def __init__(self, heartbeat: float) -> None:
        self._heartbeat = heartbeat
        # A heap; the number only keeps sets from being compared.
        self._foreseen: list[tuple[float, int, SubscriberSet]] = []

    def begin(self, group: SubscriberSet) -> None:
        self._foresee(group, group.position.active_at + self._heartbeat)

    @property
    def next_at(self) -> float:
        """The monotonic time at which to ask again."""
        return self._foreseen[0][0] if self._foreseen else math.inf

    def take(self, now: float, cursor: Block) -> list[tuple[tuple[Position, Block | None, Position], SubscriberSet]]:
        """Return groups with the place where most of their streams stand, the sign that is due there, and where then.

        None: nothing is due there, but some who stand elsewhere have not been told what those know. `cursor` tells the
        log's position.
        """
        asked = []
        while self.next_at <= now:
            asked.append(heapq.heappop(self._foreseen)[2])
        found = []
        for group in asked:
            if not group:  # the last of its streams has gone
                continue
            before = group.position
            sign = before.sign_of_life(now - self._heartbeat, cursor)
            if sign is not None:
                group.position = before.after(sign, now, shared=True)
            if sign is not None or group.scattered:
                group.scattered = False
                found.append(((before, sign, group.position), group))
            self._foresee(group, group.position.sign_due_at(self._heartbeat, cursor))
        return found

    def _foresee(self, group: SubscriberSet, at: float) -> None:
        heapq.heappush(self._foreseen, (at, id(group), group))


def in_portions(work: Iterable[tuple[_T, Sequence[Subscription]]]) -> Iterator[tuple[_T, Sequence[Subscription]]]:
    """Iterate, giving way to other greenlets or threads every few hundred streams: a large page must not stop them."""
    left = OFFERS_BETWEEN_YIELDS
    for what, streams in work:
        if len(streams) < left:
            left -= len(streams)
            yield what, streams
            continue
        at = 0
        while at < len(streams):
            portion = streams[at : at + left]
            yield what, portion
            at += len(portion)
            left -= len(portion)
            if not left:
                left = OFFERS_BETWEEN_YIELDS
                wakeup.checkpoint()
