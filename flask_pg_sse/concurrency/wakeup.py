"""Wake a thread or greenlet that waits for a socket."""

from __future__ import annotations

import _socket
import contextlib
import select
import time
from collections.abc import Collection, Iterable
from typing import Any, Protocol

from .forks import close_in_children
from .greenlets import end_copy, forks, hub_here, poll

# Seconds of one wait. A test that freezes the clock, as with freezegun, makes deadlines that are decades away.
LONGEST = 3600.0


class _End(_socket.socket):
    """One end of a pair of sockets: the system's, which gevent does not know, and which can be referred to weakly."""

    __slots__ = ("__weakref__",)


class Wakeup:
    """A socketpair that wakes one waiting thread. It can also watch one more descriptor.

    It is used instead of an `Event` for two reasons. `set()` takes no lock and never waits, so a signal handler may
    call it; under gevent a handler runs in the hub's greenlet. And `wait()` can wait for `set()` and for PostgreSQL's
    socket at the same time. Only one thread may wait.
    """

    def __init__(self) -> None:
        self._reader, self._writer = (_End(fileno=end.detach()) for end in _socket.socketpair())
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        close_in_children(self._reader)  # a child that read from it would take the wake-ups of its parent
        close_in_children(self._writer)
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
            self._waiting = _ThreadWaiting(descriptors) if hub_here() is None else _GreenletWaiting(descriptors)
        if self._number in self._waiting.wait(min(timeout, LONGEST)):
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
    """Waits repeatedly until one of its descriptors is readable."""

    def wait(self, timeout: float) -> Collection[int]:
        """Return the readable descriptors; none after `timeout` seconds, and possibly earlier."""

    def stop(self) -> None: ...


class _ThreadWaiting:
    def __init__(self, descriptors: Iterable[int]) -> None:
        self._poller = poll()
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
        self._greenlet, before = gevent.getcurrent(), forks()
        try:
            found: Collection[int] = self._hub.switch()
        finally:
            self._greenlet = None
        end_copy(before)
        return found

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
