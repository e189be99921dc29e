"""Wake a thread that waits in poll(), park a generator until it is woken, and let other threads or greenlets run.

Names of the standard library are looked up at each use, as in `select.poll()`, and never imported with `from`. Under
--preload gunicorn monkey-patches after the app was imported, and only a look-up at use finds gevent's versions.
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
    """A socketpair that wakes one waiting thread. It can also watch one more descriptor.

    It is used instead of an `Event` for two reasons. `set()` takes no lock and never waits, so a signal handler may
    call it; under gevent a handler runs in the hub's greenlet. And `wait()` can wait for `set()` and for PostgreSQL's
    socket at the same time. Only one thread may wait.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._number = self._reader.fileno()
        self._watched = -1
        self._waiting: _Waiting | None = None  # the descriptors stay registered from one wait to the next

    def set(self) -> None:
        # A full socket buffer wakes the thread anyway. When the socket is closed, no thread waits any more.
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while self._reader.recv(4096):
                pass

    def watch(self, descriptor: int) -> None:
        """Make `wait()` also return while `descriptor` is readable; -1 watches none.

        It replaces the descriptor watched before. Watch another one, or none, before you close the descriptor.
        """
        self._watched = descriptor
        self._stop_waiting()

    def wait(self, timeout: float) -> None:
        """Wait for `set()` or for the watched descriptor to be readable, at most `timeout` seconds, then clear.

        It may return earlier. Other threads or greenlets run at every call, even if there is nothing to wait for.
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


class BackgroundThread:
    """A thread of the package, from `start()` to `stop()`. A subclass defines what it does, in `_work()`.

    `_work()` waits in `_wakeup.wait()`, and returns once `_stopping` is set.
    """

    def __init__(self, name: str) -> None:
        self._stopping = False
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread, within `timeout` seconds."""
        self._stopping = True
        self._wakeup.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        else:  # it may never have started
            self._close()

    def _work(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """Close what the thread has used."""
        self._wakeup.close()

    def _run(self) -> None:
        try:
            self._work()
        finally:  # not in stop(), whose timeout may end before this thread does
            self._close()


class _Waiting(Protocol):
    """Waits repeatedly until one of its descriptors is readable."""

    def wait(self, timeout: float) -> Collection[int]:
        """Return the readable descriptors; none after `timeout` seconds, and possibly earlier."""

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
    """Keeps gevent's watchers from one wait to the next.

    gevent's own poll() makes new ones at every call, which costs as much as ten deliveries.
    """

    def __init__(self, descriptors: Iterable[int]) -> None:
        import gevent

        self._hub: Any = gevent.get_hub()
        self._greenlet: Any = None
        # The timer is kept too, and replaced only by an earlier one. Its time is usually far away, and nearly all waits
        # end before it.
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
        # The event loop reports a readable descriptor in every round. Without this it would spin until the next wait.
        for descriptor in readable:
            self._watchers[descriptor].stop()
            self._stopped.add(descriptor)

    def stop(self) -> None:
        self._stop_timer()
        for watcher in self._watchers.values():
            watcher.stop()
            watcher.close()


def checkpoint(pause: float = 0) -> None:
    """Let other threads or greenlets run, including those whose sockets have become ready meanwhile.

    Threads need time for that, so this one sleeps for `pause` seconds. Under gevent `pause` is not used.
    """
    if is_patched():
        import gevent

        # sleep(0) runs ready greenlets, but polls no socket until fifty have run: a request would wait for the end of a
        # large fan-out. idle() goes once around the event loop. 2 is the highest priority; with a lower one it would
        # return only when nothing else is left to do.
        gevent.idle(2)
    else:
        time.sleep(pause)


class FairLock:
    """A lock that goes next to a greenlet that already waits for it.

    gevent wakes a waiter by a callback behind all others. On a busy worker the greenlet that released the lock comes
    back from the event loop sooner, and would take the lock again and again. Between threads the operating system
    handles this.
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

            gevent.sleep(0)  # resume after the callback that wakes the first waiter


class ParkingSpot(Protocol):
    """The place where one generator waits. After a `wake()` the next `park()` returns at once."""

    def park(self, timeout: float | None = None) -> None:
        """Wait for `wake()`, at most `timeout` seconds."""

    def wake(self) -> None: ...


def new_parking_spot(*, shared: bool = False) -> ParkingSpot:
    """Return a parking spot for the calling greenlet, or for the calling thread if gevent has not patched threads.

    `shared`: other threads of the system may wake it too, also under gevent. That costs more.
    """
    if not is_patched():
        return _ThreadParkingSpot()
    return _SharedGreenletParkingSpot() if shared else _GreenletParkingSpot()


def is_patched() -> bool:
    """Tell whether gevent has patched the threads of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


class _ThreadParkingSpot:
    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token = threading.Lock()
        self._token.acquire()

    def park(self, timeout: float | None = None) -> None:
        self._token.acquire(timeout=-1 if timeout is None else timeout)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # already released: one token is enough
            self._token.release()


class _GreenletParkingSpot:
    """Resumes a greenlet by a callback of gevent's hub. That costs half as much as a gevent queue or event."""

    __slots__ = ("_greenlet", "_hub", "_owner", "_woken")

    def __init__(self) -> None:
        import gevent

        self._hub: Any = gevent.get_hub()
        self._owner: Any = gevent.getcurrent()
        self._greenlet: Any = None  # the owner, while it is parked
        self._woken = False

    def park(self, timeout: float | None = None) -> None:
        if not self._woken:
            timer = None
            self._greenlet = self._owner
            try:
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

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            if self._greenlet is not None:
                self._hub.loop.run_callback(self._resume)

    def _resume(self) -> None:
        # A kill or a timeout may have resumed the greenlet meanwhile. It must not be switched to then.
        if self._greenlet is not None:
            self._greenlet.switch()


class _SharedGreenletParkingSpot(_GreenletParkingSpot):
    __slots__ = ()

    def wake(self) -> None:
        self._woken = True
        # Also if the greenlet is not parked: in another thread it may be about to, and have seen that it is not woken.
        self._hub.loop.run_callback_threadsafe(self._resume)
