"""Decide whether an app's events go to the event log: SSE_EVENT_LOG and the database's installation decide it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import EventLogMissing
from ...repeats import Repeats, times
from .schema import SCHEMA, VERSION

logger = logging.getLogger(__name__)

# Seconds until a database without a log is checked again: the log may be installed while the app runs.
_LOOK_AGAIN = 5.0
_MISSING = "the database has no event log. Remedy: flask sse init"


@dataclass(frozen=True, slots=True)
class Installation:
    """The event log of a database: its version, and the key that signs its ids."""

    version: int
    key: bytes = field(repr=False)


class InstallationLookup:
    """Looks up the log of one database, and remembers it. `setting` is True (required), False (not used) or "auto"."""

    def __init__(self, setting: bool | str) -> None:
        self._setting = setting
        self._found: Installation | None = None
        self._look_at = 0.0
        self._said = ""
        self._repeats = Repeats()

    @property
    def found(self) -> bool:
        """Whether the last look found the log."""
        return self._found is not None

    def look(self, execute: Callable[[str], Sequence[Sequence[Any]]], *, again: bool = False) -> Installation | None:
        """Return the log to use, or None. `execute` runs a query on the database.

        A log that was found is remembered until `forget()`; `again` looks again anyway. Raises `EventLogMissing` if the
        setting requires a log and the database has no log that can be used.
        """
        if self._setting is False:
            return None
        wrong = None
        if again or (self._found is None and (self._setting is True or time.monotonic() >= self._look_at)):
            try:
                self._found = _look_up(execute)
            except _NotUsable as error:
                self._found, wrong = None, str(error)
            # Set only after the answer. Until then other callers query the database too, instead of finding "no log".
            self._look_at = time.monotonic() + _LOOK_AGAIN
            self._say(wrong)
        if self._found is None and self._setting is True:
            raise EventLogMissing(f'SSE_EVENT_LOG is true, and {wrong or _MISSING}; or set SSE_EVENT_LOG to "auto".')
        return self._found

    @contextlib.contextmanager
    def trusted(self) -> Iterator[None]:
        """Rely on what was found. After an error it is forgotten, because the log may have been dropped."""
        try:
            yield
        except Exception:
            self.forget()
            raise

    def forget(self) -> None:
        """Look again at the next use, because something that belongs to the log was missing."""
        self._found = None
        self._look_at = 0.0

    def _say(self, wrong: str | None) -> None:
        """Log whether the event log is on, if that has changed; and again, rarely, while it is off and should be on."""
        text = "The event log is on" if self._found else f"The event log is off: {wrong or _MISSING}"
        now = time.monotonic()
        if self._found is None and (self._setting is True or wrong is not None):
            if number := self._repeats.count(text, now):
                logger.error("%s%s.", text, times(number))
        else:
            ended = self._repeats.over(now)
            if ended is not None and self._found is not None:
                logger.warning("%s, after %s without it.", text, ended)
            elif text != self._said:
                logger.info("%s.", text)
        self._said = text


# The query reads the catalog, which every role may read. To name a function that does not exist, or that this role may
# not call, would be an error, and would abort a caller's transaction.
_LOOK_UP = f"""
SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = '{SCHEMA}' AND p.proname = 'installed_v1'
"""


class _NotUsable(Exception):
    """There is an event log, but this role or this version of the package cannot use it. The text has the remedy."""


def _look_up(execute: Callable[[str], Sequence[Sequence[Any]]]) -> Installation | None:
    """Return the event log of the database, or None. `execute` runs a query on it. Raises `_NotUsable`."""
    found = execute(_LOOK_UP)
    if not found:
        return None
    if not found[0][0]:
        raise _NotUsable(
            "the database has an event log, but the app's role may not use it. Remedy: flask sse init --grant-to ROLE, "
            "run by the role that installed it"
        )
    rows = execute(f"SELECT version, key FROM {SCHEMA}.installed_v1()")
    if not rows:
        raise _NotUsable(
            "the database's event log has no rows, as after restoring a dump of the schema alone. Remedy: "
            "flask sse init"
        )
    [(version, key)] = rows
    if version < VERSION:
        raise _NotUsable(
            f"the database's event log has version {version}, and this package needs version {VERSION}. Remedy: "
            "flask sse init"
        )
    return Installation(version, bytes(key))
