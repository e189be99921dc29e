"""What is handed to streams: blocks of bytes, the ids between which they lie, and where a stream stands after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import event
from ..engine.base import Item
from ..server.direct_write import frame

_NEVER = 2**63  # above every id


class Block:
    """Bytes for a stream, or for many, and the ids in the log between which they lie."""

    __slots__ = ("_items", "_named", "_next", "chunk", "data", "first", "foreign", "last")

    def __init__(self, data: bytes, first: int = _NEVER, last: int = 0) -> None:
        self.data = data
        self.first = first
        self.last = last
        self.foreign = False  # whether the last id that a client finds in it is not the log's
        self._items: Sequence[Item] = ()
        self._named: Block | None = None
        self._next: tuple[Position, Block, Position] | None = None
        self.chunk = b""  # the bytes as one chunk of an HTTP/1.1 body, once made

    def make_chunk(self) -> bytes:
        """Set and return `chunk`."""
        self.chunk = frame(self.data)
        return self.chunk

    @classmethod
    def of(cls, items: Sequence[Item]) -> Block:
        """Join events, in their order."""
        if len(items) == 1:  # as most turns are
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
        """Return what of it is for a stream that stands at `before`, and where that stands afterwards.

        Most that do not stand with the others have come the same way too, and are given the same.
        """
        if self._next is None or self._next[0] is not before:
            seen = self.seen_from(before.accepted)
            self._next = before, seen, before.after(seen, now)
        return self._next[1:]

    def seen_from(self, accepted: int) -> Block:
        """Return what of it is for a stream that has everything up to an id of the log; it may be empty.

        All that is not in the log is. The last id that the client finds in it is the log's, if the stream has one.
        """
        if self.first <= accepted:  # it came by the log already
            return self._above(accepted).seen_from(accepted)
        accepted = self.last or accepted
        return self._named_by(accepted) if self.foreign and accepted else self

    def _above(self, log_id: int) -> Block:
        return Block.of([item for item in self._items if not item[2] or item[2] > log_id])

    def _named_by(self, log_id: int) -> Block:
        if self._named is None or self._named.last != log_id:  # nearly all streams want the same
            self._named = Block(self.data + event.control_block("cursor", {}, id=log_id), last=log_id)
        return self._named

    def settle(self) -> None:
        """Keep the bytes alone: it has been offered to all, and may wait for a slow client for long."""
        self._items = ()
        self._named = self._next = None
        self.chunk = b""


def _ends_with_a_foreign_id(items: Sequence[Item]) -> bool:
    for _, data, log_id in reversed(items):
        if log_id:
            return False
        if b"\nid: " in b"\n" + data:  # every line begins with its field's name, whatever the data are
            return True
    return False


HEARTBEAT = Block(event.HEARTBEAT)


@dataclass(slots=True, eq=False)
class Position:
    """Where a stream stands. Never changed: streams that have got the same share the object, and are known by that."""

    accepted: int = 0  # id in the log up to which all has been taken
    told: int = 0  # the last id of the log that the client got; 0: it may know an older one than `accepted`
    told_at: float = 0.0  # monotonic time of that
    active_at: float = 0.0  # monotonic time of the last block
    size: int = 0  # bytes of all blocks up to here, from anywhere: differences count
    shared: bool = False  # whether streams may meet here: all that they accepted has then been handed to the server

    def after(self, block: Block, now: float, *, shared: bool = False) -> Position:
        """Return where a stream stands that has taken a block, as it was seen from here."""
        size = self.size + len(block.data)
        if block.last:
            return Position(block.last, block.last, now, now, size, shared)
        return Position(self.accepted, self.told, self.told_at, now, size, shared)

    def sign_due_at(self, heartbeat: float, cursor: Block) -> float:
        """Return when `sign_of_life()` will have one, if nothing comes until then. `heartbeat` is in seconds."""
        moved_on = cursor.last >= self.accepted and cursor.last > self.told
        return (min(self.told_at, self.active_at) if moved_on else self.active_at) + heartbeat

    def sign_of_life(self, quiet_since: float, cursor: Block) -> Block | None:
        """Return what a stream gets if nothing has been sent since `quiet_since`: the log's position if it moved on.

        Events that are not in the log are a sign of life, but they do not keep the client's id from growing too old.
        """
        if cursor.last >= self.accepted and cursor.last > self.told and self.told_at <= quiet_since:
            return cursor
        return HEARTBEAT if self.active_at <= quiet_since else None
