"""Notice that this worker is about to stop, to let its streams end first.

gunicorn asks a worker to stop, and then waits `graceful_timeout` (30 s) for its open requests. A stream never ends by
itself. gunicorn has no hook that an app could use without a configuration file, so two things are watched:

- SIGTERM: a handler is set that calls the previous one (gunicorn's, or the app's own) afterwards. A handler can be set
  only in the main thread: under gevent that is any greenlet, under gthread only while the app is being loaded.
- the worker object behind gunicorn's handler. Its `alive` also becomes false if no signal comes (`max_requests`) or if
  the handler could not be set (gthread with --preload). The ticker checks it once a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from types import FrameType
from typing import Any

from ..concurrency.forks import reset_in_children
from ..concurrency.greenlets import become_copy
from ..concurrency.wakeup import Wakeup
from . import gunicorn

_requested = False
_worker: Any = None
_watched_in = 0  # the id of the process in which watch_here() has run
# Replaced, never changed: the signal handler may read it between any two bytecodes of `subscribe()`.
_wakeups: tuple[weakref.ref[Wakeup], ...] = ()


class _Handler:
    """A SIGTERM handler that calls the previous one. An app may later set its own handler, which calls this one."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        # It may run in gevent's hub, so nothing here waits or takes a lock.
        global _requested
        _requested = True
        for ref in _wakeups:
            wakeup = ref()
            if wakeup is not None:
                wakeup.set()
        self._previous(signum, frame)


def _reset() -> None:
    """Forget the worker in a child, which is none: its parent may end, and it goes on."""
    global _requested, _worker, _wakeups
    if _worker is not None:
        become_copy()
    _requested, _worker, _wakeups = False, None, ()


reset_in_children(_reset)


def watch() -> None:
    """Watch for the end of this worker, if this process is a gunicorn worker. Repeated calls are harmless.

    In other processes (`flask run`, scripts) signals are left alone.
    """
    global _worker
    if not gunicorn.is_running():
        return
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _Handler) or not callable(handler):
        return
    # The app may have its own handler for SIGTERM. It hardly has one for SIGABRT, for which gunicorn sets another.
    worker = gunicorn.worker_behind(handler) or gunicorn.worker_behind(signal.getsignal(signal.SIGABRT))
    if worker is not None:
        _worker = worker
    elif gunicorn.is_arbiters(handler):
        return
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _Handler(handler))


def watch_here() -> None:
    """Watch, once in each process, at its first stream.

    Under --preload, or if the app sets its own handler, `watch()` could not do its work while the app was loaded.
    """
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
    """Set `wakeup` when the signal comes. Only a weak reference to it is kept."""
    global _wakeups
    _wakeups = (*(ref for ref in _wakeups if ref() is not None), weakref.ref(wakeup))
