"""Who may begin a stream in this process, and when: places, the end of the worker, rights that were taken away."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from .places import StreamLimiter
from .subscription import Subscription, Terms

# Seconds until a stream that waits for PostgreSQL is told to come back later.
OPEN_TIMEOUT = 10.0
# Commands to end streams that are remembered, for requests that were being decided on meanwhile.
_ORDERS = 10_000


class TryLater(Exception):
    """This client is told to come back, as at the end of a stream. `reason` is what `sse-end` says."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Admission:
    """Decides on new streams. Whoever waits for that holds a place: others would be left without an answer."""

    def __init__(self, places: StreamLimiter) -> None:
        self.places = places
        self._answered = threading.Event()  # there is nothing to wait for (any more)
        self._hears_orders = False
        self._closed: str | None = None
        self.log_missing = False  # the database has answered so, and the configuration requires a log
        self._lock = threading.Lock()
        self._orders: deque[tuple[float, str | None, str | None]] = deque(maxlen=_ORDERS)  # when, subject, channel

    @contextlib.contextmanager
    def place(self, subscription: Subscription) -> Iterator[None]:
        """Hold a place for a stream while it is decided on. Raises `TryLater`.

        Given back at the end, and taken anew when the stream begins: it may never do so.
        """
        if self._closed is not None:
            raise TryLater(self._closed)
        if not self.places.take(subscription):
            raise TryLater("capacity")
        try:
            yield
        finally:
            self.places.give_back(subscription)

    def hold_as(self, subscription: Subscription, terms: Terms) -> None:
        """Let a stream that holds a place be on these terms, and one of its client's. Raises `TryLater`."""
        if not self.places.take_as(subscription, terms):
            raise TryLater("capacity")

    def answered(self, hears_orders: bool | None) -> None:
        """Take note of the listener's state.

        True: from now on all orders are heard, or read in the log. False: there is no log, and one is required. None:
        PostgreSQL does not answer (any more).
        """
        self.log_missing = hears_orders is False
        self._hears_orders = self._hears_orders or bool(hears_orders)
        if self._hears_orders or self.log_missing:
            self._answered.set()
            return
        self._answered.clear()
        if self._closed is not None:  # meanwhile
            self._answered.set()

    @property
    def log_in_use(self) -> bool:
        """Whether a log that the configuration requires is there, as far as is known."""
        return self._hears_orders and not self.log_missing

    def wait_for_answer(self) -> None:
        """Wait until PostgreSQL has answered. Raises `TryLater`."""
        answered = self._closed is None and self._answered.wait(OPEN_TIMEOUT)
        if self._closed is not None or not answered:
            raise TryLater(self._closed or "unavailable")

    def wait_for_orders(self) -> None:
        """Wait until this process would hear that a right is taken away. Raises `TryLater`."""
        if not self._hears_orders:
            self.wait_for_answer()
        if not self._hears_orders:
            raise TryLater("unavailable")

    def close(self, reason: str) -> None:
        """Let nobody in any more, and those go that wait."""
        self._closed = reason
        self._answered.set()

    def revoke(self, subject: str | None, channel: str | None) -> None:
        """Remember an order, for those who have been asked for before it came."""
        with self._lock:
            self._orders.append((time.monotonic(), subject, channel))

    def why_not(self, subscription: Subscription) -> str | None:
        """Return why a stream may not begin; None if it may, as far as is known here."""
        if self._closed is not None:
            return self._closed
        if not self._orders:
            return None
        with self._lock:
            for at, subject, channel in reversed(self._orders):
                if at < subscription.terms.asked_at:
                    break
                if concerns(subscription, subject, channel):
                    return "revoked"
        return None


def concerns(subscription: Subscription, subject: str | None, channel: str | None) -> bool:
    """Tell whether an order to end streams is for this one. None: whatever it is."""
    return (subject is None or subject in subscription.terms.subjects) and (
        channel is None or channel in subscription.channels
    )
