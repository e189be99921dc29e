"""Delete old events from the log, in batches, and in one database session at a time."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2

from ...concurrency.background import BackgroundThread
from ...errors import DatabaseUnavailable, PgSSEError
from ...repeats import Repeats, duration
from .installation import InstallationLookup
from .pool import Pool

logger = logging.getLogger(__name__)

# Events deleted in one transaction. That takes some tens of milliseconds, and nothing waits for it.
BATCH = 5000
# Seconds between two rounds of one process. Every process of every host has its rounds.
_EVERY = 60.0

# make_interval() is named with its schema. A make_interval(numeric) that another role made in `public` would match
# better, and would run with our rights.
_PRUNE = "SELECT flask_pg_sse.prune_v1(pg_catalog.make_interval(secs => %s), %s::integer)"
HOLDERS = "SELECT flask_pg_sse.holders_v1('pruning'::pg_catalog.text)"
# Seconds without a completed round of this process until that is logged, and between the first two such messages.
LATE = 600.0


def prune(execute: Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]], max_age: float) -> tuple[int, bool]:
    """Delete the events older than `max_age` seconds.

    Returns how many were deleted, and whether another session is already deleting the rest. A batch that takes too long
    (events may have many megabytes) is tried again in smaller batches.
    """
    deleted, batch = 0, BATCH
    while True:
        try:
            [(count,)] = execute(_PRUNE, (max_age, batch))
        except (DatabaseUnavailable, psycopg2.errors.QueryCanceled) as error:
            if batch == 1 or not isinstance(error.__cause__ or error, psycopg2.errors.QueryCanceled):
                raise
            batch = max(1, batch // 8)
            continue
        deleted += count or 0
        if count is None or count < batch:
            return deleted, count is None


class Pruner(BackgroundThread):
    """Prunes the log of one database in rounds, from `start()` to `stop()`. `retention` is in seconds."""

    def __init__(self, pool: Pool, installation: InstallationLookup, retention: float) -> None:
        super().__init__("pg-sse-pruner")
        self._execute = functools.partial(installation.execute, pool)
        self._installation = installation
        self._retention = retention
        self._done_at = 0.0  # monotonic time of the last completed round
        self._repeats = Repeats(LATE)

    def _work(self) -> None:
        self._done_at = time.monotonic()
        while not self._stopping:
            # A random pause, because processes that started together should not prune together.
            self._wakeup.wait(min(_EVERY, self._retention / 2) * random.uniform(0.5, 1.0))
            if self._installation.found and not self._stopping:
                self._round()

    def _round(self) -> None:
        started = time.monotonic()
        try:
            deleted, busy = prune(self._execute, self._retention)
            if busy:  # by another process, as it should be, or by a session that does not go on
                self._say_if_late()
                return
        except PgSSEError as error:  # the next round may succeed
            if not self._stopping:
                self._say(str(error), "The event log could not be pruned: %s", error)
            return
        now = time.monotonic()
        if self._repeats.over(now):
            logger.warning("The event log is pruned again, after %s.", duration(now - self._done_at))
        self._done_at = now
        if deleted:
            logger.debug("Pruned %d events from the log in %.1f s.", deleted, now - started)

    def _say_if_late(self) -> None:
        since = time.monotonic() - self._done_at
        if since < LATE:
            return
        [(holders,)] = self._execute(HOLDERS)
        self._say(
            "held",
            "For %s this process could not prune the event log, and the log may be growing. The lock for that is held "
            "by %s.",
            duration(since),
            holders,
        )

    def _say(self, kind: str, message: str, *args: object) -> None:
        self._repeats.log(logger.warning, kind, time.monotonic(), message, *args)
