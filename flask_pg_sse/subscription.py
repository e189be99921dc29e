"""One stream's place between the fan-out and its client: a bounded buffer of blocks of bytes, and where it stands.

A stream is live, and takes what is offered, or it is behind, takes nothing, and reads the event log until it has caught
up. Invariant: an event of the log is taken only if its id is above `accepted`, and taking it moves `accepted` there.

Who calls what: `offer()`, `heartbeat()`, `fall_behind()`, `go_live()` come one call at a time (the hub sees to that);
`take()` from the stream's generator alone; `end()` from anybody. Each side writes only its own counter and the list's
operations are atomic under the interpreter's lock, so the hot path needs no lock of its own.

A generator with nothing to send parks and lays the right to write into `_idle`. Whoever takes it out, `offer()` for one
direct write or the generator to go on, alone writes to the client. (A flag in its place would race with threads.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from . import event, wakeup
from .access import Terms
from .outlet import NOW, Outlet, frame
from .page import Item
from .progress import ENOUGH_BYTES, Progress

# What one send may hold. A page of several hundred kB in one piece would be copied again at every partial send.
PIECE_BYTES = ENOUGH_BYTES
# What is written past the generator at the most, by the greenlet that has others to serve.
_DIRECT_BYTES = 65536
_NEVER = 2**63  # above every id


class Block:
    """Bytes for a stream, or for many, and the ids in the log between which they lie."""

    __slots__ = ("_items", "_named", "chunk", "data", "first", "foreign", "last")

    def __init__(self, data: bytes, first: int = _NEVER, last: int = 0) -> None:
        self.data = data
        self.first = first
        self.last = last
        self.foreign = False  # whether the last id that a client finds in it is not the log's
        self._items: Sequence[Item] = ()
        self._named: Block | None = None
        self.chunk = b""  # the bytes as one chunk of an HTTP/1.1 body, once made

    def make_chunk(self) -> bytes:
        """Set and return `chunk`."""
        self.chunk = frame(self.data)
        return self.chunk

    @classmethod
    def of(cls, items: Sequence[Item]) -> Block:
        """Join events, in their order."""
        ids = [log_id for _, _, log_id in items if log_id]
        block = cls(b"".join([data for _, data, _ in items]), min(ids, default=_NEVER), max(ids, default=0))
        block._items = items
        block.foreign = len(ids) < len(items) and _ends_with_a_foreign_id(items)
        return block

    def above(self, log_id: int) -> Block:
        """Return what of it the log has above an id, and all that is not in the log."""
        return Block.of([item for item in self._items if not item[2] or item[2] > log_id])

    def named(self, log_id: int) -> Block:
        """Return it with the log's own id behind it."""
        if self._named is None or self._named.last != log_id:  # nearly all streams want the same
            self._named = Block(self.data + event.control_block("cursor", {}, id=log_id), last=log_id)
        return self._named

    def settle(self) -> None:
        """Keep the bytes alone: it has been offered to all, and may wait for a slow client for long."""
        self._items = ()
        self._named = None
        self.chunk = b""


def _ends_with_a_foreign_id(items: Sequence[Item]) -> bool:
    for _, data, log_id in reversed(items):
        if log_id:
            return False
        if b"\nid: " in b"\n" + data:  # every line begins with its field's name, whatever the data are
            return True
    return False


_HEARTBEAT = Block(event.HEARTBEAT)


class Connection(Protocol):
    """The way to a stream's client."""

    def cut(self) -> None: ...

    def gone(self) -> bool: ...

    def fileno(self) -> int: ...

    def outlet(self, progress: Progress) -> Outlet | None: ...


