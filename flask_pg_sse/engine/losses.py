"""Warn of events that went with their transaction: no browser gets them, and no error says so.

The usual reason is a `notify(connection=…)` after the commit. It belongs to the next transaction, which ends without a
commit when the request ends.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..repeats import Repeats, times
from .transactions import Outcome, follow

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]


@dataclass(slots=True)
class _Call:
    """A call of `notify()` or `notify_many()`: its channel, the number of events, its file and line.

    `several` tells whether it stands for calls with other channels too.
    """

    channel: str
    events: int
    where: str
    several: bool = False
    pid: int = field(default_factory=os.getpid)


@dataclass(slots=True)
class Work:
    """A request, or what else runs in one context of an app, and its calls that were lost.

    What is lost in it is told at its end, because only then one knows whether it failed. `endpoint` is the request's.
    """

    endpoint: str | None = None
    failed: bool = False
    over: bool = False
    lost: list[_Call] = field(default_factory=list)


class Losses:
    """Follows the events of one app that are sent in callers' transactions.

    `work` returns the work that runs now. With None a loss is told at once.
    """

    def __init__(self) -> None:
        self.work: Callable[[], Work | None] = lambda: None
        self._repeats = Repeats()

    def follow(self, connection: Any, channel: str, events: int, *, used: bool) -> None:
        """Note a call that has sent events on a caller's connection. `used` is that of `transactions.follow()`."""
        call = _Call(channel, events, _call_site())
        follow(connection, functools.partial(self._ended, call, self.work()), used=used)

    def _ended(self, call: _Call, work: Work | None, outcome: Outcome) -> None:
        if call.pid != os.getpid():  # a child that was forked meanwhile ends its copy of the session
            return
        if outcome is Outcome.COMMITTED and work is not None:
            work.lost = [lost for lost in work.lost if lost.where != call.where]  # it was tried again
        elif outcome is Outcome.LOST:
            if work is None or work.over:
                self._tell(call, None)
            else:
                work.lost.append(call)

    def end(self, work: Work) -> None:
        """Tell what a work has lost, unless it failed."""
        work.over = True
        calls: dict[str, _Call] = {}
        for call in work.lost:
            first = calls.setdefault(call.where, call)
            if first is not call:
                first.events += call.events
                first.several = first.several or first.channel != call.channel
        for call in calls.values() if not work.failed else ():
            self._tell(call, work.endpoint)

    def _tell(self, call: _Call, endpoint: str | None) -> None:
        if not (number := self._repeats.count(call.where, time.monotonic())):
            return
        one = call.events == 1
        logger.warning(
            "%d event%s for %r%s went with %s transaction, which ended without a commit, so no browser gets %s: "
            "notify(connection=…) at %s%s. Remedy: call notify() before the commit%s.",
            call.events,
            "" if one else "s",
            call.channel,
            " and other channels" if call.several else "",
            "its" if one else "their",
            "it" if one else "them",
            call.where,
            f", endpoint {endpoint!r}" if endpoint else "",
            times(number),
        )


def _call_site() -> str:
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
