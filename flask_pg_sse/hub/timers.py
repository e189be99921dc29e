"""Find the streams that need something without an event: a heartbeat, an end, or a check of how fast they are read.

Nothing here looks at every stream, because a sweep over 10,000 streams takes 2 ms. Nor at every subscriber set: if each
user has a private channel, there are as many sets as streams.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator

from .. import event
from .block import HEARTBEAT, Block, Position
from .fanout import SubscriberSet, in_portions
from .subscription import Subscription, offer_to_all


class Heartbeats:
    """Finds the subscriber sets that need a heartbeat, without looking at all sets: there may be thousands.

    A stream needs a heartbeat `heartbeat` seconds after its last block. A block in the meantime only postpones that, so
    a check at the time first foreseen is never too late. Events that are not in the log may keep a stream from being
    quiet. Its client is then still told a log position that has moved on, within two heartbeats.
    """

    def __init__(self, heartbeat: float) -> None:
        self._heartbeat = heartbeat
        # A heap. The number in the middle only keeps sets from being compared.
        self._foreseen: list[tuple[float, int, SubscriberSet]] = []
        self._gone = 0  # how many sets in it have ended

    def begin(self, subscribers: SubscriberSet) -> None:
        self._foresee(subscribers, subscribers.position.active_at + self._heartbeat)

    def end(self) -> None:
        """Note that the last stream of a set has ended. Once half of the sets have, they are forgotten together."""
        self._gone += 1
        if self._gone > len(self._foreseen) // 2:
            self._gone = 0
            self._foreseen = [one for one in self._foreseen if one[2]]
            heapq.heapify(self._foreseen)

    @property
    def next_at(self) -> float:
        """The monotonic time of the next check."""
        return self._foreseen[0][0] if self._foreseen else math.inf

    def send(self, now: float, position: int) -> Iterator[Subscription]:
        """Send what is due by `now`. Yield the streams that are too slow for it. `position` is the log's."""
        cursor = Block(event.control_block("cursor", {}, id=position), last=position)
        work = [(way, subscribers.streams) for way, subscribers in self.take(now, cursor)]
        for (before, block, after), portion in in_portions(work):
            together = []
            for subscription in portion:
                if subscription.position is before:
                    together.append(subscription)
                    continue
                # Slightly early, together with the others. No heartbeat is needed where something waits to be sent.
                own = subscription.position.heartbeat_block(now, cursor)
                if own is HEARTBEAT and (block is None or subscription.waiting):
                    continue
                if own is not None and not subscription.offer(own, now, after):
                    yield subscription
            if block is not None:
                offer_to_all(together, block, block, before, after)  # none is too slow: nothing waits for them

    def take(self, now: float, cursor: Block) -> list[tuple[tuple[Position, Block | None, Position], SubscriberSet]]:
        """Return each set that needs something, after its common position, the block due there, and the position then.

        The block is None if none is due at the common position, but streams at other positions have clients that may
        know an older log id. `cursor` is the block that tells a client the log's position.
        """
        due = []
        while self.next_at <= now:
            due.append(heapq.heappop(self._foreseen)[2])
        found = []
        for subscribers in due:
            if not subscribers:  # its last stream has ended
                self._gone -= 1
                continue
            before = subscribers.position
            block = before.heartbeat_block(now - self._heartbeat, cursor)
            if block is not None:
                subscribers.position = before.after(block, now, shared=True)
            if block is not None or subscribers.scattered:
                subscribers.scattered = False
                found.append(((before, block, subscribers.position), subscribers))
            self._foresee(subscribers, subscribers.position.heartbeat_due_at(self._heartbeat, cursor))
        return found

    def _foresee(self, subscribers: SubscriberSet, at: float) -> None:
        heapq.heappush(self._foreseen, (at, id(subscribers), subscribers))


class Watchlist:
    """Finds the streams that need a check, between `begin()` and `end()`: they are sending, or must end.

    A stream whose generator is parked sends nothing, so nothing of it can be stuck. The caller serialises all calls.
    Only `awake`, the set of streams that are not parked, is changed by each stream's own thread: set operations are
    atomic.
    """

    def __init__(self) -> None:
        self._awake: set[Subscription] = set()
        self._taken: set[Subscription] = set()  # what the last take() returned
        self._ends: list[tuple[float, int, Subscription]] = []  # the streams with a fixed end, sorted by its time

    def begin(self, subscription: Subscription) -> None:
        subscription.awake = self._awake
        self._awake.add(subscription)
        if subscription.terms.ends_at < math.inf:
            bisect.insort(self._ends, (subscription.terms.ends_at, id(subscription), subscription))

    def end(self, subscription: Subscription) -> None:
        self._awake.discard(subscription)
        self._taken.discard(subscription)
        at = bisect.bisect_left(self._ends, (subscription.terms.ends_at, id(subscription)))
        if at < len(self._ends) and self._ends[at][2] is subscription:
            del self._ends[at]

    @property
    def next_end(self) -> float:
        """The monotonic time at which the next stream must end."""
        return self._ends[0][0] if self._ends else math.inf

    def take(self, now: float) -> set[Subscription]:
        """Return the streams that need a check: those that are not parked, and those that must end by `now`.

        A stream whose speed was being judged is returned again, even if it is parked by now: the check then ends the
        judgement.
        """
        found = self._awake | {one for one in self._taken if one.connection is not None and one.connection.judged}
        while self.next_end <= now:
            found.add(self._ends.pop(0)[2])
        self._taken = found
        return found
