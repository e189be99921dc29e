"""When streams need something without an event: a heartbeat, an end, or a look at how fast their clients read.

Each is found without asking every stream: with 10,000 of them a sweep takes 2 ms, and a user may have a channel of his
own, so that there are as many sets.
"""

from __future__ import annotations

import bisect
import heapq
import math

from .block import Block, Position
from .fanout import SubscriberSet
from .subscription import Subscription


class Heartbeats:
    """When which groups are to get a sign of life, found without asking all: users have a channel each, thousands.

    A stream needs one `heartbeat` (seconds) after its last block. What comes meanwhile puts that off, so that to ask at
    the time that was foreseen is not too late. Where events that are not in the log keep a stream from being quiet, it
    is told a position that has moved on within two heartbeats.
    """

    def __init__(self, heartbeat: float) -> None:
        self._heartbeat = heartbeat
        # A heap; the number only keeps sets from being compared.
        self._foreseen: list[tuple[float, int, SubscriberSet]] = []

    def begin(self, group: SubscriberSet) -> None:
        self._foresee(group, group.position.active_at + self._heartbeat)

    @property
    def next_at(self) -> float:
        """The monotonic time at which to ask again."""
        return self._foreseen[0][0] if self._foreseen else math.inf

    def take(self, now: float, cursor: Block) -> list[tuple[tuple[Position, Block | None, Position], SubscriberSet]]:
        """Return groups with the place where most of their streams stand, the sign that is due there, and where then.

        None: nothing is due there, but some who stand elsewhere have not been told what those know. `cursor` tells the
        log's position.
        """
        asked = []
        while self.next_at <= now:
            asked.append(heapq.heappop(self._foreseen)[2])
        found = []
        for group in asked:
            if not group:  # the last of its streams has gone
                continue
            before = group.position
            sign = before.sign_of_life(now - self._heartbeat, cursor)
            if sign is not None:
                group.position = before.after(sign, now, shared=True)
            if sign is not None or group.scattered:
                group.scattered = False
                found.append(((before, sign, group.position), group))
            self._foresee(group, group.position.sign_due_at(self._heartbeat, cursor))
        return found

    def _foresee(self, group: SubscriberSet, at: float) -> None:
        heapq.heappush(self._foreseen, (at, id(group), group))


class Watchlist:
    """The streams between `begin()` and `end()` that need a look: those that send, and those whose time is up.

    A stream whose generator is parked sends nothing, so that nothing of it can be stuck. Calls come one at a time,
    except that each stream's own thread changes `awake`, the streams that are not parked: a set's operations are
    atomic.
    """

    def __init__(self) -> None:
        self._awake: set[Subscription] = set()
        self._taken: set[Subscription] = set()  # last time
        self._ends: list[tuple[float, int, Subscription]] = []  # of streams with an end of their own, sorted by when

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
        """The monotonic time at which the next stream has to end."""
        return self._ends[0][0] if self._ends else math.inf

    def take(self, now: float) -> set[Subscription]:
        """Return the streams that need a look: those that are not parked, and those that have to end by `now`.

        Those that were judged while they sent are returned one time more, to forget it: they may be parked by now.
        """
        found = self._awake | {one for one in self._taken if one.connection is not None and one.connection.judged}
        while self.next_end <= now:
            found.add(self._ends.pop(0)[2])
        self._taken = found
        return found
