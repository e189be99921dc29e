"""The fan-out: form sets of streams with the same channels, and make one block of bytes of a turn for each set.

Streams with the same set of channels get the same events. They form a `SubscriberSet`. Sets that get the same events of
a turn share one block of bytes. (One block for each channel would reorder the events of a stream on two channels.)
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from ..concurrency import greenlets
from ..engine.base import Item
from .block import Block, Position
from .subscription import Subscription

_T = TypeVar("_T")

# Other greenlets run after so many offers, which take a few milliseconds.
OFFERS_BETWEEN_YIELDS = 250


class SubscriberSet:
    """The streams with one set of channels, and the position of those that have received everything."""

    __slots__ = ("_members", "_streams", "channels", "live", "position", "scattered")

    def __init__(self, channels: frozenset[str]) -> None:
        self.channels = channels
        # A dict keeps the order in which streams came: neighbours in memory are then served one after another.
        self._members: dict[Subscription, None] = {}
        self._streams: tuple[Subscription, ...] | None = None
        self.live = 0  # how many of them are live
        now = time.monotonic()
        self.position = Position(told_at=now, active_at=now, shared=True)
        self.scattered = False  # whether some clients may know an older log id than `position`: see `Heartbeats`

    def add(self, subscription: Subscription) -> None:
        self._members[subscription] = None
        self._streams = None
        subscription.channels = self.channels  # equal, but one object for all streams

    def remove(self, subscription: Subscription) -> None:
        self.live -= subscription.live
        del self._members[subscription]
        self._streams = None

    def __len__(self) -> int:
        return len(self._members)

    @property
    def streams(self) -> tuple[Subscription, ...]:
        if self._streams is None:
            self._streams = tuple(self._members)
        return self._streams


class SubscriberSets:
    """The sets of a hub, and those of each channel. The hub's lock serialises all calls."""

    def __init__(self) -> None:
        self._all: dict[frozenset[str], SubscriberSet] = {}
        self.of_channel: dict[str, set[SubscriberSet]] = {}

    def __iter__(self) -> Iterator[SubscriberSet]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    @property
    def live(self) -> int:
        """The number of live streams."""
        return sum(subscribers.live for subscribers in self)

    def portions_of_streams(self) -> Iterator[tuple[None, Sequence[Subscription]]]:
        """Yield all streams, as `in_portions()` does."""
        return in_portions([(None, subscribers.streams) for subscribers in self])

    def of(self, subscription: Subscription) -> SubscriberSet:
        return self._all[subscription.channels]

    def goes_live(self, subscription: Subscription) -> SubscriberSet:
        """Count a stream that is about to go live. Return its set."""
        subscribers = self.of(subscription)
        subscribers.live += not subscription.live
        return subscribers

    def begun(self, channels: Collection[str] | None) -> list[Subscription]:
        """Return the streams that have begun and not ended; with `channels`, those that listen to one of them."""
        sets = [one for one in self if channels is None or not one.channels.isdisjoint(channels)]
        return [stream for one in sets for stream in one.streams if stream.opened and not stream.ended]

    def add(self, subscription: Subscription) -> SubscriberSet | None:
        """Add a stream to its set. Return the set if it is new."""
        subscribers, new = self._all.get(subscription.channels), None
        if subscribers is None:
            new = subscribers = self._all[subscription.channels] = SubscriberSet(subscription.channels)
            for channel in subscription.channels:
                self.of_channel.setdefault(channel, set()).add(subscribers)
        subscribers.add(subscription)
        return new

    def remove(self, subscription: Subscription) -> tuple[bool, list[str]]:
        """Remove a stream. Return whether its set has ended with it, and the channels that have no streams now."""
        subscribers = self.of(subscription)
        subscribers.remove(subscription)
        if subscribers:
            return False, []
        del self._all[subscription.channels]
        quiet = []
        for channel in subscription.channels:
            sets = self.of_channel[channel]
            sets.discard(subscribers)
            if not sets:
                del self.of_channel[channel]
                quiet.append(channel)
        return True, quiet


def blocks_of(
    turn: Sequence[Item], sets_of: Mapping[str, Iterable[SubscriberSet]]
) -> list[tuple[SubscriberSet, tuple[Subscription, ...], Block]]:
    """Return the sets that get events of a turn, with their streams and their block.

    `sets_of` has the sets of each channel. Sets that get the same events share a block. So streams that each have a
    private channel and a common one cost no more than streams that have only the common one.
    """
    channels = {item[0] for item in turn}
    if len(channels) == 1:
        block = Block.of(turn)
        return [(one, one.streams, block) for one in sets_of.get(turn[0][0], ())]
    sets = {one for channel in channels for one in sets_of.get(channel, ())}
    indexes: dict[str, list[int]] = {channel: [] for channel in channels}
    for index, (channel, _, _) in enumerate(turn):
        indexes[channel].append(index)
    blocks = {}
    for share in {one.channels & channels for one in sets}:
        wanted = sorted(index for channel in share for index in indexes[channel])
        blocks[share] = Block.of([turn[index] for index in wanted])
    return [(one, one.streams, blocks[one.channels & channels]) for one in sets]


def in_portions(work: Iterable[tuple[_T, Sequence[Subscription]]]) -> Iterator[tuple[_T, Sequence[Subscription]]]:
    """Split work into portions, and let other greenlets or threads run after every few hundred streams.

    Otherwise a channel with many streams would stop them.
    """
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
                greenlets.checkpoint()
