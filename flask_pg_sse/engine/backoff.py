"""How long to wait before the next attempt: pure state, no clock."""

from __future__ import annotations

import random


class Backoff:
    """Delays that double from `first` to `most` seconds, each spread between its half and its whole.

    Spread, because after a restart of PostgreSQL every worker of every host would otherwise knock at the same moment.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._attempts = 0

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        delay = min(self._most, self._first * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin anew, after an attempt that succeeded."""
        self._attempts = 0
