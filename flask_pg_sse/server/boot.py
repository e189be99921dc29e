"""Call a function as soon as this gunicorn worker serves. gunicorn has no hook for that which an app could use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..concurrency.background import BackgroundThread
from . import gunicorn, shutdown

# Seconds between two looks.
_EVERY = 0.05


def when_booted(function: Callable[[], object]) -> None:
    """Call a function once the worker has loaded the app, if this process is a gunicorn worker that is loading it.

    Not under --preload: there the app is loaded before there are workers.
    """
    worker = shutdown.gunicorn_worker()
    if worker is not None and not gunicorn.has_booted(worker):
        _Boot(worker, function).start()


class _Boot(BackgroundThread):
    def __init__(self, worker: Any, function: Callable[[], object]) -> None:
        super().__init__("pg-sse-boot")
        self._worker = worker
        self._function = function

    def _work(self) -> None:
        while not gunicorn.has_booted(self._worker):
            self._wakeup.wait(_EVERY)
            if self._stopping:
                return
        self._function()
