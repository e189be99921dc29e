"""Orders to end streams, as they come over PostgreSQL: which are to be obeyed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .tokens import DISCONNECT_COUNTS, Keys, read_disconnect

logger = logging.getLogger(__name__)

# Seconds by which clocks may differ.
_SKEW = 5.0


class Orders:
    """Passes authentic orders on to `disconnect(subject, channel)`, each once.

    Any role of the database can hear what goes over NOTIFY and send it again. So an order counts for a minute, and its
    number is remembered for as long; and a process obeys none that was given before it began to listen.
    """

    def __init__(self, keys: Callable[[], Keys], disconnect: Callable[[str | None, str | None], None]) -> None:
        self._keys = keys
        self._disconnect = disconnect
        self._began_at = time.time()
        self._warned_at = float("-inf")
        self._done: dict[str, float] = {}  # numbers of orders, and when they can be forgotten

    def obey(self, text: str, logged: bool) -> None:
        """Do what an order says, if it counts.

        One from the event log (`logged`) counts at any age: only the app can write there, and a worker that had lost
        its connection finds there what it did not hear.
        """
        order = read_disconnect(self._keys(), text)
        if order is None:
            self._ignored("it is not signed with this app's key")
            return
        now = time.time()
        for nonce in [nonce for nonce, until in self._done.items() if until < now]:
            del self._done[nonce]
        if order.nonce in self._done:
            return
        # Hosts' clocks differ a little, and so may the sender's from ours.
        counts = abs(now - order.given_at) <= DISCONNECT_COUNTS and order.given_at > self._began_at - _SKEW
        if not counts and not logged:
            self._ignored("it is too old, or a host's clock is wrong")
            return
        self._done[order.nonce] = max(now, order.given_at) + DISCONNECT_COUNTS
        self._disconnect(order.subject, order.channel)

    def _ignored(self, why: str) -> None:
        """Say it in the log once a minute at the most: anybody may send such things, and as many as they like."""
        if time.monotonic() - self._warned_at >= 60:
            self._warned_at = time.monotonic()
            logger.warning("Ignored an order to end streams: %s.", why)
