"""The blocks that wait for one stream's generator, with a limit in bytes (`SSE_BUFFER_BYTES`)."""

from __future__ import annotations

from ..server.stall import ENOUGH_BYTES
from .block import Block

# The most bytes that one send gets. After every partial send the rest is copied, which would be slow for several
# hundred kB.
PIECE_BYTES = ENOUGH_BYTES


class Buffer:
    """The bytes that were offered to a stream and have not been sent, including those in flight to the client.

    `limit` is in bytes. One block that is larger than `limit` is accepted in addition, because it could never be sent
    otherwise.

    One thread appends and drops, another one takes. Each thread writes only its own counter, and the list's operations
    are atomic under the interpreter's lock.
    """

    __slots__ = (
        "_blocks",
        "_in_flight",
        "_large",
        "_large_until",
        "_limit",
        "_offered",
        "_rest",
        "_rest_from",
        "_taken",
    )

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[Block] = []
        # The bytes taken out of `_blocks`, unsent from `_rest_from` on. Not cut, because many streams share the object.
        self._rest = b""
        self._rest_from = 0
        self._offered = 0
        self._taken = 0
        self._in_flight = 0
        self._large = 0  # size of a block above the limit that waits or is in flight
        self._large_until = 0  # that block has been sent once `_taken` reaches this

    @property
    def size(self) -> int:
        """Bytes that were offered and that the server has not sent yet."""
        return self._offered - self._taken

    def __bool__(self) -> bool:
        """Whether a block waits that is not in flight, not even in part."""
        return bool(self._blocks)

    def append(self, block: Block) -> bool:
        """Keep a block. Returns False if too much waits already."""
        size = len(block.data)
        if self._large and self._taken >= self._large_until:
            self._large = 0
        if size > self._limit and not self._large:
            self._large, self._large_until = size, self._offered + size
        if self._offered - self._taken + size > self._limit + self._large:
            return False
        self._blocks.append(block)
        self._offered += size
        return True

    def count_in_flight(self, size: int) -> None:
        """Count bytes that a direct write has begun to send. Called only while nothing waits here."""
        self._in_flight = size
        self._offered += size
        if size > self._limit:
            self._large, self._large_until = size, self._offered

    def arrived(self) -> None:
        """Count the bytes in flight as sent."""
        self._taken += self._in_flight
        self._in_flight = 0

    def drop(self) -> None:
        """Drop the blocks that are not in flight."""
        self._blocks.clear()

    def holds(self, through: int) -> bool:
        """Tell whether a block that is not in flight has an event with a log id up to `through`."""
        return any(block.first <= through for block in self._blocks[:])

    def next_piece(self) -> tuple[bytes, int] | None:
        """Return the next piece, at most 16 kB of what waits, or None if nothing waits.

        The number with it is the last log id of the blocks that this call took for it; 0 if there is none. The piece is
        in flight until `arrived()`.
        """
        last = 0
        if not self._rest:
            waiting = self._blocks[:]  # a copy: another thread may append, or drop them all, at any moment
            if not waiting:
                return None
            self._rest = waiting[0].data if len(waiting) == 1 else b"".join([block.data for block in waiting])
            for block in waiting:
                last = block.last or last
            del self._blocks[: len(waiting)]
        start, end = self._rest_from, self._rest_from + PIECE_BYTES
        piece = self._rest[start:end]
        if end < len(self._rest):
            self._rest_from = end
        else:
            self._rest, self._rest_from = b"", 0
        self._in_flight = len(piece)
        return piece, last
