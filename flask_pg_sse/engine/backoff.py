"""Compute how long to wait before the next attempt: pure state, no clock."""

from __future__ import annotations

import random


class Backoff:
    """Delays that double from `first` to `most` seconds. Each is shortened at random, by up to half.

    Without that every worker of every host would reconnect at the same moment after a restart of PostgreSQL.
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
        """Start again at the first delay, after a successful attempt."""
        self._attempts = 0
