"""The last events of each channel that has streams: what a stream that comes back after a moment has missed.

Kept in memory, so that a thousand browsers that come back at once ask the log once, or not at all. Whoever calls sees
to it that calls come one at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..engine.base import Item, Tail

# Bytes kept of one channel at the most, and of all together. Streams beyond them read the log.
RING_BYTES = 262144
TOTAL_BYTES = 16 * 1024 * 1024
# What Python needs for an event beside its bytes, counted as well: most events are smaller than that.
_ITEM_BYTES = 140


def _size_of(item: Item) -> int:
    return len(item[1]) + _ITEM_BYTES


class _Ring:
    """The events of one channel with ids above `after`, all of them, oldest first."""

    __slots__ = ("after", "filled", "items", "size")

    def __init__(self, after: int) -> None:
        self.after = after
        self.items: deque[Item] = deque()
        self.size = 0
        self.filled = False  # whether the log has been asked for what came before

    def trim(self, limit: int) -> None:
        while self.size > limit:
            item = self.items.popleft()
            self.size -= _size_of(item)
            self.after = item[2]


class History:
    """The rings of all channels that have streams."""

    def __init__(self) -> None:
        self._rings: dict[str, _Ring] = {}
        self.limit = RING_BYTES  # bytes of one channel

    def begin(self, channels: Iterable[str], position: int) -> None:
        """Keep, from now on, the events of `channels` that come after the log's `position`."""
        for channel in channels:
            if channel not in self._rings:
                self._rings[channel] = _Ring(position)
                self._share_out()

    def end(self, channel: str) -> None:
        """Forget a channel: what comes on it may not be heard any more."""
        self._rings.pop(channel, None)
        self._share_out()

    def forget(self, through: int) -> None:
        """Forget all events up to an id."""
        for ring in self._rings.values():
            ring.after = max(ring.after, through)
            while ring.items and ring.items[0][2] <= through:
                ring.size -= _size_of(ring.items.popleft())

    def restart(self, position: int) -> None:
        """Forget all events; those after `position` will come."""
        self._rings = {channel: _Ring(position) for channel in self._rings}

    def add(self, items: Iterable[Item]) -> None:
        """Keep what has just come."""
        for item in items:
            ring = self._rings.get(item[0])
            if ring is not None and item[2] > (ring.items[-1][2] if ring.items else ring.after):
                ring.items.append(item)
                ring.size += _size_of(item)
                ring.trim(self.limit)

    def missed(self, channels: Iterable[str], after: int) -> list[Item] | None:
        """Return what came on `channels` after an id, in order; None where that is not known."""
        found: list[Item] = []
        for channel in channels:
            ring = self._rings.get(channel)
            if ring is None or after < ring.after:
                return None
            for item in reversed(ring.items):
                if item[2] <= after:
                    break
                found.append(item)
        found.sort(key=lambda item: item[2])
        return found

    def gaps(self, channels: Iterable[str]) -> dict[str, int]:
        """Return the channels of which the log has not been asked yet, each with the id up to which it is to be."""
        rings = {channel: self._rings.get(channel) for channel in channels}
        return {channel: ring.after for channel, ring in rings.items() if ring is not None and not ring.filled}

    def fill(self, tail: Tail, upto: int) -> None:
        """Put the last events that the log has, up to the id `upto`, before what is there."""
        ring = self._rings.get(tail.channel)
        if ring is None or ring.filled:
            return
        ring.filled = True
        if ring.after == upto:  # or the beginning has been dropped meanwhile: the two would not fit together
            ring.items.extendleft(reversed(tail.items))
            ring.size += sum(map(_size_of, tail.items))
            ring.after = tail.after
            ring.trim(self.limit)

    def trim(self) -> None:
        """Keep to the limit for all together; quiet channels do not notice by themselves that others have come."""
        for ring in self._rings.values():
            ring.trim(self.limit)

    def _share_out(self) -> None:
        self.limit = min(RING_BYTES, TOTAL_BYTES // max(1, len(self._rings)))
