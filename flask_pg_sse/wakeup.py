"""Waking a thread that waits in poll(), and parking one that waits for nothing but us.

All names of the standard library are looked up when they are used, never imported from their module: gunicorn
monkey-patches after an app was imported under --preload, and only the look-up at use finds gevent's versions.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
from typing import Any, Protocol


class Wakeup:
    """A socketpair whose one end becomes readable when the other is told `set()`.

    Not an `Event`: `set()` takes no lock and never waits, so it may be called from a signal handler, which under gevent
    runs in the hub's own greenlet; and poll() can wait for it and for PostgreSQL's socket at once.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._watched: Any = None

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        # A full pipe wakes as well as one more byte would; a closed one has nobody left to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while self._reader.recv(4096):
                pass

    def watch(self, descriptor: int) -> None:
        """Have a descriptor, if it is one, set this whenever it is readable. Called by the thread that waits.

        For one that is itself an epoll with thousands of sockets: gevent would have the kernel walk through all of them
        each time that `wait(also=)` begins.
        """
        if descriptor >= 0 and is_patched():
            import gevent

            self._watched = gevent.get_hub().loop.io(descriptor, 1)  # 1: readable
            self._watched.start(self.set)
        elif descriptor >= 0:
            self._watched = descriptor

    def wait(self, timeout: float, also: int = -1) -> None:
        """Return when set, after `timeout` seconds at the latest, and clear.

        Also when the descriptor `also` is readable, if it is one.
        """
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        for descriptor in (also, self._watched):
            if isinstance(descriptor, int) and descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        poller.poll(timeout * 1000)
        self.clear()

    def close(self) -> None:
        if hasattr(self._watched, "stop"):
            self._watched.stop()
            self._watched.close()
        self._reader.close()
        self._writer.close()


class Spot(Protocol):
    """Where one generator waits. A `wake()` before the `park()` counts: that park returns at once."""

    def park(self) -> None: ...

    def wake(self) -> None: ...


def new_spot() -> Spot:
    """Return a parking spot for the calling greenlet, or for the calling thread where nothing is patched."""
    return _GreenletSpot() if is_patched() else _ThreadSpot()


def is_patched() -> bool:
    """Tell whether gevent has patched the threads of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


class _ThreadSpot:
    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token = threading.Lock()
        self._token.acquire()

    def park(self) -> None:
        self._token.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # released already: one token is enough
            self._token.release()


class _GreenletSpot:
    """A greenlet switched to by a callback of the hub: half the price of any gevent queue or event."""

    __slots__ = ("_greenlet", "_hub", "_woken")

    def __init__(self) -> None:
        import gevent

        self._hub: Any = gevent.get_hub()
        self._greenlet: Any = None
        self._woken = False

    def park(self) -> None:
        import gevent

        if not self._woken:
            self._greenlet = gevent.getcurrent()
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
