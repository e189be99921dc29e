"""Waking a thread that waits in poll(), parking one that waits for nothing but us, and taking turns.

All names of the standard library are looked up when they are used, never imported from their module: gunicorn
monkey-patches after an app was imported under --preload, and only the look-up at use finds gevent's versions.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any, Protocol


class Wakeup:
    """A socketpair whose one end becomes readable when the other is told `set()`, and one descriptor beside it.

    Not an `Event`: `set()` takes no lock and never waits, so it may be called from a signal handler, which under gevent
    runs in the hub's own greenlet; and `wait()` can wait for it and for PostgreSQL's socket at once. One thread waits.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._number = self._reader.fileno()
        self._watched = -1
        self._waiting: _Waiting | None = None  # the descriptors stay registered from one wait to the next

    def set(self) -> None:
        # A full pipe wakes as well as one more byte would; a closed one has nobody left to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while self._reader.recv(4096):
                pass

    def watch(self, descriptor: int) -> None:
        """Have `wait()` return also while a descriptor is readable, in place of the one before; -1: none.

        Before it is closed, have another watched, or none.
        """
        self._watched = descriptor
        self._stop_waiting()

    def wait(self, timeout: float) -> None:
        """Return when set, when what is watched is readable, or after `timeout` seconds, if not before; and clear.

        Others have their turn in any case.
        """
        if self._waiting is None:
            descriptors = [self._number, self._watched] if self._watched >= 0 else [self._number]
            self._waiting = _GreenletWaiting(descriptors) if is_patched() else _ThreadWaiting(descriptors)
        if self._number in self._waiting.wait(timeout):
            self.clear()

    def close(self) -> None:
        self._stop_waiting()
        self._reader.close()
        self._writer.close()

    def _stop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.stop()


class _Waiting(Protocol):
    """Waits until one of some descriptors is readable, again and again."""

    def wait(self, timeout: float) -> Collection[int]:
        """Return descriptors that are readable; none after `timeout` seconds, or earlier."""

    def stop(self) -> None: ...


class _ThreadWaiting:
    def __init__(self, descriptors: Iterable[int]) -> None:
        self._poller = select.poll()
        for descriptor in descriptors:
            self._poller.register(descriptor, select.POLLIN)

    def wait(self, timeout: float) -> Collection[int]:
        return [descriptor for descriptor, _ in self._poller.poll(timeout * 1000)]

    def stop(self) -> None:
        pass


class _GreenletWaiting:
    """gevent's watchers, kept: its own poll() makes new ones at every call, for the price of ten deliveries."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        import gevent

        self._hub: Any = gevent.get_hub()
        self._greenlet: Any = None
        # Kept too, and set anew only for an earlier time: nearly all waits end before their own, which lies far away.
        self._timer: Any = None
        self._rings_at = float("inf")
        self._watchers = {descriptor: self._hub.loop.io(descriptor, 1) for descriptor in descriptors}  # 1: readable
        self._stopped = set(self._watchers)

    def wait(self, timeout: float) -> Collection[int]:
        import gevent

        while self._stopped:
            descriptor = self._stopped.pop()
            self._watchers[descriptor].start(self._resume, (descriptor,))
        ring_at = time.monotonic() + timeout
        if ring_at < self._rings_at:
            self._stop_timer()
            self._timer, self._rings_at = self._hub.loop.timer(timeout), ring_at
            self._timer.start(self._ring)
        self._greenlet = gevent.getcurrent()
        try:
            found: Collection[int] = self._hub.switch()
            return found
        finally:
            self._greenlet = None

    def _ring(self) -> None:
        self._stop_timer()
        self._resume(())

    def _stop_timer(self) -> None:
        timer, self._timer, self._rings_at = self._timer, None, float("inf")
        if timer is not None:
            timer.stop()
            timer.close()

    def _resume(self, readable: Collection[int]) -> None:
        if self._greenlet is not None:
            self._greenlet.switch(readable)
            return
        # What stays readable is said in every round of the event loop, which would not rest until somebody waits here.
        for descriptor in readable:
            self._watchers[descriptor].stop()
            self._stopped.add(descriptor)

    def stop(self) -> None:
        self._stop_timer()
        for watcher in self._watchers.values():
            watcher.stop()
            watcher.close()


def checkpoint(pause: float = 0) -> None:
    """Let others run that are ready, and those for whom something has come meanwhile.

    Threads need more than a chance for that: they get `pause` seconds.
    """
    if is_patched():
        import gevent

        # sleep(0) would let greenlets run that are ready, and look at no socket before fifty have: a request would wait
        # for the end of a large fan-out. This goes once around the event loop; the priority is the highest, or it would
        # wait until nothing else is to be done.
        gevent.idle(2)
    else:
        time.sleep(pause)


class FairLock:
    """A lock that goes next to those who wait for it already.

    gevent wakes them by a callback behind all others. On a busy worker whoever has released the lock comes back from
    the event loop sooner, and would take it again and again. Between threads the system sees to it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0  # exact between greenlets

    def __enter__(self) -> None:
        self._waiting += 1
        try:
            self._lock.acquire()
        finally:
            self._waiting -= 1

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        if self._waiting and is_patched():
            import gevent

            gevent.sleep(0)  # behind the callback that wakes the first of them


class ParkingSpot(Protocol):
    """Where one generator waits. A `wake()` before the `park()` counts: that park returns at once."""

    def park(self) -> None: ...

    def wake(self) -> None: ...


def new_parking_spot() -> ParkingSpot:
    """Return a parking spot for the calling greenlet, or for the calling thread where nothing is patched."""
    return _GreenletParkingSpot() if is_patched() else _ThreadParkingSpot()


def is_patched() -> bool:
    """Tell whether gevent has patched the threads of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


class _ThreadParkingSpot:
    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token = threading.Lock()
        self._token.acquire()

    def park(self) -> None:
        self._token.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # released already: one token is enough
            self._token.release()


class _GreenletParkingSpot:
    """A greenlet switched to by a callback of the hub: half the price of any gevent queue or event."""

    __slots__ = ("_greenlet", "_hub", "_owner", "_woken")

    def __init__(self) -> None:
        import gevent

        self._hub: Any = gevent.get_hub()
        self._owner: Any = gevent.getcurrent()
        self._greenlet: Any = None  # the owner, while it is parked
        self._woken = False

    def park(self) -> None:
        if not self._woken:
            self._greenlet = self._owner
            try:
                self._hub.switch()
            finally:
                self._greenlet = None
        self._woken = False

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            if self._greenlet is not None:
                self._hub.loop.run_callback(self._resume)

    def _resume(self) -> None:
        # By now a kill or a timeout may have taken the greenlet out of its spot: switching to it would be wrong.
        if self._greenlet is not None:
            self._greenlet.switch()
