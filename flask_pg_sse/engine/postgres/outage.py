"""The attempts to listen while PostgreSQL cannot be heard: how long to wait between them, and what is logged."""

from __future__ import annotations

import logging
import time

import psycopg2

from ...errors import PgSSEError
from ...repeats import Repeats, times
from ..backoff import Backoff
from .dsn import Dsn

logger = logging.getLogger(__name__)

# Seconds between two attempts.
_FIRST = 0.1
_MOST = 5.0


class Outage:
    """The failed attempts of one listener. The first is logged at once, equal ones rarely, and the end of all."""

    def __init__(self, dsn: Dsn) -> None:
        self._dsn = dsn
        self._backoff = Backoff(_FIRST, _MOST)
        self._repeats = Repeats()

    def failed(self, what: str, error: Exception) -> float:
        """Log a failed attempt, unless the same was logged lately. Return the seconds until the next attempt."""
        delay = self._backoff.next()
        foreseen = isinstance(error, PgSSEError | psycopg2.Error | OSError)
        reason = " ".join(str(error).split()).rstrip(".?") or type(error).__name__
        if number := self._repeats.count(f"{what}: {reason}", time.monotonic()):
            logger.log(
                logging.WARNING if foreseen else logging.ERROR,
                "%s: %s%s. Next attempt in %.1f s; open streams stay open.",
                what,
                reason,
                times(number),
                delay,
                exc_info=None if foreseen else error,
            )
        return delay

    def over(self) -> None:
        """Note that the listener works. Log how long it did not, if a failure was logged."""
        self._backoff.reset()
        if ended := self._repeats.over(time.monotonic()):
            logger.warning("Listening to %s works again after %s, at attempt %d.", self._dsn, ended, ended.messages)
