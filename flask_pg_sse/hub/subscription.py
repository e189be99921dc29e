"""One stream between the fan-out and its client: what it is offered, its position, and how its bytes leave.

A stream is either live or behind. A live stream accepts what is offered. A stream that is behind accepts nothing, and
reads the event log until it has caught up. Invariant: an event of the log is accepted only if its id is above
`position.accepted`, and accepting it raises that.

The hub's lock serialises `offer_to_all()`, `offer()`, `reset()`, `fall_behind()` and `go_live()`, and also `end()`
while the client may still listen. Only the stream's generator calls `take()`. Between the two is a `Buffer`, which
needs no lock. So the hot path takes no lock for a stream.

A generator with nothing to send parks, and leaves its client's socket in `_way` for direct writes. It continues only
for work that comes from the hub's side (`_has_work()`). The hub's side writes directly only while there is no such
work. So the two never write at the same time, not even with threads.

Most streams receive the same as others, and share one `Position`. The hot path moves them from one position to the next
and changes nothing else in them. The position also tells what such a stream has been sent, and up to which id.
"""

from __future__ import annotations

import _socket
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..concurrency.parking import ParkingSpot, new_parking_spot
from ..engine.base import Erased, Ticket
from ..server.direct_write import NOW, write
from .block import Block, Position
from .buffer import Buffer

# The largest block that is written directly. A larger one would keep the hub from other streams for too long.
_DIRECT_BYTES = 65536
# The position of a stream that accepts nothing. No other stream has it.
_NOWHERE = Position()


