"""Tell which server and database answer at an address, and whether the address leads to another one by now. No thread.

A server is known by the system identifier of its data and by the time at which it started. Both are the same through a
pooler, and every role may read them. An address says nothing: it may be moved while the old server lives on.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-CONTROL-SYSTEM
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_STARTED = "pg_catalog.pg_postmaster_start_time()"
_WHO = f"""
SELECT c.system_identifier, (extract(epoch FROM {_STARTED}) OPERATOR(pg_catalog.*) 1000000)::bigint, d.oid::bigint,
    d.datname, pg_catalog.to_char({_STARTED} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
FROM pg_catalog.pg_control_system() c, pg_catalog.pg_database d
WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
"""
# Looks in a row that must find the same other server before the listener moves there.
_ENOUGH = 2
# The same for an address that has led now here, now there within the last ten minutes.
_ENOUGH_WHILE_UNSTEADY = 10
_UNSTEADY_FOR = 600.0


@dataclass(frozen=True, slots=True)
class Server:
    """One database of one running server. A restart makes another `Server`."""

    system: int
    started: int  # microseconds since the epoch
    database: int  # oid
    words: str = field(compare=False)

    def __str__(self) -> str:
        return self.words


def who(execute: Callable[[str], Sequence[Sequence[Any]]]) -> Server:
    """Return the server that answers. `execute` runs a query on a connection to it."""
    [(system, started, database, name, since)] = execute(_WHO)
    return Server(system, started, database, f"database {name!r} of the server {system}, started {since} UTC")


class Finding(enum.Enum):
    """What a look at an address has found."""

    SAME = "the server that we listen to"
    OTHER = "another server, which has not been found often enough yet"
    MOVED = "the same other server, several times in a row"
    UNSTEADY = "now one server, now another"


class Sightings:
    """The servers that were found at one address, look by look. The caller passes the monotonic time."""

    def __init__(self) -> None:
        self._other: Server | None = None  # found by the last look, if it is not the one that we listen to
        self._in_a_row = 0
        self._left: Server | None = None  # the one that the listener has left, within the last ten minutes
        self._left_at = float("-inf")
        self._unsteady_until = float("-inf")

    def saw(self, found: Server, ours: Server, now: float) -> Finding:
        """Add a look. `ours` is the server that the listener is connected to."""
        other, self._other = self._other, None if found == ours else found
        turned = other is not None and found != other
        if turned or (found == self._left and now < self._left_at + _UNSTEADY_FOR):
            self._unsteady_until = now + _UNSTEADY_FOR
        if found == ours:
            return Finding.UNSTEADY if turned else Finding.SAME
        self._in_a_row = self._in_a_row + 1 if found == other else 1
        unsteady = now < self._unsteady_until
        if self._in_a_row >= (_ENOUGH_WHILE_UNSTEADY if unsteady else _ENOUGH):
            return Finding.MOVED
        return Finding.UNSTEADY if unsteady else Finding.OTHER

    def left(self, ours: Server, now: float) -> None:
        """Note that the listener leaves `ours` for the server that the last look found."""
        self._other, self._in_a_row = None, 0
        self._left, self._left_at = ours, now
