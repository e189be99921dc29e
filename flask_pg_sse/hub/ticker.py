"""The one background thread that keeps time for all streams: heartbeats, clients that leave, the end of the worker."""

from __future__ import annotations

import logging
import threading
import time

from .. import concurrency
from ..server import shutdown
from .hub import Hub

logger = logging.getLogger(__name__)

# Seconds between two beats. Most beats cost nothing: the hub knows until when no stream needs a check.
_TICK = 1.0
_LAST_TICK = 0.1


class Ticker:
    """Looks after a hub's streams from `start()` to `stop()`. `every` is the hub's shortest interval, in seconds."""

    def __init__(self, hub: Hub, every: float) -> None:
        self._hub = hub
        self._interval = min(_TICK, every / 4)
        self._wakeup = concurrency.Wakeup()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pg-sse-ticker", daemon=True)

    def start(self) -> None:
        shutdown.subscribe(self._wakeup)
        self._hub.hangups.start()  # not in the thread: the first stream may come before the thread runs
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._stopping = True
        self._wakeup.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        else:  # the thread may never have started
            self._close()

    def _close(self) -> None:
        self._wakeup.close()
        self._hub.hangups.stop()

    def _run(self) -> None:
        try:
            self._wakeup.watch(self._hub.hangups.fileno())
            self._keep_time()
        finally:
            self._close()

    def _keep_time(self) -> None:
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
            except Exception:  # the ticker survives any error of one round
                logger.exception("A round of heartbeats failed; the next one is in %.1f s.", self._interval)
