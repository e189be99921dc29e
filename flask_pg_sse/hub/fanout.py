"""The fan-out: streams with the same channels, the block of a turn for each set of them, and the way through many.

Streams with the same set of channels get the same: they form a `SubscriberSet`, and a turn becomes one block of bytes
for all sets that have the same share in it. (A block for each channel would reorder a stream on two channels.)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from .. import concurrency
from ..engine.base import Item
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


def blocks_of(
    turn: Sequence[Item], sets_of: Mapping[str, Iterable[SubscriberSet]]
) -> list[tuple[SubscriberSet, tuple[Subscription, ...], Block]]:
    """Return the sets that a turn is for, with their streams and their block. `sets_of` has the sets of each channel.

    Sets whose channels have the same share in the turn get the same block: streams that have a channel of their own
    each, beside one for all, cost no more than if they had only that one.
    """
    channels = {item[0] for item in turn}
    if len(channels) == 1:
        block = Block.of(turn)
        return [(one, one.streams, block) for one in sets_of.get(turn[0][0], ())]
    sets = {one for channel in channels for one in sets_of.get(channel, ())}
    places: dict[str, list[int]] = {channel: [] for channel in channels}
    for place, (channel, _, _) in enumerate(turn):
        places[channel].append(place)
    blocks = {}
    for share in {one.channels & channels for one in sets}:
        wanted = sorted(place for channel in share for place in places[channel])
        blocks[share] = Block.of([turn[place] for place in wanted])
    return [(one, one.streams, blocks[one.channels & channels]) for one in sets]


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
                concurrency.checkpoint()
