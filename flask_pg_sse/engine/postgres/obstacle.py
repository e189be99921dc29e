"""Name what keeps NOTIFY from being sent: PostgreSQL's queue of notifications is full, or a commit holds its lock.

Both concern the whole server, and neither keeps a connection from listening. There is one queue, in which a session
that listens and stays in a transaction keeps its place. One transaction at a time may write there, to the end of its
commit. https://www.postgresql.org/docs/current/sql-notify.html#SQL-NOTIFY-NOTES
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2

from ...repeats import Repeats, times

logger = logging.getLogger(__name__)

Execute = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]

# The errors of a commit that cannot notify now.
NOT_NOW = (psycopg2.errors.LockNotAvailable, psycopg2.errors.ProgramLimitExceeded)

# PostgreSQL moves the end of the queue when somebody notifies, which nobody can while it is full, and in this function.
_MOVE_ON = "SELECT pg_catalog.pg_notification_queue_usage()"
# PostgreSQL sends the number of a session that holds up the queue as a part of a warning, in the server's language.
_PID = re.compile(r"PID\D*(\d+)")
_SESSION = """
SELECT pg_catalog.concat('session ', a.pid, ' of role "', a.usename, '" (application_name "', a.application_name, '", ',
    coalesce(a.state, 'state not visible to this role'),
    ', for ', extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change)::bigint, ' s',
    CASE WHEN a.wait_event OPERATOR(pg_catalog.=) 'SyncRep' THEN ', waiting for a synchronous standby' END, ')')
FROM pg_catalog.pg_stat_activity a
"""
_THAT_SESSION = f"{_SESSION} WHERE a.pid OPERATOR(pg_catalog.=) %s::integer"
# Without PostgreSQL's warning, which comes once in five seconds for all sessions.
_OLDEST_SESSION = f"""{_SESSION}
WHERE a.backend_type OPERATOR(pg_catalog.=) 'client backend' AND a.xact_start IS NOT NULL
    AND a.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()
ORDER BY a.xact_start LIMIT 1
"""
# The lock of NOTIFY is one on "database 0".
_COMMITTING_SESSION = f"""{_SESSION}
JOIN pg_catalog.pg_locks l ON l.pid OPERATOR(pg_catalog.=) a.pid
WHERE l.granted AND l.locktype OPERATOR(pg_catalog.=) 'object' AND l.database OPERATOR(pg_catalog.=) 0
    AND l.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_database'::pg_catalog.regclass
    AND l.objid OPERATOR(pg_catalog.=) 0
"""


# What ends a full queue, and a commit that does not end.
END_THE_TRANSACTION = "end that transaction, if need be with pg_terminate_backend()"


@dataclass(frozen=True, slots=True)
class Queue:
    """How full the queue of notifications is, from 0 to 1, and the session that probably holds it up, in words."""

    usage: float
    holder: str | None


def look_at_the_queue(execute: Execute) -> Queue:
    """Return how full the queue is, and who probably holds it up: the session whose transaction began first.

    PostgreSQL names the session itself only in its log, once the queue is half full.
    """
    [(usage,)] = execute(_MOVE_ON, ())
    holders = execute(_OLDEST_SESSION, ()) if usage else ()
    return Queue(float(usage), holders[0][0] if holders else None)


def committing(execute: Execute) -> str:
    """Return the session whose commit holds the lock of NOTIFY, in words."""
    return _names(execute(_COMMITTING_SESSION, ()))


def _names(sessions: Sequence[Sequence[Any]]) -> str:
    return ", ".join(name for (name,) in sessions) or "a session that is gone by now"


class Obstacle:
    """What keeps one listener from sending beats. Each kind is logged at once, then rarely, and so is the end."""

    def __init__(self) -> None:
        self._repeats = Repeats()
        self._slowest: str | None = None  # the number of the session that holds up the queue
        self.stands = False

    def met(self, error: Exception, notices: Sequence[str], execute: Execute) -> None:
        """Note that a beat could not be sent. `notices` are those of the connection. `execute` runs a query on it."""
        self.stands = True
        if isinstance(error, psycopg2.errors.ProgramLimitExceeded):
            found = [number for text in notices for number in _PID.findall(text)]
            self._slowest = found[-1] if found else self._slowest
            execute(_MOVE_ON, ())
            self._say(
                "PostgreSQL's queue of notifications is full, so nothing that notifies can commit%s. It is held up by "
                f"%s, which listens and stays in a transaction. Streams stay open, and new ones begin. Remedy: "
                f"{END_THE_TRANSACTION}.",
                lambda: execute(_THAT_SESSION, (self._slowest,)) or execute(_OLDEST_SESSION, ()),
            )
        else:
            self._say(
                "No transaction that notifies can commit before another one has done so%s: %s. Streams stay open, and "
                "new ones begin. Events come when that commit has ended.",
                lambda: execute(_COMMITTING_SESSION, ()),
            )

    def _say(self, text: str, holders: Callable[[], Sequence[Sequence[Any]]]) -> None:
        if number := self._repeats.count(text, time.monotonic()):
            logger.warning(text, times(number), _names(holders()))

    def over(self) -> None:
        """Note that a beat could be sent."""
        self.stands, self._slowest = False, None
        if ended := self._repeats.over(time.monotonic()):
            logger.warning("Transactions that notify can commit again, after %s.", ended)