class Subscription:
    """The blocks that wait for one stream.

    `limit` bounds them in bytes, those in flight to the client included. Beside them there may be one block that is
    larger than the limit, or it could never be sent.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_closing",
        "_idle",
        "_in_flight",
        "_large",
        "_large_until",
        "_offered",
        "_outlet",
        "_past",
        "_rest",
        "_rest_from",
        "_spot",
        "_taken",
        "_torn",
        "accepted",
        "channels",
        "connection",
        "cut_at",
        "last_active",
        "limit",
        "live",
        "progress",
        "sent",
        "terms",
        "told",
        "told_at",
    )

    def __init__(self, channels: Iterable[str], limit: int, terms: Terms = Terms()) -> None:  # noqa: B008
        self.channels = frozenset(channels)
        self.limit = limit
        self.terms = terms
        self.live = False
        self.accepted = 0  # id in the log up to which all has been taken
        self.sent = 0  # id up to which all has been handed to the server: where to read on after falling behind
        self.last_active = 0.0  # monotonic time of the last block
        self.told = 0  # the last id of the log that the client got; 0: it may know an older one than `accepted`
        self.told_at = 0.0  # monotonic time of that
        self.progress = Progress()
        self.connection: Connection | None = None  # once the stream has begun
        self.cut_at = math.inf  # monotonic time at which its connection is ended, if it still stands then
        self._blocks: list[Block] = []
        self._rest = b""  # taken from the blocks, and from where on not sent; often shared by many streams, so not cut
        self._rest_from = 0
        self._offered = 0
        self._taken = 0
        self._in_flight = 0
        self._large = 0  # size of a block above the limit that waits or is in flight, and when it has been sent:
        self._large_until = 0  # once so many bytes have been taken
        self._closing: bytes | None = None
        self._idle: list[bool] = []
        self._outlet: Outlet | None = None  # while the generator is parked, or was when last seen
        self._past = 0  # bytes written past the generator since it parked
        self._torn = b""  # the rest of a chunk of which the socket has taken a part
        self._spot: wakeup.Spot | None = None

    @property
    def waiting(self) -> int:
        """Bytes that were offered and that the server has not yet sent."""
        return self._offered - self._taken

    @property
    def ended(self) -> bool:
        """Whether the stream's end has been decided; its last block may still have to leave."""
        return self._closing is not None

    def go_live(self, after: int, missed: Block, now: float, *, told: int = 0) -> None:
        """Take what is offered from now on. The client has everything up to the id `after`, and then `missed`.

        `told` is `after` if the client knows that id: the log may have been read far beyond its last event.
        """
        self._offered = self._taken = self._in_flight = self._large = 0
        self.accepted = self.sent = after
        self.told = told
        self.last_active = self.told_at = now
        self.live = True
        if missed.data:
            self.offer(missed, now)

    def offer(self, block: Block, now: float) -> bool:
        """Take a block for the client; False if it is too slow for that. A stream that is not live takes nothing."""
        if not self.live or self._closing is not None:
            return True
        if block.first <= self.accepted:  # it came by the log already
            block = block.above(self.accepted)
            if not block.data:
                return True
        accepted = block.last or self.accepted
        if block.foreign and accepted:
            block = block.named(accepted)
        if (not self._idle or self._outlet is None or not self._write(block, self._outlet)) and not self._append(block):
            return False
        self.accepted = accepted
        self.last_active = now
        if block.last:
            self.told, self.told_at = accepted, now
        return True

    def _append(self, block: Block) -> bool:
        """Keep a block for the generator; False if too much waits already."""
        size = len(block.data)
        if self._large and self._taken >= self._large_until:
            self._large = 0
        if size > self.limit and not self._large:
            self._large, self._large_until = size, self._offered + size
        if self._offered - self._taken + size > self.limit + self._large:
            return False
        self._blocks.append(block)
        self._offered += size
        self._wake()
        return True

    def _write(self, block: Block, outlet: Outlet) -> bool:
        """Send a block past the parked generator; False if it has to go through it."""
        chunk = block.chunk or block.make_chunk()
        if self._blocks or len(chunk) > _DIRECT_BYTES:
            return False
        try:
            self._idle.pop()
        except IndexError:  # the generator has just taken it
            return False
        try:
            sent = outlet.send(chunk, NOW)
        except OSError:
            sent = 0
        if sent:
            self._past += len(block.data)
            self.sent = block.last or self.sent
            if sent < len(chunk):
                self._tear(block, chunk[sent:])
        self._idle.append(True)
        if self._torn or self._closing is not None:
            self._wake()
        return sent > 0

    def _tear(self, block: Block, rest: bytes) -> None:
        """Leave the rest of a chunk to the generator, and until then all that comes."""
        self._outlet = None
        self._torn = rest
        size = self._in_flight = len(block.data)
        self._offered += size
        if size > self.limit:
            self._large, self._large_until = size, self._offered

    def heartbeat(self, now: float, quiet_since: float, cursor: Block) -> None:
        """Offer a sign of life if none has been since `quiet_since`: the log's position if it has moved on.

        Events that are not in the log are a sign of life, but they do not keep the client's id from growing too old.
        """
        if self._offered != self._taken:
            return  # what waits will do as one
        if cursor.last >= self.accepted and cursor.last > self.told and self.told_at <= quiet_since:
            self.offer(cursor, now)
        elif self.last_active <= quiet_since:
            self.offer(_HEARTBEAT, now)

    def fall_behind(self) -> None:
        """Drop what waits. The stream is to read on from the log, from `sent`."""
        self.live = False
        self._blocks.clear()
        self._wake()

    def end(self, block: bytes, *, drop: bool = False, cut_at: float = math.inf) -> None:
        """Close the stream with `block`, after what waits or, with `drop`, in place of it. The first end counts.

        Whoever has not read that far by `cut_at` loses the connection.
        """
        self.cut_at = min(self.cut_at, cut_at)
        if self._closing is not None:
            return
        self._closing = block
        if drop:
            self._blocks.clear()
        self._wake()

    def take(self) -> bytes | None:
        """Return the next piece for the client, waiting until there is one; None when the stream has ended.

        All that waits goes in one piece, up to 16 kB: a client that fell behind catches up in few sends. An empty piece
        says that the stream is not live.
        """
        self._taken += self._in_flight
        self._in_flight = 0
        while True:
            closing, live = self._closing, self.live  # read first: what was offered before is then in sight
            piece = self._next_piece()
            if piece is not None:
                self._in_flight = len(piece)
                return piece
            if closing is not None:
                self._closing = b""
                return closing or None
            if not live:
                return b""
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
            self._rest = waiting[0].data if len(waiting) == 1 else b"".join([block.data for block in waiting])
            for block in waiting:
                self.sent = block.last or self.sent
            del blocks[:count]
        start, end = self._rest_from, self._rest_from + PIECE_BYTES
        piece = self._rest[start:end]
        if end < len(self._rest):
            self._rest_from = end
        else:
            self._rest, self._rest_from = b"", 0
        return piece

    def _park(self) -> None:
        if self._spot is None:
            self._spot = wakeup.new_spot()
        outlet = self._outlet = self.connection.outlet(self.progress) if self.connection is not None else None
        self._idle.append(True)
        try:
            # Looked at after the right to write has been laid down: what came before would otherwise wake nobody.
            while not (self._torn or self._blocks or self._closing is not None or not self.live) or not self._resume():
                self._spot.park()
        except BaseException:  # the greenlet is killed, and its connection is not ours any more
            self._idle.clear()
            raise
        finally:
            if outlet is not None:
                outlet.count(self._past)
                self._past = 0
        if self._torn and outlet is not None:
            rest, self._torn = self._torn, b""
            outlet.finish(rest, self.progress)
            self._taken += self._in_flight
            self._in_flight = 0

    def _resume(self) -> bool:
        """Take the right to write back; not while a direct write is under way, which wakes again at its end."""
        try:
            return self._idle.pop()
        except IndexError:
            return False

    def _wake(self) -> None:
        if self._idle and self._spot is not None:
            self._spot.wake()
