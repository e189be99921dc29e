"""Whether an app's events go to the event log: what SSE_EVENT_LOG says, and what the database has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import EventLogMissing
from .schema import Installation, NotUsable, look_up

logger = logging.getLogger(__name__)

# Seconds until a database that had no log is asked again: somebody may install it while we run.
_LOOK_AGAIN = 5.0


class Presence:
    """Knows the log of one database. `setting` is True (required), False (not used) or "auto"."""

    def __init__(self, setting: bool | str) -> None:
        self._setting = setting
        self._found: Installation | None = None
        self._look_at = 0.0
        self._said = ""

    @property
    def found(self) -> bool:
        """Whether the log was there when we looked last."""
        return self._found is not None

    def look(self, execute: Callable[[str], Sequence[Sequence[Any]]], *, anew: bool = False) -> Installation | None:
        """Return the log to be used, or None. `execute` runs a query on the database.

        What was found is remembered until `forget()`; `anew` asks all the same. Raises `EventLogMissing` where the
        setting requires a log and there is none that can be used.
        """
        if self._setting is False:
            return None
        missing = "the database has no event log. Remedy: flask sse init"
        if anew or (self._found is None and (self._setting is True or time.monotonic() >= self._look_at)):
            self._look_at = time.monotonic() + _LOOK_AGAIN
            try:
                self._found = look_up(execute)
            except NotUsable as error:
                self._found, missing = None, str(error)
            if self._found is not None:
                self._say(logging.INFO, "The event log is on.")
            elif self._setting is True or "may not" in missing:
                self._say(logging.ERROR, f"The event log is off: {missing}.")
            else:
                self._say(logging.INFO, "The event log is off: it is not installed (flask sse init).")
        if self._found is None and self._setting is True:
            raise EventLogMissing(f'SSE_EVENT_LOG is true, and {missing}; or set SSE_EVENT_LOG to "auto".')
        return self._found

    def forget(self) -> None:
        """Look again at the next use: something that belongs to the log was not there."""
        self._found = None
        self._look_at = 0.0

    def _say(self, level: int, text: str) -> None:
        if text != self._said:
            self._said = text
            logger.log(level, "%s", text)
