"""Warn of events that went with their transaction: no browser gets them, and no error says so.

The usual reason is a `notify(connection=…)` after the commit. It belongs to the next transaction, which ends without a
commit when the request ends.
"""

from __future__ import annotations

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
    """A request, and its calls that were lost.

    What is lost in it is told at its end, because only then one knows whether it failed.
    """

    endpoint: str | None = None
    failed: bool = False
    over: bool = False
    lost: list[_Call] = field(default_factory=list)


class Losses:
    """Follows the events of one app that are sent in callers' transactions.

    `work` returns the request that runs now. Outside a request a loss is told when its transaction ends.
    """

    def __init__(self) -> None:
        self.work: Callable[[], Work | None] = lambda: None
        self._repeats = Repeats()

    def follow(self, connection: Any, channel: str, events: int, *, used: bool) -> None:
        """Note a call that has sent events on a caller's connection. `used` is that of `transactions.follow()`."""
        call = _Call(channel, events, _call_site())
        follow(connection, self._ended, (call, self.work()), used=used)

    def _ended(self, outcome: Outcome, calls: list[tuple[_Call, Work | None]]) -> None:
        outside: list[_Call] = []
        for call, work in calls:
            if call.pid != os.getpid():  # a child that was forked meanwhile ends its copy of the session
                continue
            if outcome is Outcome.COMMITTED and work is not None:
                work.lost = [lost for lost in work.lost if lost.where != call.where]  # it was tried again
            elif outcome is Outcome.LOST:
                (outside if work is None or work.over else work.lost).append(call)
        self._tell(outside, None)

    def end(self, work: Work) -> None:
        """Tell what a request has lost, unless it failed."""
        work.over = True
        if not work.failed:
            self._tell(work.lost, work.endpoint)

    def _tell(self, lost: list[_Call], endpoint: str | None) -> None:
        calls: dict[str, _Call] = {}
        for call in lost:
            first = calls.setdefault(call.where, call)
            if first is not call:
                first.events += call.events
                first.several = first.several or first.channel != call.channel
        for call in calls.values():
            self._tell_one(call, endpoint)

    def _tell_one(self, call: _Call, endpoint: str | None) -> None:
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
