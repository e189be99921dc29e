"""One stream's place between the fan-out and its client: what it is offered, where it stands, and its way out.

A stream is live, and takes what is offered, or it is behind, takes nothing, and reads the event log until it has caught
up. Invariant: an event of the log is taken only if its id is above `position.accepted`, and taking it moves that.

Who calls what: `offer_to_all()`, `offer()`, `reset()`, `fall_behind()`, `go_live()`, and `end()` while the client may
still listen, come one call at a time: the hub's lock sees to that. `take()` comes from the stream's generator alone.
What waits between the two is a `Buffer`, which needs no lock, so that the hot path has none.

A generator with nothing to send parks and leaves `_way` behind, the way to its client past it. It goes on only for
something that comes from the hub's side (`_has_work()`), and the hub's side writes directly only while there is none of
that: so never do both write at once, also with threads.

Most streams get the same as others, and stand at the same `Position`: the hot path moves them from one to the next, and
nothing else about them. What such a stream has been sent, and up to which id, is read off where it stands.
"""

from __future__ import annotations

import _socket
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..concurrency import ParkingSpot, new_parking_spot
from ..engine.base import Ticket
from ..server.direct_write import NOW, write
from .block import Block, Position
from .buffer import Buffer

# What is written past the generator at the most, by the greenlet that has others to serve.
_DIRECT_BYTES = 65536
# Where a stream stands that takes nothing: no other does.
_NOWHERE = Position()


class Connection(Protocol):
    """The way to a stream's client, and how fast that takes what is sent."""

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
    """On what terms a stream was opened. Times are monotonic.

    subjects:     whose it is, as the app and the token say; `disconnect(subject=…)` finds it by these.
    clients:      what it is counted under (`counted_under()`), if at all.
    asked_at:     when the asking for permission began. A right that was taken away since then may not have been seen.
    ends_at:      when it has to end, and `ends_because` the reason that the client is told.
    """

    subjects: frozenset[str] = frozenset()
    clients: tuple[str, ...] = ()
    asked_at: float = -math.inf
    ends_at: float = math.inf
    ends_because: str = ""


