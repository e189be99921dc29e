"""Hand over events to the sink: those that a connection has received, and those that must be read from the log.

With the event log the receiver has a position: the id up to which it has handed over everything. Events and beats move
it. A beat is a notification of the listener to itself that carries the log's head. PostgreSQL delivers in the order of
commits, so when a beat comes back everything up to that head has arrived. Events that the connection did not deliver
(it was lost, an event is too large for NOTIFY, or LISTEN is deaf) are read from the log, starting at the position.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ...concurrency.greenlets import checkpoint
from ..base import Disconnect, Item, Page, Sink
from ..listener import ANSWER_WITHIN, PAUSE, TURN_BYTES, TURN_EVENTS
from ..listens import ListenTable
from . import codec, control
from .codec import Decoder
from .connect import execute
from .control import Control, DisconnectCommands
from .dsn import Dsn
from .foreign import take
from .history import HEAD, LONGEST_READ, read_page
from .installation import Installation
from .unquoted import UnquotedNames

logger = logging.getLogger(__name__)

# A lone payload shorter than this has nothing unread behind it: libpq reads all there is, up to at least 8 kB.
_ALONE_CHARS = 1024
# No event is larger: a value in PostgreSQL has at most 1 GB.
_ANY_SIZE = 2**30
# Seconds in which the server must answer a read of the log. One page may be one event of many megabytes.
_READ_WITHIN = 30.0
# Bytes of commands to end streams, some 200, that are read when a process begins to listen.
_EARLIER_BYTES = 256 * 1024


class Receiver:
    """Receives events for the channels in `listens`, and hands them to `sink`. One thread uses it."""

    def __init__(self, dsn: Dsn, sink: Sink, listens: ListenTable, commands: DisconnectCommands) -> None:
        self._dsn = dsn
        self._sink = sink
        self._listens = listens
        self.unquoted = UnquotedNames()
        self.log: Installation | None = None
        self.decoder = Decoder()
        self.control = Control(sink.pruned, commands, self.decoder)
        self.position = 0  # in the log; 0 if it is not known or there is no log
        self.confirmed = 0  # the position when the last beat came back: if the log loses it, it has lost events
        self._behind = False  # the log has to be read before an event or a command of it can be taken
        self.stopping = False  # set by another thread: end what takes long
        self._left: list[Any] = []  # arrived, but not handed over yet, in reverse order
        self._lost_one = False  # a connection was lost on which a LISTEN may have been active

    @property
    def log_is_on(self) -> bool:
        return self.log is not None

    def use(self, log: Installation | None) -> None:
        """Use this event log from now on, or none."""
        self.log = log
        self.decoder.key = None if log is None else log.key

    def connected(self) -> None:
        """Note that a new connection follows. What an earlier one received and did not hand over is void."""
        self._left = []
        self._behind = self.position > 0

    def lost(self) -> None:
        """Note that a connection was lost on which a LISTEN may have been active."""
        self._lost_one = True

    def hand_over(self, connection: Any) -> bool:
        """Deliver one turn of arrived events. Return True if it was a full turn, after which there may be more.

        One poll() reads one buffer. After the server has closed the connection, the first poll() succeeds. The
        descriptor becomes readable again, and the next poll() raises.
        """
        turn: list[Item] = []
        size = 0
        before = self.position
        fetch = alone = False
        try:
            while len(turn) < TURN_EVENTS and size < TURN_BYTES and not fetch:
                if not self._left:
                    if alone:
                        return False
                    connection.poll()
                    self._left = self._take(connection)[::-1]
                    if not self._left:
                        return False
                    # Nothing is left in libpq's buffer or, decrypted, in OpenSSL's. Later data makes the descriptor
                    # readable again. To look for it now would cost as much as all the rest.
                    alone = len(self._left) == 1 and len(self._left[0].payload) < _ALONE_CHARS
                notification = self._left.pop()
                if self._behind and codec.is_logged(notification.payload):
                    continue  # the position must not pass what came before it; catch_up() reads it
                if notification.channel == control.CHANNEL:
                    ours = notification.pid == connection.info.backend_pid
                    self.position = self.control.notified(notification.payload, ours, self.position)
                    continue
                channel = self._listens.channel_of(notification.channel)
                if channel is None:
                    continue
                log_id, block = self.decoder.decode(notification.payload, channel)
                if log_id and log_id <= self.position:
                    continue  # already read from the log
                if block is None:
                    fetch = log_id > 0
                    continue
                self.position = log_id or self.position
                turn.append((channel, block, log_id))
                size += len(block)
                also = self.unquoted.heard.get(notification.channel)
                if also is not None and codec.is_raw(notification.payload):
                    turn.append((also, block, 0))
        finally:  # deliver the events that arrived before the connection broke
            if turn or self.position != before:
                self._sink.deliver(turn, self.position)
        if fetch:
            self.catch_up(connection)
        checkpoint(PAUSE)
        return True

    def _take(self, connection: Any) -> list[Any]:
        def run(query: str, args: Sequence[Any]) -> Any:
            return execute(connection, query, tuple(args), timeout=_READ_WITHIN)

        return take(connection, run, functools.partial(self.decoder.dropped.add, "a NOTIFY payload"))

    def begin(self, connection: Any) -> Sequence[Disconnect] | None:
        """Begin at the log's head. Return the commands that the log has up to there.

        Returns None if there is no log, or if it has more of them than can be read here.
        """
        if not self.log_is_on:
            return None
        texts: list[str] = []
        page = self._read(connection, [control.CHANNEL], 0, max_bytes=_EARLIER_BYTES, commanded=texts.append)
        self.position = self.confirmed = page.head
        return self.control.read(texts) if page.upto >= page.head else None

    def recover(self, connection: Any) -> bool:
        """Read from the log the events that came while no LISTEN was active, or report that they may be lost.

        Return whether they have been read.
        """
        lost_one, self._lost_one = self._lost_one, False
        self._behind = False
        if not lost_one:
            logger.info("Listening to PostgreSQL at %s.", self._dsn)
        if self.log_is_on and self.position:
            return self.catch_up(connection)
        self.position = self._read(connection, [], 0).head if self.log_is_on else 0
        self.confirmed = self.position
        if lost_one:
            logger.warning("Events since the connection to %s broke may be lost.", self._dsn)
            self._sink.gap("reconnected", self.position)
        elif self.position:
            self._sink.deliver((), self.position)
        return False

    def catch_up(self, connection: Any) -> bool:
        """Read the log from the position to its head, and hand over the events. Return whether it had them all."""
        while not self.stopping:
            # Drop the arrived events of the log: the next pages have them too, and after a long absence there are too
            # many to keep.
            connection.poll()
            arrived = [*self._left[::-1], *self._take(connection)]
            self._left = [one for one in reversed(arrived) if not codec.is_logged(one.payload)]
            page = self._read(connection, [*self._listens.channels(), control.CHANNEL], self.position)
            if page.refusal is not None:
                self._restart(page)
                return False
            self.position = page.upto
            self._sink.deliver(page.items, page.upto)
            if page.upto >= page.head:
                return True
            checkpoint(PAUSE)
        return False

    def poll(self, connection: Any) -> None:
        """Read the log if it has changed. This costs one look at its head, however many channels there are."""
        self._left, connection.notifies = [], []  # without LISTEN the log alone has the events whole and in order
        [(head,)] = self._run(connection, HEAD, within=ANSWER_WITHIN)
        if head != self.position:
            self.catch_up(connection)

    def _restart(self, page: Page) -> None:
        """Continue from the head of a log that no longer has the position."""
        lost, self.position, self.confirmed = self.position, page.head, page.head
        if page.refusal == "too-old":
            logger.warning("The event log of %s does not reach back to the last received event.", self._dsn)
            self._sink.gap(page.refusal, page.head)
            return
        logger.warning(
            "The event log of %s has lost events that were sent: those after %d and up to %d, the last that was "
            "received. A failover or a restore has undone them. All streams are told (sse-reset, undone).",
            self._dsn,
            page.upto,
            lost,
        )
        self._sink.gap("undone", page.head)

    def _run(self, connection: Any, query: str, args: Sequence[Any] = (), *, within: float = _READ_WITHIN) -> Any:
        guarded = query if self.log is None else self.log.guarded(query)
        return execute(connection, guarded, tuple(args), timeout=within, limit=LONGEST_READ)

    def _read(
        self,
        connection: Any,
        channels: Sequence[str],
        after: int,
        *,
        max_bytes: int = TURN_BYTES,
        commanded: Callable[[str], None] | None = None,
    ) -> Page:
        run = functools.partial(self._run, connection)
        commanded = commanded or self.control.logged
        return read_page(run, channels, after, max_bytes, _ANY_SIZE, self.decoder.dropped, commanded=commanded)
