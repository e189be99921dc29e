"""One stream's place between the fan-out and its client: a bounded buffer of blocks of bytes.

Who calls what: `offer()`, `heartbeat()` and `end()` come from the dispatching side, one call at a time (the hub sees to
that); `take()` from the stream's generator alone. Each side writes only its own counter and the list's operations are
atomic under the interpreter's lock, so the hot path needs no lock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import event, wakeup

# What one send may hold. A page of several hundred kB in one piece would be copied again at every partial send.
PIECE_BYTES = 65536


class Subscription:
    """The blocks that wait for one stream.

    `limit` bounds them in bytes, those in flight to the client included. One block larger than the limit is taken if
    nothing else waits, or it could never be sent.
    """

    __slots__ = (
        "_blocks",
        "_closing",
        "_in_flight",
        "_offered",
        "_parked",
        "_rest",
        "_spot",
        "_taken",
        "channels",
        "cut_off",
        "last_active",
        "limit",
        "opened",
    )

    def __init__(self, channels: Iterable[str], limit: int) -> None:
        self.channels = frozenset(channels)
        self.limit = limit
        self.opened = False  # whether the first block, and with it the promise to miss nothing, has left
        self.last_active = 0.0  # monotonic time of the last block
        self.cut_off: Callable[[], None] | None = None  # ends the client's connection at once
        self._blocks: list[bytes] = []
        self._rest = b""
        self._offered = 0
        self._taken = 0
        self._in_flight = 0
        self._closing: bytes | None = None
        self._parked = False
        self._spot: wakeup.Spot | None = None

    @property
    def waiting(self) -> int:
        """Bytes that were offered and that the server has not yet sent."""
        return self._offered - self._taken

    def offer(self, block: bytes, now: float) -> bool:
        """Take a block for the client; False if it is too slow for that. A stream that has ended takes nothing."""
        if self._closing is not None:
            return True
        waiting = self._offered - self._taken
        if waiting and waiting + len(block) > self.limit:
            return False
        self._blocks.append(block)
        self._offered += len(block)
        self.last_active = now
        if self._parked:
            self._wake()
        return True

    def heartbeat(self, now: float) -> None:
        """Offer a comment, if nothing waits that would do as a sign of life."""
        if self._offered == self._taken:
            self.offer(event.HEARTBEAT, now)

    def end(self, block: bytes, *, drop: bool = False) -> None:
        """Close the stream with `block`, after what waits or, with `drop`, in place of it. The first end counts."""
        if self._closing is not None:
            return
        self._closing = block
        if drop:
            self._blocks.clear()
        if self._parked:
            self._wake()

    def take(self) -> bytes | None:
        """Return the next piece for the client, waiting until there is one; None when the stream has ended.

        All that waits goes in one piece, up to 64 kB: a client that fell behind catches up in few sends.
        """
        self._taken += self._in_flight
        self._in_flight = 0
        while True:
            closing = self._closing  # read first: what was offered before the end is then in sight
            piece = self._next_piece()
            if piece is not None:
                self._in_flight = len(piece)
                return piece
            if closing is not None:
                self._closing = b""
                return closing or None
            self._park()

    def _next_piece(self) -> bytes | None:
        if not self._rest:
            blocks = self._blocks
            count = len(blocks)
            if not count:
                return None
            # Only as many as were counted: another thread may append, or drop them all, at any moment.
            waiting = blocks[:count]
            if not waiting:
                return None
            self._rest = waiting[0] if len(waiting) == 1 else b"".join(waiting)
            del blocks[:count]
        piece, self._rest = self._rest[:PIECE_BYTES], self._rest[PIECE_BYTES:]
        return piece

    def _park(self) -> None:
        if self._spot is None:
            self._spot = wakeup.new_spot()
        self._parked = True
        # Looked at again after the flag is up: what came before it would otherwise wake nobody.
        if not self._blocks and self._closing is None:
            self._spot.park()
        self._parked = False

    def _wake(self) -> None:
        self._parked = False
        if self._spot is not None:
            self._spot.wake()
