"""A lock and an event that work between greenlets, threads, and threads beside greenlets.

`threading.Lock` becomes gevent's when the process is patched. Then a thread of the system and a greenlet that both wait
for it may wait forever: each has an event loop of its own, and the one that releases the lock wakes only its own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from .greenlets import original
from .parking import new_parking_spot

# Seconds that a caller waits for a lock. One is held for milliseconds, also while a turn goes to ten thousand streams.
LONGEST_WAIT = 60.0


class Lock:
    """A lock that goes to the one that has waited longest.

    The holder hands it over. If it only released the lock, then on a busy worker it would come back from the event loop
    before a greenlet that was woken, and take the lock again and again.

    Entering raises TimeoutError after `LONGEST_WAIT` seconds: something then stops the holder, as code that blocks the
    event loop.
    """

    def __init__(self) -> None:
        # Taken without waiting. It stays locked while it is handed over.
        self._held: Any = original("_thread", "allocate_lock")()
        self._waiting: deque[_Waiter] = deque()  # append() and popleft() are atomic

    def __enter__(self) -> None:
        if not self._held.acquire(False):
            self._wait()

    def __exit__(self, *error: object) -> None:
        while True:
            while self._waiting:
                if self._waiting.popleft().give():
                    return
            self._held.release()
            # One may have come between the last look and the release, and have found the lock held.
            if not self._waiting or not self._held.acquire(False):
                return

    def _wait(self) -> None:
        waiter = _Waiter()
        self._waiting.append(waiter)
        if self._held.acquire(False):  # released before the holder could see this one
            waiter.leave()
            return
        try:
            given = waiter.wait(LONGEST_WAIT)
        except BaseException:  # the greenlet is killed, for example
            if not waiter.leave():
                self.__exit__()
            raise
        if not given and waiter.leave():
            raise TimeoutError(
                f"A lock of flask_pg_sse was not free for {LONGEST_WAIT:.0f} s. Its holder does not go on: look for "
                "code that blocks gevent's event loop, or a thread that was stopped."
            )


class _Waiter:
    """One that waits for a lock. Either it is given the lock, or it leaves: pop() decides, which is atomic."""

    __slots__ = ("_spot", "_undecided", "given")

    def __init__(self) -> None:
        self._spot = new_parking_spot()
        self._undecided = [None]
        self.given = False

    def wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.given and (left := deadline - time.monotonic()) > 0:
            self._spot.park(left)
        return self.given

    def give(self) -> bool:
        """Return False if it has left."""
        if not self.leave():
            return False
        self.given = True
        self._spot.wake()
        return True

    def leave(self) -> bool:
        """Return False if the lock has been given to it, or if it has left."""
        try:
            self._undecided.pop()
        except IndexError:
            return False
        return True


class Event:
    """An event that any thread or greenlet may set, and any wait for."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: set[Any] = set()  # its methods are atomic

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for spot in tuple(self._waiting):
            spot.wake()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float) -> bool:
        """Wait until the event is set, at most `timeout` seconds. Return whether it is."""
        deadline = time.monotonic() + timeout
        spot = new_parking_spot()
        self._waiting.add(spot)
        try:  # `_is_set` is read after that: `set()` does the reverse
            while not self._is_set and (left := deadline - time.monotonic()) > 0:
                spot.park(left)
        finally:
            self._waiting.discard(spot)
        return self._is_set
