"""Streams with the same set of channels, and the way through many of them that stops nobody else for long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from . import wakeup
from .block import Standing
from .subscription import Subscription

_T = TypeVar("_T")

# After so many offers other greenlets get their turn: a few milliseconds of work.
OFFERS_BETWEEN_YIELDS = 250


class Group:
    """The streams with one set of channels, and where those of them stand that have got all."""

    __slots__ = ("_members", "_streams", "channels", "standing")

    def __init__(self, channels: frozenset[str]) -> None:
        self.channels = channels
        # In their order: neighbours in memory are served one after another.
        self._members: dict[Subscription, None] = {}
        self._streams: tuple[Subscription, ...] | None = None
        now = time.monotonic()
        self.standing = Standing(told_at=now, active_at=now, shared=True)

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
                wakeup.give_way()
