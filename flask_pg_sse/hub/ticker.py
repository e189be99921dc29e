"""The one background thread that keeps time for all streams: heartbeats, clients that leave, the end of the worker."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable

from ..concurrency.background import BackgroundThread
from ..server import shutdown
from .hub import Hub

logger = logging.getLogger(__name__)

# Seconds between two beats. Most beats cost nothing: the hub knows until when no stream needs a check.
_TICK = 1.0
_LAST_TICK = 0.1


class Ticker(BackgroundThread):
    """Looks after a hub's streams from `start()` to `stop()`. `every` is the hub's shortest interval, in seconds.

    Once `owner` has been garbage-collected, and the last stream has ended, it calls `finish()` and ends itself. It
    calls `also()` after each beat.
    """

    def __init__(
        self,
        hub: Hub,
        every: float,
        owner: object | None = None,
        finish: Callable[[], None] = lambda: None,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("pg-sse-ticker")
        wakeup = self._wakeup
        self._owner = weakref.ref(owner or self, lambda _: wakeup.set())
        self._finish = finish
        self._also = also
        self._hub = hub
        self._interval = min(_TICK, every / 4)

    def start(self) -> None:
        shutdown.subscribe(self._wakeup)
        self._hub.hangups.start()  # not in the thread: the first stream may come before the thread runs
        super().start()

    def _close(self) -> None:
        super()._close()
        self._hub.hangups.stop()

    def _work(self) -> None:
        self._wakeup.watch(self._hub.hangups.fileno())
        drained = False
        next_beat = time.monotonic() + self._interval
        while not self._stopping:
            self._wakeup.wait(max(0.0, next_beat - time.monotonic()))
            try:
                if not drained and shutdown.requested():
                    self._hub.drain("shutdown")
                    drained = True
                    # A client that does not read its last block must not delay the worker's exit.
                    next_beat, self._interval = 0.0, min(self._interval, _LAST_TICK)
                self._hub.end_departed()
                self._hub.sweep()
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._interval
                    self._hub.beat()
                    self._also()
                if self._owner() is None and not len(self._hub):
                    self._finish()
                    return
            except Exception:  # the ticker survives any error of one round
                logger.exception("A round of heartbeats failed; the next one is in %.1f s.", self._interval)
