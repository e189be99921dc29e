"""The last events of each channel that has streams, in memory, for streams that reconnect soon.

A thousand browsers that reconnect at once then read the log once, or not at all. Nothing here is thread-safe: the
caller serialises all calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..engine.base import Item, Tail

# The most bytes that are kept of one channel, and of all channels. A stream that has missed more reads the log.
RING_BYTES = 262144
TOTAL_BYTES = 16 * 1024 * 1024
# Bytes that Python needs for an event besides the event's own. They count too: most events are smaller than that.
_ITEM_BYTES = 140


def _size_of(item: Item) -> int:
    return len(item[1]) + _ITEM_BYTES


class _Ring:
    """All events of one channel with ids above `after`, oldest first."""

    __slots__ = ("after", "filled", "items", "size")

    def __init__(self, after: int) -> None:
        self.after = after
        self.items: deque[Item] = deque()
        self.size = 0
        self.filled = False  # whether the events before the first one have been read from the log

    def trim(self, limit: int) -> None:
        while self.size > limit:
            item = self.items.popleft()
            self.size -= _size_of(item)
            self.after = item[2]


class History:
    """The rings of all channels that have streams."""

    def __init__(self) -> None:
        self._rings: dict[str, _Ring] = {}
        self.limit = RING_BYTES  # bytes for each channel

    def begin(self, channels: Iterable[str], position: int) -> None:
        """Keep the events of `channels` from now on. `position` is the log's position at this moment."""
        for channel in channels:
            if channel not in self._rings:
                self._rings[channel] = _Ring(position)
                self._share_out()

    def end(self, channel: str) -> None:
        """Forget a channel, because its further events may not be heard."""
        self._rings.pop(channel, None)
        self._share_out()

    def forget(self, through: int) -> None:
        """Forget all events up to the id `through`."""
        for ring in self._rings.values():
            ring.after = max(ring.after, through)
            while ring.items and ring.items[0][2] <= through:
                ring.size -= _size_of(ring.items.popleft())

    def restart(self, position: int) -> None:
        """Forget all events, and keep those after `position`, which are still to come."""
        self._rings = {channel: _Ring(position) for channel in self._rings}

    def add(self, items: Iterable[Item]) -> None:
        """Keep the events that have just arrived."""
        for item in items:
            ring = self._rings.get(item[0])
            if ring is not None and item[2] > (ring.items[-1][2] if ring.items else ring.after):
                ring.items.append(item)
                ring.size += _size_of(item)
                ring.trim(self.limit)

    def missed(self, channels: Iterable[str], after: int) -> list[Item] | None:
        """Return the events on `channels` after an id, in order; None if some of them are not in memory."""
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
        """Return the channels whose earlier events have not been read from the log, each with the id to read up to."""
        rings = {channel: self._rings.get(channel) for channel in channels}
        return {channel: ring.after for channel, ring in rings.items() if ring is not None and not ring.filled}

    def fill(self, tail: Tail, upto: int) -> None:
        """Put a channel's last events in the log, up to the id `upto`, in front of its events in memory."""
        ring = self._rings.get(tail.channel)
        if ring is None or ring.filled:
            return
        ring.filled = True
        if ring.after == upto:  # otherwise the ring has lost its beginning meanwhile, and events would be missing
            ring.items.extendleft(reversed(tail.items))
            ring.size += sum(map(_size_of, tail.items))
            ring.after = tail.after
            ring.trim(self.limit)

    def trim(self) -> None:
        """Trim every ring to the current limit, which falls as channels are added: a quiet ring does not notice."""
        for ring in self._rings.values():
            ring.trim(self.limit)

    def _share_out(self) -> None:
        self.limit = min(RING_BYTES, TOTAL_BYTES // max(1, len(self._rings)))
