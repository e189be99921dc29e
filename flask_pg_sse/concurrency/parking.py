"""The place where one thread or greenlet waits until another one wakes it."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from .greenlets import call_in, end_copy, forks, hub_here, original


class ParkingSpot(Protocol):
    """The place where one generator waits. After a `wake()` the next `park()` returns at once."""

    def park(self, timeout: float | None = None) -> None:
        """Wait for `wake()`, at most `timeout` seconds. It may return earlier."""

    def wake(self) -> None:
        """End the wait. Any thread or greenlet may call it, and a garbage collection too: it takes no lock."""


def new_parking_spot() -> ParkingSpot:
    """Return a parking spot for the calling greenlet, or for the calling thread if it runs no greenlets."""
    hub = hub_here()
    return _ThreadParkingSpot() if hub is None else _GreenletParkingSpot(hub)


class _ThreadParkingSpot:
    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token: Any = original("_thread", "allocate_lock")()
        self._token.acquire()

    def park(self, timeout: float | None = None) -> None:
        self._token.acquire(timeout=-1 if timeout is None else timeout)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # already released: one token is enough
            self._token.release()


class _GreenletParkingSpot:
    """Resumes a greenlet by a callback of its hub. That costs half as much as a gevent queue or event."""

    __slots__ = ("_greenlet", "_hub", "_owner", "_woken")

    def __init__(self, hub: Any) -> None:
        import gevent

        self._hub = hub
        self._owner: Any = gevent.getcurrent()
        self._greenlet: Any = None  # the owner, while it is parked
        self._woken = False

    def park(self, timeout: float | None = None) -> None:
        timer, before = None, forks()
        self._greenlet = self._owner  # before `_woken` is read: `wake()`, perhaps in another thread, does the reverse
        try:
            if not self._woken:
                if timeout is not None:
                    timer = self._hub.loop.timer(timeout)
                    timer.start(self._resume)
                self._hub.switch()
        finally:
            self._greenlet = None
            if timer is not None:
                timer.stop()
                timer.close()
        self._woken = False
        end_copy(before)

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            if self._greenlet is not None:
                call_in(self._hub, self._resume)

    def _resume(self) -> None:
        # A kill or a timeout may have resumed the greenlet meanwhile. It must not be switched to then.
        if self._greenlet is not None:
            self._greenlet.switch()
