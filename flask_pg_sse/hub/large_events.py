"""Events larger than a page, in memory for the streams that read them from the log.

Each is loaded once for all its streams, and all together have a limit in bytes. An event gets room for a moment at
least. After that, when another event needs the room, the one whose streams have taken nothing for the longest time
loses it. It is loaded again once one of them can go on. So a client that reads slowly, or not at all, holds nothing
that others need.
"""

from __future__ import annotations

import time

from ..concurrency.locks import Event
from .buffer import PIECE_BYTES

# Seconds for which an event keeps its room in any case. A client that reads at an ordinary pace gets all of it.
KEPT_FOR = 1.0


class LargeEvent:
    """One event, and the streams that read it."""

    def __init__(self, log_id: int, size: int) -> None:
        self.log_id = log_id
        self.size = size
        self.readers: set[object] = set()  # not a count: the garbage collector may end a stream in any statement
        self.data: bytes | None = None
        self.loaded_at = 0.0  # monotonic
        self.taken_at = 0.0  # when a stream took a piece

    def keep(self, data: bytes) -> None:
        self.loaded_at = self.taken_at = time.monotonic()
        self.data, self.size = data, len(data)  # in the log it may be smaller

    def piece(self, start: int) -> bytes | None:
        """Return the next piece from `start` on; b"" at the end, and None if the event must be loaded."""
        data = self.data
        if data is None:
            return None
        self.taken_at = time.monotonic()
        return data[start : start + PIECE_BYTES]


class LargeEvents:
    """The large events that streams read, with at most `limit` bytes, or one larger event alone.

    It takes no lock, because the garbage collector may end a stream in any statement here, and in any thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = Event()
        self._events: dict[int, LargeEvent] = {}

    def join(self, log_id: int, size: int, reader: object) -> LargeEvent:
        """Return the event, which may have to be loaded. The reader must `leave()` it."""
        while True:
            large = self._events.setdefault(log_id, LargeEvent(log_id, size))
            large.readers.add(reader)
            if self._events.get(log_id) is large:
                return large

    def leave(self, large: LargeEvent, reader: object) -> None:
        large.readers.discard(reader)
        if not large.readers and self._events.get(large.log_id) is large:
            self._events.pop(large.log_id, None)
            if large.readers:  # one has joined meanwhile
                self._events.setdefault(large.log_id, large)
        self._changed.set()

    def make_room(self, size: int) -> None:
        """Wait until `size` bytes more have room, for a moment only. One caller at a time loads an event."""
        while True:
            self._changed.clear()
            loaded = [one for one in list(self._events.values()) if one.data is not None]
            if not loaded or sum(len(one.data or b"") for one in loaded) + size <= self._limit:
                return
            now = time.monotonic()
            kept = [one for one in loaded if now < one.loaded_at + KEPT_FOR]
            if len(kept) < len(loaded):
                min((one for one in loaded if one not in kept), key=lambda one: one.taken_at).data = None
            else:
                self._changed.wait(min(one.loaded_at for one in kept) + KEPT_FOR - now)
