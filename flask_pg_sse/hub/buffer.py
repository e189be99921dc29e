"""The blocks that wait for one stream's generator, bounded in bytes."""

from __future__ import annotations

from ..server.stall import ENOUGH_BYTES
from .block import Block

# What one send may hold. A page of several hundred kB in one piece would be copied again at every partial send.
PIECE_BYTES = ENOUGH_BYTES


class Buffer:
    """What was offered to a stream and has not been sent, what is in flight to the client included.

    `limit` bounds it in bytes. Beside that there may be one block that is larger, or it could never be sent.

    One thread appends and drops, another takes. Each writes only its own counter, and the list's operations are atomic
    under the interpreter's lock.
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
        self._rest = b""  # taken from the blocks, and from where on not sent; often shared by many streams, so not cut
        self._rest_from = 0
        self._offered = 0
        self._taken = 0
        self._in_flight = 0
        self._large = 0  # size of a block above the limit that waits or is in flight, and when it has been sent:
        self._large_until = 0  # once so many bytes have been taken

    @property
    def size(self) -> int:
        """Bytes that were offered and that the server has not yet sent."""
        return self._offered - self._taken

    def __bool__(self) -> bool:
        """Whether a block waits of which nothing is in flight."""
        return bool(self._blocks)

    def append(self, block: Block) -> bool:
        """Keep a block; False if too much waits already."""
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
        """Count what has begun to leave by another way, while nothing waits."""
        self._in_flight = size
        self._offered += size
        if size > self._limit:
            self._large, self._large_until = size, self._offered

    def arrived(self) -> None:
        """Count as sent what was in flight."""
        self._taken += self._in_flight
        self._in_flight = 0

    def drop(self) -> None:
        """Forget the blocks of which nothing is in flight."""
        self._blocks.clear()

    def next_piece(self) -> tuple[bytes, int] | None:
        """Return all that waits, up to 16 kB in one piece, and the last id of the log in it (0: none); None if nothing.

        It is in flight until `arrived()`.
        """
        last = 0
        if not self._rest:
            waiting = self._blocks[:]  # another thread may append, or drop them all, at any moment
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
