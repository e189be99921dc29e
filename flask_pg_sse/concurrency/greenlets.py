"""How this thread waits: so that gevent's other greenlets run meanwhile, or as threads of the system do.

Under `gevent.monkey.patch_all()` a process may still have threads of the system: gevent's own thread pool, an executor,
a C library. They have no event loop and need none, so what is patched must not be used there: it would make a loop for
each thread, and gevent's locks do not work between two. Nothing here is used to wait but what this module chooses.

Names of the standard library are looked up at each use, as in `select.poll()`, and never imported with `from`. Under
--preload gunicorn monkey-patches after the app was imported, and only a look-up at use finds gevent's versions.
"""

from __future__ import annotations

import importlib
import select
import sys
import threading
import time
from typing import Any

_is_copy = False
_forks = 0  # how often this process, or one that it was forked from, became a copy


def is_patched() -> bool:
    """Tell whether gevent has patched the threads of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def original(module: str, name: str) -> Any:
    """Return what the standard library has under a name, also if gevent has patched it."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return getattr(importlib.import_module(module), name) if monkey is None else monkey.get_original(module, name)


def hub_here() -> Any:
    """Return gevent's hub if this thread runs greenlets, which go on while one of them waits; otherwise None."""
    if _is_copy or not is_patched():
        return None
    hub = hub_of_thread()
    if hub is None and threading.get_native_id() == threading.main_thread().native_id:
        import gevent

        hub = gevent.get_hub()  # nobody has waited here yet
    return hub


def hub_of_thread() -> Any:
    """Return the hub of this thread; None if it has none. gevent is in use."""
    return sys.modules["gevent._hub_local"].get_hub_if_exists()


def call_in(hub: Any, callback: Any) -> None:
    """Have a hub call a function in its next round. Any thread may ask for that."""
    loop = hub.loop
    (loop.run_callback if hub_of_thread() is hub else loop.run_callback_threadsafe)(callback)


def is_copy() -> bool:
    """Tell whether this process was forked from one that serves by greenlets, and has copies of all of them."""
    return _is_copy


def become_copy() -> None:
    """Wait as threads do from now on: to wait as greenlets do would let the copies of the parent's greenlets run.

    They would use the parent's connections, and do again what their originals do. The copy of gunicorn's main loop
    would end the process, because its parent is not gunicorn. A greenlet that was waiting here ends where it was.
    """
    global _is_copy, _forks
    if is_patched():
        _is_copy = True
        _forks += 1


def forks() -> int:
    """Return a number to give to `end_copy()` after a wait."""
    return _forks


def end_copy(before: int) -> None:
    """End this greenlet if the process was forked while it waited: then it is a copy, and its original goes on."""
    if _forks != before:
        import gevent

        raise gevent.GreenletExit


def poll() -> Any:
    """Return an object for this thread with the methods of `select.poll` objects."""
    return _GreenletPoll() if hub_here() is not None else original("select", "poll")()


class _GreenletPoll:
    def __init__(self) -> None:
        self._poll = select.poll()
        self.register, self.unregister = self._poll.register, self._poll.unregister

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        before = _forks
        found = self._poll.poll(milliseconds)
        end_copy(before)
        return found


def sleep(seconds: float) -> None:
    if hub_here() is None:
        original("time", "sleep")(seconds)
        return
    before = _forks
    time.sleep(seconds)
    end_copy(before)


def checkpoint(pause: float = 0) -> None:
    """Let other threads or greenlets run, including those whose sockets have become ready meanwhile.

    Threads need time for that, so this one sleeps for `pause` seconds. Under gevent `pause` is not used.
    """
    if hub_here() is None:
        sleep(pause)
        return
    import gevent

    # sleep(0) runs ready greenlets, but polls no socket until fifty have run: a request would wait for the end of a
    # large fan-out. idle() goes once around the event loop. 2 is the highest priority; with a lower one it would
    # return only when nothing else is left to do.
    before = _forks
    gevent.idle(2)
    end_copy(before)
