"""The blocks of bytes that streams are sent, with their range of log ids, and a stream's position after each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import event
from ..engine.base import Item
from ..server.direct_write import frame

_NEVER = 2**63  # above every id


class Block:
    """Bytes for one stream or many, with the first and the last log id in them."""

    __slots__ = ("_items", "_named", "_next", "chunk", "data", "first", "foreign", "last")

    def __init__(self, data: bytes, first: int = _NEVER, last: int = 0) -> None:
        self.data = data
        self.first = first
        self.last = last
        self.foreign = False  # whether the last `id:` that a client reads in it is not a log id
        self._items: Sequence[Item] = ()
        self._named: Block | None = None
        self._next: tuple[Position, Block, Position] | None = None
        self.chunk = b""  # `data` as one chunk of an HTTP/1.1 body; empty until `make_chunk()`

    @property
    def events(self) -> int:
        """The number of events in the block, until `settle()`."""
        return len(self._items)

    def make_chunk(self) -> bytes:
        """Set and return `chunk`."""
        self.chunk = frame(self.data)
        return self.chunk

    @classmethod
    def of(cls, items: Sequence[Item]) -> Block:
        """Join events into one block, in their order."""
        if len(items) == 1:  # the fast path, because most turns have one event
            [(_, data, log_id)] = items
            ids = [log_id] if log_id else []
            block = cls(data, log_id or _NEVER, log_id)
        else:
            ids = [log_id for _, _, log_id in items if log_id]
            block = cls(b"".join([data for _, data, _ in items]), min(ids, default=_NEVER), max(ids, default=0))
        block._items = items
        block.foreign = len(ids) < len(items) and _ends_with_a_foreign_id(items)
        return block

    def next_for(self, before: Position, now: float) -> tuple[Block, Position]:
        """Return the part of the block for a stream at position `before`, and the stream's position afterwards.

        The last result is kept. Streams that are not at the common position of their set mostly share another one, and
        so share this result too.
        """
        if self._next is None or self._next[0] is not before:
            seen = self.seen_from(before.accepted)
            self._next = before, seen, before.after(seen, now)
        return self._next[1:]

    def seen_from(self, accepted: int) -> Block:
        """Return the part of the block for a stream that has all events up to the log id `accepted`; it may be empty.

        Events that are not in the log are always in that part. If the stream has a log id, then the last `id:` that the
        client reads is a log id.
        """
        if self.first <= accepted:  # the stream has read the beginning from the log already
            return self._above(accepted).seen_from(accepted)
        accepted = self.last or accepted
        return self._named_by(accepted) if self.foreign and accepted else self

    def _above(self, log_id: int) -> Block:
        return Block.of([item for item in self._items if not item[2] or item[2] > log_id])

    def _named_by(self, log_id: int) -> Block:
        if self._named is None or self._named.last != log_id:  # nearly all streams need the same id
            self._named = Block(self.data + event.control_block("cursor", {}, id=log_id), last=log_id)
        return self._named

    def settle(self) -> None:
        """Keep only `data`. The block has been offered to all streams, and may wait a long time for a slow client."""
        self._items = ()
        self._named = self._next = None
        self.chunk = b""


def _ends_with_a_foreign_id(items: Sequence[Item]) -> bool:
    for _, data, log_id in reversed(items):
        if log_id:
            return False
        if b"\nid: " in b"\n" + data:  # every line begins with its field name, so data cannot look like an id
            return True
    return False


HEARTBEAT = Block(event.HEARTBEAT)


@dataclass(slots=True, eq=False)
class Position:
    """How far a stream has got. Immutable: streams that have received the same share one object, compared by `is`."""

    accepted: int = 0  # the stream has accepted all events up to this log id
    told: int = 0  # the last log id that the client received; 0: it may know an older id than `accepted`
    told_at: float = 0.0  # monotonic time at which it received that id
    active_at: float = 0.0  # monotonic time of the last block
    size: int = 0  # bytes of all blocks so far; the start is arbitrary, so only differences mean something
    shared: bool = False  # whether streams may share it: everything they accepted has then been handed to the server

    def after(self, block: Block, now: float, *, shared: bool = False) -> Position:
        """Return the position after a block, which is the part of it that a stream at this position gets."""
        size = self.size + len(block.data)
        if block.last:
            return Position(block.last, block.last, now, now, size, shared)
        return Position(self.accepted, self.told, self.told_at, now, size, shared)

    def heartbeat_due_at(self, heartbeat: float, cursor: Block) -> float:
        """Return the monotonic time from which `heartbeat_block()` returns one, if nothing else is sent until then.

        `heartbeat` is in seconds.
        """
        moved_on = cursor.last >= self.accepted and cursor.last > self.told
        return (min(self.told_at, self.active_at) if moved_on else self.active_at) + heartbeat

    def heartbeat_block(self, quiet_since: float, cursor: Block) -> Block | None:
        """Return the block that is due on a stream after silence since `quiet_since`; None if none is due.

        It is `cursor`, which carries the log's position, if the log has moved on and the client was last told its
        position before `quiet_since`. Otherwise it is a plain heartbeat. An event that is not in the log makes the
        plain heartbeat unnecessary, but not `cursor`: without it the client's id would grow too old.
        """
        if cursor.last >= self.accepted and cursor.last > self.told and self.told_at <= quiet_since:
            return cursor
        return HEARTBEAT if self.active_at <= quiet_since else None
