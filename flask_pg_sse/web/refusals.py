"""Log why streams are refused: the first refusal of a kind at once, and then a line a minute at most."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flask import Flask

from ..hub.admission import TryLater
from ..repeats import Repeats, times
from ..stats import REFUSED, Counter

logger = logging.getLogger(__name__)

# Seconds between two lines of one kind. Clients come back every few seconds, and each could cause a line.
_EVERY = 60.0
# The longest time in seconds that a client waits because a hook has failed for as long.
_LONGEST_WAIT = 60.0


class Refusals:
    """The refused streams of one app in this process. In debug mode each one is logged."""

    def __init__(self, app: Flask, count: Callable[[Counter, str], None]) -> None:
        self._app = app
        self._count = count
        self._repeats = Repeats(_EVERY, _EVERY)
        self._hints = Repeats()
        self._failing_since: dict[str, float] = {}  # for each hook that fails, the monotonic time

    def log(
        self, kind: str, message: str, *args: object, level: int = logging.WARNING, traceback: bool = False
    ) -> None:
        """Log a refusal. Its `kind` is one of a few fixed texts, so that what clients choose makes no line of its own.

        `traceback` adds the traceback of the exception that is being handled.
        """
        number = self._repeats.count(kind, time.monotonic())
        if number or self._app.debug:
            logger.log(level, message + "%s", *args, times(number or 1), exc_info=traceback or None)

    def count(self, kind: str) -> None:
        """Count a refused request, by a kind that `stats.REFUSED` has."""
        self._count(REFUSED, kind)

    def later(self, channel: str, later: TryLater) -> str:
        """Log why a stream cannot begin now. Return what its client is told of it in a comment: in debug mode, why.

        The ends that are planned are for debugging only.
        """
        self.count("client_capacity" if later.kind == "client" else later.reason)
        level = logging.WARNING if later.why else logging.DEBUG
        text = "A stream on channel %r cannot begin now (sse-end %s)%s."
        why = f": {later.why.rstrip('.')}" if later.why else ""
        self.log(f"{later.reason} {later.kind}", text, channel, later.reason, why, level=level)
        return later.why if self._app.debug else ""

    def hint(self, text: str) -> str:
        """Log why a stream that is open may hear nothing. Return what its client is told of it: in debug mode, all."""
        if text:
            self._hints.log(logger.warning, "", time.monotonic(), "%s", text)
        return text if self._app.debug else ""

    def hook_failed(self, hook: str) -> float:
        """Note that the hook fails. Return for how many seconds it has done so, at most 60."""
        now = time.monotonic()
        return min(_LONGEST_WAIT, now - self._failing_since.setdefault(hook, now))

    def hook_works(self, hook: str) -> None:
        """Note that the hook has answered."""
        self._failing_since.pop(hook, None)