class Connection(Protocol):
    """The connection to a stream's client, and how fast the client takes what is sent."""

    in_flight: int
    bytes_sent: int

    @property
    def judged(self) -> object: ...

    def stalled(self, now: float, timeout: float) -> bool: ...

    def cut(self) -> None: ...

    def gone(self) -> bool: ...

    def fileno(self) -> int: ...

    def way(self) -> _socket.socket | None: ...

    def count(self, body_bytes: int) -> None: ...

    def finish(self, rest: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which a stream was opened. Times are monotonic, in seconds.

    subjects:     the stream's subjects, from the app and the token; `disconnect(subject=…)` finds the stream by them.
    revocable:    whether a token or the app's authorizer opened it, so that the right to it can be taken away.
    clients:      the client that the stream takes turns for, and counts for (`counted_under()`).
    asked_at:     when the permission check began. The check may have missed a right that was taken away after that.
    ends_at:      when the stream must end.
    ends_because: the reason for that end, as the client is told it.
    """

    subjects: frozenset[str] = frozenset()
    clients: tuple[str, ...] = ()
    asked_at: float = -math.inf
    ends_at: float = math.inf
    ends_because: str = ""
    revocable: bool = False


class Subscription:
    """One stream, as the fan-out sees it. `limit` is how many bytes may wait for its client (see `Buffer`)."""

    __slots__ = (
        "_buffer",
        "_closing",
        "_past",
        "_sent",
        "_since",
        "_spot",
        "_torn",
        "_way",
        "awake",
        "channels",
        "connection",
        "due",
        "limit",
        "lineage",
        "live",
        "opened",
        "place",
        "position",
        "reason",
        "terms",
        "ticket",
        "told_away",
        "waits_for",
        "watched_as",
    )

    place: None  # the attribute exists while the stream has a place of the `StreamLimiter`

    def __init__(self, channels: Iterable[str], limit: int, terms: Terms = Terms()) -> None:
        self.channels = frozenset(channels)
        self.limit = limit
        self.terms = terms
        self.live = False
        self.opened = False  # whether its client has been told that it has begun
        self.reason = ""  # why it has ended, once `end()` was called
        self.position = _NOWHERE
        self._sent = 0  # see `sent`
        self.lineage = 0  # the hub's when the log was known to have `sent`; 0: it has not been asked
        self.connection: Connection | None = None  # once the stream has begun
        self.awake: set[Subscription] = set()  # has this stream while its generator is not parked; once open, the hub's
        self.watched_as = -1  # the number of its socket while `Hangups` watches that; -1: it does not
        # Monotonic time at which the stream must end. After `end()`: at which its connection is cut, if still open.
        self.due = terms.ends_at
        self.told_away = False  # whether its client has been told that the bus is away, and nothing since
        self.ticket: Ticket | None = None  # while the stream is in the hub's tables
        self.waits_for: Ticket | None = None  # while its generator waits in `wait_for()`
        self._buffer: Buffer | None = None  # made when something has to wait, which for most streams never happens
        self._closing: bytes | None = None
        self._way: _socket.socket | None = None  # the socket for direct writes, while the generator is parked
        # Bytes written directly since the generator parked: `_past`, and what `position.size` has grown since `_since`.
        self._past = 0
        self._since = 0
        self._torn = b""  # the rest of a chunk that the socket took only in part
        self._spot: ParkingSpot | None = None

    def agree(self, terms: Terms) -> None:
        """Set the terms of a stream that has not been opened yet."""
        self.terms = terms
        self.due = terms.ends_at

    @property
    def waiting(self) -> int:
        """Bytes that were offered and that the server has not sent yet."""
        return 0 if self._buffer is None else self._buffer.size

    @property
    def sent(self) -> int:
        """The log id up to which everything has been handed to the server. A stream that is behind reads on from it."""
        position = self.position
        return position.accepted if position.shared else self._sent

    @sent.setter
    def sent(self, log_id: int) -> None:
        self._sent = log_id

    def _move_to(self, position: Position, past: int = 0) -> None:
        """Move to a position outside the hot path. `past` is how many bytes of this step were written directly."""
        if self.position.shared:  # otherwise the generator says what has been sent
            self._sent = self.position.accepted
        self._past += past + self.position.size - self._since
        self.position, self._since = position, position.size

    @property
    def ended(self) -> bool:
        """Whether the stream has been told to end. Its last block may still wait to be sent."""
        return self._closing is not None

    def go_live(self, after: int, missed: Block, now: float, *, like: Position | None = None) -> None:
        """Accept what is offered from now on. The client has everything up to the id `after`, and `missed` comes next.

        `like` is the position of other streams that have the same events. Without it, the client is assumed not to know
        the id `after`, because the log may have been read far beyond the last event that the client got.
        """
        self._buffer = None
        self._sent = after
        self._move_to((like or Position(after, 0, now, now)) if self._closing is None else _NOWHERE)
        self.live = True
        if missed.data:
            self.offer(missed, now)

    def offer(self, block: Block, now: float, like: Position | None = None) -> bool:
        """Accept a block for the client. Returns False if the client is too slow for it.

        A stream that is not live ignores the block. `like` is the position of other streams that have accepted it.
        """
        if not self.live or self._closing is not None:
            return True
        block, position = block.next_for(self.position, now)
        if not block.data:
            return True
        sent = self._write(block)
        if not sent:
            # Before the generator is woken. Not to `like`, the position of streams that can be written to directly.
            self._move_to(position)
            if not self._wait_with().append(block):
                return False
            self._wake()
            return True
        # The streams may differ slightly in when their clients learned their id. Only the id itself must be the same.
        if like is not None and like.accepted == position.accepted and like.told == position.told:
            position = like
        self._move_to(position, past=len(block.data))
        self._sent = block.last or self._sent
        if sent < len(block.chunk):
            self._tear(len(block.data), block.chunk[sent:])
        return True

    def reset(self, block: Block, position: int, now: float, like: Position) -> bool:
        """Accept a block after which the stream continues from the log id `position`."""
        self._move_to(Position(position, self.position.told, self.position.told_at, now))
        return self.offer(block, now, like)

    def _wait_with(self) -> Buffer:
        if self._buffer is None:
            self._buffer = Buffer(self.limit)
        return self._buffer

    def _write(self, block: Block) -> int:
        """Send a block directly, past the parked generator. Returns how many bytes of its chunk left; it may be 0."""
        if self._way is None or len(block.data) > _DIRECT_BYTES or self._has_work():
            return 0
        # Read `_way` again after the check for work: a generator resets it before it takes the work.
        way = self._way
        if way is None:
            return 0
        try:
            return write(way, block.chunk or block.make_chunk(), NOW)
        except OSError:  # the socket is full, or the client has disconnected, which the generator will notice
            return 0

    def _tear(self, size: int, rest: bytes) -> None:
        """Leave the rest of a chunk to the generator, and everything that is offered until the rest is sent."""
        self._wait_with().count_in_flight(size)
        self._way = None
        self._torn = rest
        self._wake()

    def holds(self, erased: Erased) -> bool:
        """Tell whether what waits to be sent may have erased events in it."""
        buffer = self._buffer  # read once, as in `_drop()`
        concerned = erased.channel is None or erased.channel in self.channels
        return concerned and buffer is not None and buffer.holds(erased.through)

    def fall_behind(self) -> None:
        """Drop what waits. The stream then reads the log, from `sent` on."""
        self._move_to(_NOWHERE)
        self.live = False
        self._drop()
        self._wake()

    def end(self, block: bytes, *, reason: str = "client", drop: bool = False, cut_at: float = math.inf) -> None:
        """End the stream with `block`, after what waits or, with `drop`, instead of it.

        `reason` is for the counters; by default the client has closed the connection. A client that has not read that
        far by the monotonic time `cut_at` loses its connection. Only the first call counts; a later one can only bring
        `cut_at` forward.
        """
        if self._closing is not None:
            self.due = min(self.due, cut_at)
            return
        self.due = cut_at
        self.reason = reason
        self._closing = block
        self._move_to(_NOWHERE)
        if drop:
            self._drop()
        self._wake()
        waits_for = self.waits_for
        if waits_for is not None:
            waits_for.cancel()

    def wait_for(self, ticket: Ticket, timeout: float) -> bool:
        """Wait at most `timeout` seconds, and return whether it was answered. The end of the stream ends the wait."""
        self.waits_for = ticket
        try:  # `ended` is read after `waits_for` is set: `end()` does the reverse
            return not self.ended and ticket.wait(timeout)
        finally:
            self.waits_for = None

    def _drop(self) -> None:
        buffer = self._buffer  # read once: without the hub's lock another thread may remove it at any moment
        if buffer is not None:
            buffer.drop()

    def take(self) -> bytes | None:
        """Wait for the next piece for the client and return it; None when the stream has ended.

        A piece holds all that waits, up to 16 kB, so a client that fell behind catches up in few sends. An empty piece
        means that the stream is not live.
        """
        if self._buffer is not None:
            self._buffer.arrived()
        while True:
            closing, live = self._closing, self.live  # read first: what was offered before they changed is then visible
            found = self._buffer.next_piece() if self._buffer is not None else None
            if found is not None:
                piece, last = found
                self._sent = last or self._sent
                return piece
            if closing is not None:
                self._closing = b""
                return closing or None
            if not live:
                return b""
            self._park()

    def _park(self) -> None:
        if self._spot is None:
            self._spot = new_parking_spot()
        connection = self.connection
        way = connection.way() if connection is not None else None
        self._way = way
        self.awake.discard(self)
        try:
            # Checked after `_way` is set. Otherwise work that came just before would wake nobody.
            while not self._has_work():
                self._spot.park()
        finally:  # also if the greenlet is killed, because the connection is then no longer ours
            self.awake.add(self)
            self._way = None
            if connection is not None and way is not None:
                connection.count(self._past + self.position.size - self._since)
                self._past, self._since = 0, self.position.size
        if self._torn and connection is not None:
            rest, self._torn = self._torn, b""
            connection.finish(rest)
            self._wait_with().arrived()

    def _has_work(self) -> bool:
        """Tell whether the generator has work. While it has, only the generator writes to the client."""
        return bool(self._torn or self._buffer) or self._closing is not None or not self.live

    def _wake(self) -> None:
        if self._spot is not None:
            self._spot.wake()


def offer_to_all(
    streams: Iterable[Subscription], block: Block, seen: Block, before: Position, after: Position
) -> list[Subscription]:
    """Offer a block to many streams, most of them at the position `before`. Returns those that are too slow for it.

    A stream at `before` gets `seen`, its part of the block, and moves to `after`. This is the hot path: no lock, no
    formatting, no log call, and for a parked stream at `before` no call but the send.
    """
    if not 0 < len(seen.data) <= _DIRECT_BYTES:
        return [stream for stream in streams if not stream.offer(block, after.active_at, after)]
    chunk = seen.chunk or seen.make_chunk()
    size = len(chunk)
    slow = []
    send = write
    for stream in streams:
        # A stream at `before` is live, and nothing waits for it.
        if stream.position is before and (way := stream._way) is not None:
            try:
                sent = send(way, chunk, NOW)
            except OSError:
                sent = 0
            if sent == size:
                stream.position = after
                continue
            if sent:
                stream.position = after
                stream._tear(len(seen.data), chunk[sent:])
                continue
        if not stream.offer(block, after.active_at, after):
            slow.append(stream)
    return slow
