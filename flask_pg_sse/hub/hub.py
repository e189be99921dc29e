"""Which streams listen to what in this process, and the delivery of every turn to them.

A turn is all that one look at the bus brought, in its order; an engine hands it over (`deliver()`), and every stream is
offered its share of it (`fanout.py`).

With the event log, `position` is the id up to which everything has been handed over. A stream that has missed
something goes live at the moment when what the hub remembers joins on to what it has. Nothing is lost or repeated
there, because turns and that moment exclude each other.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from .. import event
from ..concurrency import FairLock
from ..engine.base import ControlMessage, Disconnect, Item, Readiness, Tail, Ticket
from ..server.hangups import Hangups
from ..server.stall import ENOUGH_BYTES
from .admission import OPEN_TIMEOUT, Admission, StreamLimiter, concerns
from .block import HEARTBEAT, Block, Position
from .fanout import SubscriberSet, blocks_of, in_portions
from .history import History
from .subscription import Subscription, offer_to_all
from .timers import Heartbeats, Watchlist

logger = logging.getLogger(__name__)

# Seconds until a client that has not read its farewell is cut off. gunicorn would wait 30 s for it when the worker
# ends, and a client that has lost the right to listen must hear no more.
FAREWELL = 1.0
# Looks at the streams that need it within the shorter of heartbeat and send timeout: often enough to see that a client
# takes nothing.
_LOOKS = 4


class Bus(Protocol):
    """What the hub asks of an engine."""

    def subscribe(self, channels: Iterable[str]) -> Ticket: ...

    def unsubscribe(self, channels: Iterable[str]) -> None: ...


class Hub:
    """The subscriptions of one process, and the engine's `Sink`.

    `retry` is in milliseconds, `heartbeat` and `send_timeout` in seconds.
    """

    def __init__(
        self,
        engine: Bus,
        *,
        heartbeat: float,
        retry: int,
        send_timeout: float = math.inf,
        admission: Admission | None = None,
    ) -> None:
        self._engine = engine
        self.admission = admission or Admission(StreamLimiter(sys.maxsize, None))
        self._send_timeout = send_timeout
        self._retry = retry
        # Offers come one at a time, from the engine's turns or from the ticker, and the tables and what else is below
        # change only between them. Held for a turn, not for a client.
        self._dispatch = FairLock()
        self._sets: dict[frozenset[str], SubscriberSet] = {}
        self._sets_of: dict[str, set[SubscriberSet]] = {}
        self.position = 0  # in the log; 0 without one
        self._history = History()
        self._closed: deque[Subscription] = deque()  # closed, and still in the tables
        self.hangups = Hangups[Subscription]()
        self._heartbeat = heartbeat
        self._heartbeats = Heartbeats(heartbeat)
        self._watchlist = Watchlist()
        self._look_at = 0.0  # monotonic time until which no stream needs to be looked at

    # -- streams come and go

    def open(self, subscription: Subscription) -> str | None:
        """Add a stream and wait until PostgreSQL has confirmed LISTEN; return None, or why it must be refused.

        The stream stands in the tables before LISTEN goes out, so that nothing falls between the two.
        """
        admission = self.admission
        if not admission.limiter.acquire(subscription):
            return "capacity"
        self.hangups.watch(subscription)
        with self._dispatch:  # who is interrupted while waiting for it has not asked for a LISTEN
            ticket = subscription.ticket = self._engine.subscribe(subscription.channels)
            self._look_at = min(self._look_at, subscription.due)
            group = self._sets.get(subscription.channels)
            if group is None:
                group = self._sets[subscription.channels] = SubscriberSet(subscription.channels)
                self._heartbeats.begin(group)
                for channel in subscription.channels:
                    self._sets_of.setdefault(channel, set()).add(group)
            group.add(subscription)
            self._watchlist.begin(subscription)
        # Asked after the stream stands in the tables: drain() closes the admission first and then reads the tables, and
        # disconnect() likewise.
        heard = not admission.why_not(subscription) and ticket.wait(OPEN_TIMEOUT)
        return admission.why_not(subscription) or (None if heard else "unavailable")

    def go_live(self, subscription: Subscription) -> int:
        """Let an open stream take what comes from now on; return the log's position, which its client is to be told."""
        with self._dispatch:
            position = self.position
            if position:
                self._history.begin(subscription.channels, position)
            now = time.monotonic()
            group = self._sets[subscription.channels]
            before = group.position
            if before.accepted != position:  # so that streams can meet there, also if no event has an id
                # With the old times: signs of life are due for those who have been there since.
                group.position = Position(position, position, before.told_at, before.active_at, shared=True)
                group.scattered = True
            subscription.go_live(position, Block(b""), now, like=group.position)
            return position

    def join(self, subscription: Subscription, *, exists: bool) -> bool:
        """Let a stream that has everything up to `sent` go live without a gap; tell whether it could.

        It cannot if it lacks more than is remembered here, or than its buffer takes; then it is to read the log.
        `exists` says that its position is one of the log's: a client may have made one up that no event reaches for a
        long time. Beyond our own position it may well be, where another worker was faster.
        """
        with self._dispatch:
            if subscription.sent > self.position and not exists:
                return False
            items = self._history.missed(subscription.channels, subscription.sent)
            if items is None:
                return False
            missed = Block.of(items)
            if len(missed.data) > subscription.limit:
                return False
            missed.settle()
            subscription.go_live(subscription.sent, missed, time.monotonic())
            self._sets[subscription.channels].scattered = True
            return True

    @property
    def memory(self) -> int:
        """Bytes of events that are remembered of each channel at the most."""
        return self._history.limit

    def follow(self, channels: Iterable[str]) -> None:
        """Remember from now on what comes on the channels of an open stream.

        Of no others: a stream that still waits for its LISTEN stands in the tables too, and its channels' events may
        not be heard yet.
        """
        with self._dispatch:
            self._history.begin([channel for channel in channels if channel in self._sets_of], self.position)

    def unremembered(self, channels: Iterable[str]) -> dict[str, int]:
        """Return the channels whose last events the log is to be asked for, each with the id up to which."""
        with self._dispatch:
            return self._history.gaps(channels)

    def remember(self, tail: Tail, upto: int) -> None:
        """Remember the last events that the log has of a channel, up to an id."""
        with self._dispatch:
            self._history.fill(tail, upto)

    def close(self, subscription: Subscription) -> None:
        """Have a stream forgotten; harmless when it was never opened or has been forgotten already.

        Takes no lock: the garbage collector may close a stream that nobody else did, in any thread and at any moment,
        also while that thread holds a lock of ours. The ticker forgets it.
        """
        subscription.end(b"")
        self.admission.limiter.release(subscription)
        self._closed.append(subscription)

    def end_departed(self) -> None:
        """End the streams whose clients have closed their connections. They leave quietly, if at all."""
        for subscription in self.hangups.take():
            subscription.end(b"", drop=True)

    def sweep(self) -> None:
        """Forget the streams that have gone."""
        while self._closed:
            self._forget(self._closed.popleft())
        self.admission.limiter.sweep()

    def _forget(self, subscription: Subscription) -> None:
        self.hangups.forget(subscription)
        with self._dispatch:
            if subscription.ticket is None:
                return
            subscription.ticket = None
            self._watchlist.end(subscription)
            group = self._sets[subscription.channels]
            group.remove(subscription)
            if not group:
                del self._sets[subscription.channels]
                for channel in subscription.channels:
                    groups = self._sets_of[channel]
                    groups.discard(group)
                    if not groups:
                        del self._sets_of[channel]
                        self._history.end(channel)
        self._engine.unsubscribe(subscription.channels)

    def __len__(self) -> int:
        """Number of streams."""
        with self._dispatch:
            return sum(map(len, self._sets.values()))

    def open_block(self, position: int | None) -> bytes:
        """Return the block that a stream begins with. `position` is its client's in the log, if it has one there."""
        return event.open_block(position, self._retry)

    def end_block(self, reason: str, position: int | None = None) -> bytes:
        """Return the block that ends a stream. `position` as in `open_block()`, of one that has none yet."""
        return event.end_block(reason, self._retry, id=position)

    # -- what the engine and the ticker call

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        """Hand a turn to every stream that listens. `position` is the log's after it."""
        with self._dispatch:
            self.position = position
            self._history.add(turn)
            now = time.monotonic()
            work = []
            for group, streams, block in blocks_of(turn, self._sets_of):
                before = group.position
                seen = block.seen_from(before.accepted)
                group.position = before.after(seen, now, shared=True)
                work.append(((block, seen, before, group.position), streams))
            for way, portion in in_portions(work):
                for slow in offer_to_all(portion, *way):
                    self._fall_behind(slow)
            for way, _ in work:
                way[0].settle()

    def _fall_behind(self, subscription: Subscription) -> None:
        """Stop buffering for a client that reads slower than events come."""
        if subscription.sent:  # not while it has no place in the log, as before the log was installed
            subscription.fall_behind()
        else:
            logger.info("A stream was ended: its client reads slower than events come.")
            subscription.end(self.end_block("behind"), drop=True)

    def gap(self, reason: str, position: int) -> None:
        """Tell every live stream that events may have been missed and cannot be had again.

        `position` is the log's, from which they go on; 0 without one. Streams that are behind find out by themselves.
        """
        block = Block(event.control_block("reset", {"reason": reason}, id=position or None), last=position)
        now = time.monotonic()
        with self._dispatch:
            self.position = position
            self._history.restart(position)
            after = Position(position, position, now, now, shared=True)
            for group in self._sets.values():
                group.position = after
            for _, streams in in_portions(self._everybody()):
                for subscription in streams:
                    if subscription.live and not subscription.reset(block, position, now, after):
                        self._fall_behind(subscription)

    def beat(self) -> None:
        """Send a sign of life on every stream that has been quiet for the heartbeat's time; end those whose time is up.

        Cut off those whose clients do not take what is sent: they would hold memory, and a place, for as long as they
        like.
        """
        self.sweep()
        now = time.monotonic()
        if now < self._look_at:
            return
        with self._dispatch:
            self._history.trim()
            self._look_at = now + min(self._heartbeat, self._send_timeout) / _LOOKS
            for _, portion in in_portions([(None, tuple(self._watchlist.take(now)))]):
                for subscription in portion:
                    self._look_after(subscription, now)
            self._look_at = min(self._look_at, self._watchlist.next_end)
            self._give_signs(now)

    def _give_signs(self, now: float) -> None:
        cursor = Block(event.control_block("cursor", {}, id=self.position), last=self.position)
        work = [(way, group.streams) for way, group in self._heartbeats.take(now, cursor)]
        self._look_at = min(self._look_at, self._heartbeats.next_at)
        for (before, sign, after), portion in in_portions(work):
            together = []
            for subscription in portion:
                if subscription.position is before:
                    together.append(subscription)
                    continue
                # Somewhat early, with the others. Of a heartbeat, what waits will do as one.
                own = subscription.position.sign_of_life(now, cursor)
                if own is HEARTBEAT and (sign is None or subscription.waiting):
                    continue
                if own is not None and not subscription.offer(own, now, after):
                    self._fall_behind(subscription)
            if sign is not None:
                offer_to_all(together, sign, sign, before, after)  # none is too slow: nothing waits for them

    def _look_after(self, subscription: Subscription, now: float) -> None:
        connection = subscription.connection
        if connection is not None and connection.stalled(now, self._send_timeout):
            logger.info("A stream was cut: its client took less than %d bytes in time.", ENOUGH_BYTES)
            subscription.end(b"", drop=True, cut_at=now)
        if subscription.due <= now:
            if not subscription.ended:
                subscription.end(self.end_block(subscription.terms.ends_because))
            elif connection is not None:
                connection.cut()
        busy = connection is not None and (connection.in_flight or connection.judged)
        self._look_at = min(self._look_at, now if busy else subscription.due)

    def pruned(self, through: int) -> None:
        """Forget what the log has lost: whether a stream may resume should not depend on the worker that it meets."""
        with self._dispatch:
            self._history.forget(min(through, self.position))

    def drain(self, reason: str) -> None:
        """End all streams, those that still wait for PostgreSQL too, and refuse new ones."""
        self.admission.close(reason)
        cut_at = time.monotonic() + FAREWELL
        with self._dispatch:
            self._look_at = min(self._look_at, cut_at)
            for _, streams in self._everybody():
                for subscription in streams:
                    subscription.end(self.end_block(reason), cut_at=cut_at)
                    if subscription.ticket is not None:
                        subscription.ticket.cancel()

    def ready(self, readiness: Readiness) -> None:
        """Take note of the engine's state, for streams that wait to begin."""
        self.admission.engine_is(readiness)

    def control(self, message: ControlMessage) -> None:
        """Obey what another process, or this one, has told all of them."""
        self.disconnect(message)

    def disconnect(self, command: Disconnect) -> None:
        """End the streams that the command is for. What waits for them is dropped: they must not have it."""
        with self._dispatch:
            now = time.monotonic()
            self.admission.revoke(command)
            self._look_at = min(self._look_at, now + FAREWELL)
            for _, streams in in_portions(self._everybody()):
                for subscription in streams:
                    if concerns(subscription, command):
                        subscription.end(self.end_block("revoked"), drop=True, cut_at=now + FAREWELL)

    def _everybody(self) -> list[tuple[None, Sequence[Subscription]]]:
        return [(None, group.streams) for group in self._sets.values()]
