"""What others do to a process before and after they import an app."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any


def _short_switches() -> None:
    sys.setswitchinterval(1e-6)


def _timer_signals() -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)


def _tracebacks() -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(1, repeat=True)


def _traced() -> None:
    def trace(*_: Any) -> Any:
        return trace

    sys.settrace(trace)
    threading.settrace(trace)


def _profiled() -> None:
    sys.setprofile(lambda *_: None)
    threading.setprofile(lambda *_: None)


def _deleted_directory() -> None:
    with tempfile.TemporaryDirectory() as there:
        os.chdir(there)


def _ignored_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


BEFORE: dict[str, Callable[[], Any]] = {
    "timer signals": _timer_signals,
    "gc.disable": gc.disable,
    "faulthandler": _tracebacks,
    "ignored children": _ignored_children,
    "traced": _traced,
    "profiled": _profiled,
    "short switches": _short_switches,
    "socket timeout": lambda: socket.setdefaulttimeout(0.05),
    "recursion": lambda: sys.setrecursionlimit(150),
    "stdin closed": lambda: os.close(0),
    "umask": lambda: os.umask(0o777),
}
AFTER: dict[str, Callable[[], Any]] = {
    "gc.freeze": gc.freeze,
    "deleted directory": _deleted_directory,
    "few descriptors": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
}