class Subscription:
    """One stream, as the fan-out sees it. `limit` bounds in bytes what waits for its client (see `Buffer`)."""

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
        "live",
        "place",
        "position",
        "terms",
        "ticket",
        "watched_as",
    )

    place: None  # there while it has one of `StreamLimiter`

    def __init__(self, channels: Iterable[str], limit: int, terms: Terms = Terms()) -> None:
        self.channels = frozenset(channels)
        self.limit = limit
        self.terms = terms
        self.live = False
        self.position = _NOWHERE
        self._sent = 0  # see `sent`
        self.connection: Connection | None = None  # once the stream has begun
        self.awake: set[Subscription] = set()  # where it is while its generator is not parked: the hub's, once open
        self.watched_as = -1  # the number of its socket, if it is watched for its end
        # Monotonic time at which it is to end or, once that has been decided, to lose its connection if that stands.
        self.due = terms.ends_at
        self.ticket: Ticket | None = None  # while the stream stands in the hub's tables
        self._buffer: Buffer | None = None  # once something had to wait, which for most nothing ever has
        self._closing: bytes | None = None
        self._way: _socket.socket | None = None  # to the client past the generator, while that is parked
        # Bytes written past the generator since it parked: these, and what `position` has grown by beyond `_since`.
        self._past = 0
        self._since = 0
        self._torn = b""  # the rest of a chunk of which the socket has taken a part
        self._spot: ParkingSpot | None = None

    def agree(self, terms: Terms) -> None:
        """Be on other terms, until now nobody's. Before it is opened."""
        self.terms = terms
        self.due = terms.ends_at

    @property
    def waiting(self) -> int:
        """Bytes that were offered and that the server has not yet sent."""
        return 0 if self._buffer is None else self._buffer.size

    @property
    def sent(self) -> int:
        """The log's id up to which all has been handed to the server: where to read on after falling behind."""
        position = self.position
        return position.accepted if position.shared else self._sent

    @sent.setter
    def sent(self, log_id: int) -> None:
        self._sent = log_id

    def _move_to(self, where: Position, past: int = 0) -> None:
        """Move to `where`, on a way of its own. `past` are the bytes that it got past the generator on that way."""
        if self.position.shared:  # otherwise it is the generator's to say what has been sent
            self._sent = self.position.accepted
        self._past += past + self.position.size - self._since
        self.position, self._since = where, where.size

    @property
    def ended(self) -> bool:
        """Whether the stream's end has been decided; its last block may still have to leave."""
        return self._closing is not None

    def go_live(self, after: int, missed: Block, now: float, *, like: Position | None = None) -> None:
        """Take what is offered from now on. The client has everything up to the id `after`, and then `missed`.

        `like` is where others stand who have the same. Without it the client is taken not to know the id `after`: the
        log may have been read far beyond its last event.
        """
        self._buffer = None
        self._sent = after
        self._move_to((like or Position(after, 0, now, now)) if self._closing is None else _NOWHERE)
        self.live = True
        if missed.data:
            self.offer(missed, now)

    def offer(self, block: Block, now: float, like: Position | None = None) -> bool:
        """Take a block for the client; False if it is too slow for that. A stream that is not live takes nothing.

        `like` is where others stand that have taken it.
        """
        if not self.live or self._closing is not None:
            return True
        block, where = block.next_for(self.position, now)
        if not block.data:
            return True
        sent = self._write(block)
        if not sent:
            # Before the generator is woken; and not to where those stand to whom can be written directly.
            self._move_to(where)
            if not self._wait_with().append(block):
                return False
            self._wake()
            return True
        # Since when the client knows its id may differ by a little; that it is the same one is what counts.
        if like is not None and like.accepted == where.accepted and like.told == where.told:
            where = like
        self._move_to(where, past=len(block.data))
        self._sent = block.last or self._sent
        if sent < len(block.chunk):
            self._tear(len(block.data), block.chunk[sent:])
        return True

    def reset(self, block: Block, position: int, now: float, like: Position) -> bool:
        """Take a block after which the stream goes on from another position of the log."""
        self._move_to(Position(position, self.position.told, self.position.told_at, now))
        return self.offer(block, now, like)

    def _wait_with(self) -> Buffer:
        if self._buffer is None:
            self._buffer = Buffer(self.limit)
        return self._buffer

    def _write(self, block: Block) -> int:
        """Send a block past the parked generator; return the bytes of its chunk that left, 0 for none."""
        if self._way is None or len(block.data) > _DIRECT_BYTES or self._has_work():
            return 0
        # Read again, after the look at the work: a generator that has taken that since has closed the way before.
        way = self._way
        if way is None:
            return 0
        try:
            return write(way, block.chunk or block.make_chunk(), NOW)
        except OSError:  # no room, or the client has gone, which is the generator's to find out
            return 0

    def _tear(self, size: int, rest: bytes) -> None:
        """Leave the rest of a chunk to the generator, and until then all that comes."""
        self._wait_with().count_in_flight(size)
        self._way = None
        self._torn = rest
        self._wake()

    def fall_behind(self) -> None:
        """Drop what waits. The stream is to read on from the log, from `sent`."""
        self._move_to(_NOWHERE)
        self.live = False
        self._drop()
        self._wake()

    def end(self, block: bytes, *, drop: bool = False, cut_at: float = math.inf) -> None:
        """Close the stream with `block`, after what waits or, with `drop`, in place of it. The first end counts.

        Whoever has not read that far by `cut_at` loses the connection.
        """
        if self._closing is not None:
            self.due = min(self.due, cut_at)
            return
        self.due = cut_at
        self._closing = block
        self._move_to(_NOWHERE)
        if drop:
            self._drop()
        self._wake()

    def _drop(self) -> None:
        backlog = self._buffer  # read once: without the hub's lock it may be gone the next moment
        if backlog is not None:
            backlog.drop()

    def take(self) -> bytes | None:
        """Return the next piece for the client, waiting until there is one; None when the stream has ended.

        All that waits goes in one piece, up to 16 kB: a client that fell behind catches up in few sends. An empty piece
        says that the stream is not live.
        """
        if self._buffer is not None:
            self._buffer.arrived()
        while True:
            closing, live = self._closing, self.live  # read first: what was offered before is then in sight
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
            # Looked at after the way has been laid open: what came before would otherwise wake nobody.
            while not self._has_work():
                self._spot.park()
        finally:  # also if the greenlet is killed: its connection is not ours any more
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
        """Tell whether there is something for the generator, which then alone writes to the client."""
        return bool(self._torn or self._buffer) or self._closing is not None or not self.live

    def _wake(self) -> None:
        if self._spot is not None:
            self._spot.wake()


def offer_to_all(
    streams: Iterable[Subscription], block: Block, seen: Block, before: Position, after: Position
) -> list[Subscription]:
    """Offer a block to streams, most of which stand at `before`, are to get `seen` of it, and will stand at `after`.

    Returns those too slow for it. The hot path: no lock, no formatting, no log, and for a stream that waits idle at
    `before` no call but the send.
    """
    if not 0 < len(seen.data) <= _DIRECT_BYTES:
        return [stream for stream in streams if not stream.offer(block, after.active_at, after)]
    chunk = seen.chunk or seen.make_chunk()
    size = len(chunk)
    slow = []
    send = write
    for stream in streams:
        # Those that stand at `before` are live, and nothing waits for them.
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
