"""The streams of this process, by channel, and the delivery of every turn to them.

A turn is everything that one read of the bus returned, in its order. An engine hands it over with `deliver()`, and
every stream is offered the events of its channels (`fanout.py`).

With the event log, `position` is the id up to which everything has been handed over. A stream that has missed events
goes live at the moment when the hub's memory continues exactly where the stream's events end. Nothing is lost or
repeated there, because no turn can be delivered at that moment.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from .. import event, stats
from ..concurrency.locks import Lock
from ..engine.base import Bus, ControlMessage, Disconnect, Earlier, Item, Readiness, Tail, TooManyChannels
from ..repeats import Repeats
from ..server.hangups import Hangups
from ..server.stall import ENOUGH_BYTES
from ..stats import Stats
from .admission import OPEN_TIMEOUT, Admission, StreamLimiter, TryLater, concerns
from .block import Block, Position
from .fanout import SubscriberSets, blocks_of, in_portions
from .history import History
from .liveness import Liveness
from .subscription import Subscription, offer_to_all
from .timers import Heartbeats, Watchlist

logger = logging.getLogger(__name__)

# Seconds that a client gets to read the last block of its stream. Then its connection is cut: gunicorn would wait 30 s
# for it when the worker ends, and a client that has lost the right to listen must hear no more.
END_TIMEOUT = 1.0
# How often streams are checked within the shorter of heartbeat and send timeout. That is often enough to see that a
# client takes nothing.
_CHECKS = 4
_TOO_MANY_CHANNELS = "this worker listens to as many channels as it can. Start more workers"


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
        stats: Stats | None = None,
    ) -> None:
        self._engine = engine
        self.stats = stats or Stats()
        self.admission = admission or Admission(StreamLimiter(sys.maxsize, None))
        self._send_timeout = send_timeout
        self.retry = retry
        # Serialises offers, which come from the engine's turns and from the ticker, and changes to the tables and the
        # state below. It is acquired once for a turn, not once for a client.
        self._dispatch = Lock()
        self._sets = SubscriberSets()
        self.position = 0  # in the log; 0 without one
        # Counts how often the log may have lost what it had. What it said before does not hold after that.
        self.lineage = 1
        self._history = History()
        self._closed: deque[Subscription] = deque()  # closed streams that are still in the tables
        self.hangups = Hangups[Subscription]()
        self._heartbeat = heartbeat
        self._heartbeats = Heartbeats(heartbeat)
        self._watchlist = Watchlist()
        self._look_at = 0.0  # monotonic time until which no stream needs a check
        self.liveness = Liveness()
        self._slow = Repeats(60.0, 60.0)

    # -- streams begin and end

    def open(self, subscription: Subscription) -> None:
        """Add a stream, and ask for LISTEN. Raises `TryLater` if it is known already that it cannot begin.

        The stream is in the tables before LISTEN is sent, so no event can fall between the two.
        """
        admission = self.admission
        if not admission.limiter.acquire(subscription):
            raise TryLater("capacity", admission.limiter.why_full())
        if subscription.connection is not None and subscription.connection.gone():  # while its request was waiting
            raise TryLater("unavailable")
        self.hangups.watch(subscription)
        with self._dispatch:  # before subscribe(): an interruption while waiting for the lock then leaves no LISTEN
            try:
                ticket = self._engine.subscribe(subscription.channels, subscription.terms.clients)
            except TooManyChannels:
                raise TryLater("capacity", _TOO_MANY_CHANNELS, kind="channels") from None
            subscription.ticket = ticket
            self._look_at = min(self._look_at, subscription.due)
            new = self._sets.add(subscription)
            if new is not None:
                self._heartbeats.begin(new)
            self._watchlist.begin(subscription)
        # Checked once the stream is in the tables. drain() and disconnect() do the reverse: they tell the admission
        # first, and read the tables then. So one of the two sides always sees the other.
        if (later := admission.why_not(subscription)) is not None and not later.soon:
            ticket.cancel()
            raise later

    def wait_until_heard(self, subscription: Subscription) -> None:
        """Wait until PostgreSQL has confirmed LISTEN for an open stream. Raises `TryLater`."""
        ticket = subscription.ticket
        assert ticket is not None, "open() comes first, and only close() has the stream forgotten"
        heard = False
        try:
            heard = subscription.wait_for(ticket, OPEN_TIMEOUT)
        finally:
            if not heard:
                ticket.cancel()
        if (later := self.admission.why_not(subscription, heard=heard)) is not None:
            raise later

    def go_live(self, subscription: Subscription) -> int:
        """Let an open stream accept events from now on. Returns the log's position, for its client."""
        with self._dispatch:
            position = self.position
            if position:
                self._history.begin(subscription.channels, position)
            now = time.monotonic()
            subscribers = self._sets.goes_live(subscription)
            before = subscribers.position
            if before.accepted != position:  # a common position for new streams, even if no event has an id
                # Keep the old times: they say when the set's earlier streams are due for a heartbeat.
                subscribers.position = Position(position, position, before.told_at, before.active_at, shared=True)
                subscribers.scattered = True
            subscription.go_live(position, Block(b""), now, like=subscribers.position)
            return position

    def join(self, subscription: Subscription, *, ahead: bool) -> bool:
        """Let a stream that has everything up to `sent` go live without a gap. Returns whether it could.

        It cannot if it lacks more than the hub remembers, or more than its buffer takes. Then it must read the log.
        Nor can it if its position is not known to be in the log. If another worker was faster, a position may be beyond
        the hub's; with `ahead` it may stay so, until what comes next is delivered.
        """
        with self._dispatch:
            if subscription.lineage != self.lineage or (subscription.sent > self.position and not ahead):
                return False
            items = self._history.missed(subscription.channels, subscription.sent)
            if items is None:
                return False
            missed = Block.of(items)
            if len(missed.data) > subscription.limit:
                return False
            missed.settle()
            self.stats.delivered(0, len(items), len(missed.data))
            self._sets.goes_live(subscription).scattered = True
            now = time.monotonic()
            subscription.go_live(subscription.sent, missed, now)
            if not self.liveness.tell(subscription, now):
                self._fall_behind(subscription)
            return True

    @property
    def memory(self) -> int:
        """The most bytes of events that are remembered of one channel."""
        return self._history.limit

    def follow(self, channels: Iterable[str]) -> None:
        """Remember, from now on, the events on the channels of an open stream.

        Not for a stream that still waits for its LISTEN: it is in the tables too, but the events of its channels may
        not be heard yet.
        """
        with self._dispatch:
            self._history.begin([channel for channel in channels if channel in self._sets.of_channel], self.position)

    def unremembered(self, channels: Iterable[str]) -> dict[str, int]:
        """Return the channels whose last events must be read from the log, each with the id to read up to."""
        with self._dispatch:
            return self._history.gaps(channels)

    def remember(self, tail: Tail, upto: int) -> None:
        """Remember the last events of a channel in the log, up to the id `upto`."""
        with self._dispatch:
            self._history.fill(tail, upto)

    def close(self, subscription: Subscription) -> None:
        """End a stream; the ticker forgets it later. Harmless if it was never opened, or is forgotten already.

        Takes no lock: the garbage collector may close a stream that nothing else has closed, in any thread and at any
        moment, even while that thread holds one of the hub's locks.
        """
        subscription.end(b"")
        self.admission.limiter.release(subscription)
        self._closed.append(subscription)

    def end_departed(self) -> None:
        """End the streams whose clients have closed their connections. They get no last block."""
        for subscription in self.hangups.take():
            subscription.end(b"", drop=True)

    def sweep(self) -> None:
        """Forget the streams that have been closed."""
        while self._closed:
            self._forget(self._closed.popleft())

    def _forget(self, subscription: Subscription) -> None:
        self.hangups.forget(subscription)
        with self._dispatch:
            if subscription.ticket is None:
                return
            subscription.ticket = None
            self._watchlist.end(subscription)
            set_ended, quiet = self._sets.remove(subscription)
            if set_ended:
                self._heartbeats.end()
            for channel in quiet:
                self._history.end(channel)
        self._engine.unsubscribe(subscription.channels)
        if subscription.opened:
            self.stats.count(stats.ENDED, of=subscription.reason)

    def __len__(self) -> int:
        """Number of streams."""
        with self._dispatch:
            return sum(map(len, self._sets))

    def streams(self, channels: Collection[str] | None = None) -> list[Subscription]:
        """Return the streams that have begun and not ended; with `channels`, those that listen to one of them."""
        with self._dispatch:
            return self._sets.begun(channels)

    def end_block(self, reason: str) -> bytes:
        """Return the last block of a stream that has begun."""
        return event.end_block(reason, self.retry)

    # -- called by the engine and the ticker

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        """Offer a turn to every stream that listens to its channels. `position` is the log's position after it."""
        with self._dispatch:
            self.position = position
            self._history.add(turn)
            now = time.monotonic()
            work = []
            events = size = 0
            for subscribers, streams, block in blocks_of(turn, self._sets.of_channel):
                events += subscribers.live * block.events
                size += subscribers.live * len(block.data)
                before = subscribers.position
                seen = block.seen_from(before.accepted)
                subscribers.position = before.after(seen, now, shared=True)
                work.append(((block, seen, before, subscribers.position), streams))
            for way, portion in in_portions(work):
                for slow in offer_to_all(portion, *way):
                    self._fall_behind(slow)
            for way, _ in work:
                way[0].settle()
            self.stats.delivered(len(turn), events, size)

    def _fall_behind(self, subscription: Subscription) -> None:
        """Stop buffering for a client that reads slower than events come."""
        if subscription.sent:  # 0 while the stream has no position in the log, as before the log is installed
            subscription.lineage = self.lineage
            self._sets.of(subscription).live -= subscription.live
            subscription.fall_behind()
            self.stats.count(stats.FELL_BEHIND)
        else:
            self._slow.log(logger.info, "behind", time.monotonic(), "A stream was ended: its client reads too slowly.")
            subscription.end(self.end_block("behind"), reason="behind", drop=True)

    def gap(self, reason: str, position: int) -> None:
        """Tell every live stream that events may have been missed and cannot be replayed.

        Streams continue from the log's `position`; 0 without a log. Streams that are behind ask the log again. A
        command to end streams may have been missed too. So a stream whose right can be taken away ends, and what waits
        for it is dropped: its client comes back, and the right is checked again.
        """
        block = Block(event.control_block("reset", {"reason": reason}, id=position or None), last=position)
        now = time.monotonic()
        cut_at = now + END_TIMEOUT
        with self._dispatch:
            self.admission.missed_commands()
            self._look_at = min(self._look_at, cut_at)
            self.position = position
            self._history.restart(position)
            after = Position(position, position, now, now, shared=True)
            for subscribers in self._sets:
                subscribers.position = after
            for _, streams in self._sets.portions_of_streams():
                for subscription in streams:
                    if subscription.terms.revocable:
                        end = (block.data if subscription.live else b"") + self.end_block("unavailable")
                        subscription.end(end, reason="unavailable", drop=True, cut_at=cut_at)
                    elif subscription.live and not subscription.reset(block, position, now, after):
                        self._fall_behind(subscription)
            self.stats.count(stats.RESETS, self._sets.live, of=reason)
            self.lineage += 1  # last: a stream that falls behind here has not been told, and must ask the log

    def beat(self) -> None:
        """Send a heartbeat on every stream that has been quiet for too long, and end the streams that must end now.

        Also cut the connection of a client that does not take what is sent. Otherwise it could hold memory and a place
        for as long as it likes.
        """
        self.sweep()
        self.admission.limiter.sweep()
        now = time.monotonic()
        if self.liveness.must_tell(now):
            self._tell_status(away=True)
        if now < self._look_at:
            return
        with self._dispatch:
            self._history.trim()
            self._look_at = now + min(self._heartbeat, self._send_timeout) / _CHECKS
            for _, portion in in_portions([(None, tuple(self._watchlist.take(now)))]):
                for subscription in portion:
                    self._check(subscription, now)
            self._look_at = min(self._look_at, self._watchlist.next_end)
            for slow in self._heartbeats.send(now, self.position):
                self._fall_behind(slow)
            self._look_at = min(self._look_at, self._heartbeats.next_at)

    def _check(self, subscription: Subscription, now: float) -> None:
        connection = subscription.connection
        if connection is not None and connection.stalled(now, self._send_timeout):
            self._slow.log(logger.info, "cut", now, "A stream was cut: its client took under %d bytes.", ENOUGH_BYTES)
            subscription.end(b"", reason="stalled", drop=True, cut_at=now)
        if subscription.due <= now:
            if not subscription.ended:
                reason = subscription.terms.ends_because
                subscription.end(self.end_block(reason), reason=reason)
            elif connection is not None:
                connection.cut()
        busy = connection is not None and (connection.in_flight or connection.judged)
        self._look_at = min(self._look_at, now if busy else subscription.due)

    def pruned(self, through: int) -> None:
        """Forget the events up to `through`, which the log has lost.

        Otherwise it would depend on the worker whether a stream can resume.
        """
        with self._dispatch:
            self._history.forget(min(through, self.position))

    def drain(self, reason: str) -> None:
        """End all streams, including those that still wait for PostgreSQL, and refuse new ones."""
        self.admission.close(reason)
        cut_at = time.monotonic() + END_TIMEOUT
        with self._dispatch:
            self._look_at = min(self._look_at, cut_at)
            for subscribers in self._sets:
                for subscription in subscribers.streams:
                    subscription.end(self.end_block(reason), reason=reason, cut_at=cut_at)

    def ready(self, readiness: Readiness, *, why: str = "", silent_for: float = 0.0, earlier: Earlier = None) -> None:
        """Record the engine's state, for streams that wait to begin."""
        self.liveness.engine_is(readiness, time.monotonic() - silent_for)
        if self.admission.engine_is(readiness, why, earlier):
            self.stats.count(stats.RECONNECTED)

    def caught_up(self) -> None:
        """Tell the streams that they are live again, if they have been told that they are not."""
        if self.liveness.caught_up():
            self._tell_status(away=False)

    def _tell_status(self, *, away: bool) -> None:
        with self._dispatch:
            for slow in self.liveness.tell_all(away, self._sets, time.monotonic()):
                self._fall_behind(slow)

    def control(self, message: ControlMessage) -> None:
        """Obey a message that another process, or this one, has sent to all."""
        if isinstance(message, Disconnect):
            self.disconnect(message)
            return
        with self._dispatch:
            # All that is remembered goes: a ring may be filled later with what was read of the log before.
            self._history.forget(max(message.through, self.position + 1))
            for _, streams in self._sets.portions_of_streams():
                for subscription in streams:
                    if subscription.live and subscription.holds(message):
                        self._fall_behind(subscription)  # and read the log, without what was erased

    def disconnect(self, command: Disconnect) -> None:
        """End the streams that the command applies to, and drop what waits for them: their clients must not get it."""
        with self._dispatch:
            now = time.monotonic()
            self.admission.revoke(command)
            self._look_at = min(self._look_at, now + END_TIMEOUT)
            for _, streams in self._sets.portions_of_streams():
                for subscription in streams:
                    if concerns(subscription, command):
                        end, cut_at = self.end_block("revoked"), now + END_TIMEOUT
                        subscription.end(end, reason="revoked", drop=True, cut_at=cut_at)
