"""Retention: taking old events out of the log, in batches, by one session of the database at a time."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2

from ...concurrency import Wakeup
from ...errors import DatabaseUnavailable, PgSSEError
from .installation import InstallationLookup
from .pool import Pool

logger = logging.getLogger(__name__)

# Events deleted in one transaction: some tens of milliseconds, in which nobody waits for it.
BATCH = 5000
# Seconds between two rounds of one process; every process of every host has them.
_EVERY = 60.0

# With its schema: a make_interval(numeric) of somebody else's in `public` would fit better, and run with our rights.
_PRUNE = "SELECT flask_pg_sse.prune_v1(pg_catalog.make_interval(secs => %s), %s)"


def prune(execute: Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]], max_age: float) -> tuple[int, bool]:
    """Delete the events older than `max_age` seconds; return how many, and whether another session is at the rest.

    In smaller batches where they take too long, as for events of many megabytes.
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


class Pruner:
    """Prunes the log of one database now and then, from `start()` to `stop()`. `retention` is in seconds."""

    def __init__(self, pool: Pool, installation: InstallationLookup, retention: float) -> None:
        self._pool = pool
        self._installation = installation
        self._retention = retention
        self._wakeup = Wakeup()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pg-sse-pruner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._stopping = True
        self._wakeup.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        else:  # it may never have started
            self._wakeup.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                # Not all processes at once, though they were started at once.
                self._wakeup.wait(min(_EVERY, self._retention / 2) * random.uniform(0.5, 1.0))
                if self._installation.found and not self._stopping:
                    self._round()
        finally:
            self._wakeup.close()

    def _round(self) -> None:
        begun = time.monotonic()
        try:
            deleted, _ = prune(self._pool.execute, self._retention)
        except PgSSEError as error:  # the next round may go better
            logger.warning("The event log could not be pruned: %s", error)
        else:
            if deleted:
                logger.debug("Pruned %d events from the log in %.1f s.", deleted, time.monotonic() - begun)
