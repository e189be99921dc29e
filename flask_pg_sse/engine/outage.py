"""The attempts to listen while the bus cannot be heard: how long to wait between them, and what is logged."""

from __future__ import annotations

import logging
import time

from ..errors import PgSSEError
from ..repeats import Repeats, one_line, sentence, times
from .backoff import Backoff

logger = logging.getLogger(__name__)

# Seconds between two attempts.
_FIRST = 0.1
_MOST = 5.0


class Outage:
    """The failed attempts of one listener. The first is logged at once, equal ones rarely, and the end of all.

    `server` is named in the log, without its password. `expected` are the errors of the server's client library.
    """

    def __init__(self, server: object, expected: type[Exception]) -> None:
        self._server = server
        self._expected = (PgSSEError, OSError, expected)
        self._backoff = Backoff(_FIRST, _MOST)
        self._repeats = Repeats()

    def expects(self, error: Exception) -> bool:
        """Tell whether this error says something about the server, and not that the package has a bug."""
        return isinstance(error, self._expected)

    def failed(self, what: str, error: Exception) -> float:
        """Log a failed attempt, unless the same was logged lately. Return the seconds until the next attempt."""
        delay = self._backoff.next()
        foreseen = self.expects(error)
        reason = one_line(error)
        if number := self._repeats.count(f"{what}: {reason}", time.monotonic()):
            logger.log(
                logging.WARNING if foreseen else logging.ERROR,
                "%s: %s Next attempt in %.1f s; open streams stay open.",
                what,
                sentence(reason + times(number)),
                delay,
                exc_info=None if foreseen else error,
            )
        return delay

    def over(self, *, brought: bool = False) -> None:
        """Note that the listener works. Log how long it did not, if a failure was logged.

        `brought` tells whether the events of the time between have been read.
        """
        self._backoff.reset()
        if ended := self._repeats.over(time.monotonic()):
            logger.warning(
                "Listening to %s works again after %s, at attempt %d%s.",
                self._server,
                ended,
                ended.messages,
                "; the missed events have been read from the event log" if brought else "",
            )
