"""The package's background threads, which are greenlets where the thread that starts them runs greenlets."""

from __future__ import annotations

import threading
from typing import Any

from .forks import call_in_children
from .greenlets import become_copy, hub_here, is_patched, original
from .locks import Event
from .wakeup import Wakeup


class BackgroundThread:
    """A thread of the package, from `start()` to `stop()`. A subclass defines what it does, in `_work()`.

    `_work()` waits in `_wakeup.wait()`, and returns once `_stopping` is set.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stopping = False
        self._wakeup = Wakeup()
        self._ended = Event()
        self._thread: threading.Thread | None = None
        self._greenlet: Any = None
        self._started = False

    def start(self) -> None:
        if hub_here() is not None:
            import gevent

            # Not a Thread that is patched: threads are forgotten in a child, and the end of its copy would fail there.
            self._greenlet = gevent.spawn(self._run)
            self._greenlet.name = self._name
        elif is_patched():
            original("_thread", "start_new_thread")(self._run, ())
        else:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._started = True
        call_in_children(self._end_copy)

    def stop(self, timeout: float) -> None:
        """End the thread, within `timeout` seconds."""
        self._stopping = True
        self._wakeup.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout)
        elif self._thread is None and self._started:
            self._ended.wait(timeout)
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
            self._ended.set()

    def _end_copy(self) -> None:
        """Have the copy end that a child has of this thread if it is a greenlet."""
        self._stopping = True
        self._ended.set()  # nothing in the child waits for it
        if self._greenlet is not None and not self._greenlet.dead:
            become_copy()
