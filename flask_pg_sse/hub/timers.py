"""Which streams need to be looked at, found without looking at the thousands that need nothing.

A stream whose generator is parked sends nothing, so that nothing of it can be stuck; all it needs is to be ended once
its time is up.
"""

from __future__ import annotations

import bisect
import math

from .subscription import Subscription


class Attention:
    """The streams between `begin()` and `end()`. Calls come one at a time.

    But for `awake`, in which each stream's own thread notes whether it is parked: a set's operations are atomic.
    """

    def __init__(self) -> None:
        self._awake: set[Subscription] = set()
        self._taken: set[Subscription] = set()  # last time
        self._ends: list[tuple[float, int, Subscription]] = []  # of streams that are to end, sorted by when

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
        """The monotonic time at which a stream is to end next."""
        return self._ends[0][0] if self._ends else math.inf

    def take(self, now: float) -> set[Subscription]:
        """Return the streams that are to be looked at: those that are not parked, and those that are to end by `now`.

        And once more those that were judged while they sent, which forgets it: they may be parked by now.
        """
        found = self._awake | {one for one in self._taken if one.connection is not None and one.connection.judged}
        while self.next_end <= now:
            found.add(self._ends.pop(0)[2])
        self._taken = found
        return found
