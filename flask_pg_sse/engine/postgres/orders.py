"""Commands to end streams, as they come over PostgreSQL: which are to be obeyed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from ...tokens import Keys, read_disconnect

logger = logging.getLogger(__name__)

# Seconds for which an order counts.
_COUNTS = 60.0


class DisconnectCommands:
    """Passes authentic orders on to `disconnect(subject, channel)`, each once.

    Any role of the database can hear what goes over NOTIFY and send it again. So an order counts for a minute, and its
    number is remembered for as long; and a process obeys none that was given before it began to listen. The times are
    PostgreSQL's: hosts' clocks may differ.
    """

    def __init__(self, keys: Callable[[], Keys], disconnect: Callable[[str | None, str | None], None]) -> None:
        self._keys = keys
        self._disconnect = disconnect
        self._began_at = math.inf  # no order counts before PostgreSQL has told the time
        self._ahead = 0.0  # PostgreSQL's clock of our monotonic one
        self._warned_at = -math.inf
        self._done: dict[str, float] = {}  # numbers of orders, and when they can be forgotten

    def set_clock(self, now: float) -> None:
        """Take PostgreSQL's time, in seconds since the epoch, on a connection that listens."""
        self._ahead = now - time.monotonic()
        self._began_at = min(self._began_at, now)

    def obey(self, text: str, logged: bool) -> None:
        """Do what an order says, if it counts.

        One from the event log (`logged`) counts at any age: only the app can write there, and a worker that had lost
        its connection finds there what it did not hear.
        """
        order = read_disconnect(self._keys(), text)
        if order is None:
            self._ignored("it is not signed with this app's key")
            return
        now = time.monotonic() + self._ahead
        for nonce in [nonce for nonce, until in self._done.items() if until < now]:
            del self._done[nonce]
        if order.nonce in self._done:
            return
        counts = order.given_at >= self._began_at and abs(now - order.given_at) <= _COUNTS
        if not counts and not logged:
            self._ignored("it was not given within the last minute, or before this process listened")
            return
        self._done[order.nonce] = max(now, order.given_at) + _COUNTS
        self._disconnect(order.subject, order.channel)

    def _ignored(self, why: str) -> None:
        """Say it in the log once a minute at the most: anybody may send such things, and as many as they like."""
        if time.monotonic() - self._warned_at >= 60:
            self._warned_at = time.monotonic()
            logger.warning("Ignored an order to end streams: %s.", why)
