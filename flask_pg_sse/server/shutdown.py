"""Learning that this worker is about to stop, so that its streams can end themselves first.

gunicorn asks a worker to stop and then waits `graceful_timeout` (30 s) for its open requests; a stream never ends by
itself. gunicorn has no hook that an app could use without a configuration file, so two things are watched:

- SIGTERM: a handler is put before the one that stands (gunicorn's, or the app's own), which is called next. Signals can
  be set from the main thread only: under gevent that is any greenlet, under gthread only while the app is being loaded.
- the worker object behind gunicorn's handler, whose `alive` turns false also where no signal comes (`max_requests`) or
  where the handler could not be set (gthread with --preload). The ticker looks at it once a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from types import FrameType
from typing import Any

from ..concurrency import Wakeup
from . import gunicorn

_requested = False
_worker: Any = None
_watched_in = 0  # the process whose first stream has asked for it
# Replaced, never changed: the signal handler may read it between any two bytecodes of whoever adds to it.
_wakeups: tuple[weakref.ref[Wakeup], ...] = ()


class _Handler:
    """A SIGTERM handler that remembers the one it stands before; an app's own may in turn stand before this one."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        # It may run in gevent's hub: nothing here waits or takes a lock.
        global _requested
        _requested = True
        for ref in _wakeups:
            wakeup = ref()
            if wakeup is not None:
                wakeup.set()
        self._previous(signum, frame)


def watch() -> None:
    """Watch for the end of this worker, if this process is a gunicorn worker; call it as often as you like.

    Elsewhere (`flask run`, scripts) signals are left alone.
    """
    global _worker
    if not gunicorn.is_running():
        return
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _Handler) or not callable(handler):
        return
    worker = gunicorn.worker_behind(handler)
    if worker is not None:
        _worker = worker
    elif gunicorn.is_arbiters(handler):
        return
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _Handler(handler))


def watch_here() -> None:
    """Watch, once in each process: under --preload, or beside a handler of the app's, it could not be done before."""
    global _watched_in
    if _watched_in != os.getpid():
        watch()
        _watched_in = os.getpid()


def gunicorn_worker() -> Any:
    """Return the gunicorn worker that this process is, if `watch()` has found it."""
    return _worker


def requested() -> bool:
    """Tell whether this worker has been asked to stop."""
    return _requested or (_worker is not None and not _worker.alive)


def subscribe(wakeup: Wakeup) -> None:
    """Have `wakeup` set when the signal comes, for as long as it exists."""
    global _wakeups
    _wakeups = (*(ref for ref in _wakeups if ref() is not None), weakref.ref(wakeup))
