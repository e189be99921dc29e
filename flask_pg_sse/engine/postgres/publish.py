"""Send events through the event log or by NOTIFY alone, on the package's own connection or on the caller's.

https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import DatabaseUnavailable
from ..caller import read_on, send_on
from .history import HEAD
from .installation import Installation
from .pool import Pool, Unanswered

# So many rows of one call are given a second more. They take 6 to 30 microseconds each.
_ROWS_A_SECOND = 10_000

# An event as a row of the log: its fields as JSON, and its data.
Row = tuple[str, str | None]

# One statement sends all payloads, in one transaction and one round-trip. A function scan keeps the array's order.
_NOTIFY = "SELECT pg_catalog.pg_notify(%s, payload) FROM pg_catalog.unnest(%s::pg_catalog.text[]) AS payload"
# sql/schema_1.sql explains these two. The types are exactly those of the functions, so no other function fits better.
_PUBLISH = "SELECT flask_pg_sse.publish_v1(%s::pg_catalog.text, %s::pg_catalog.json[], %s::pg_catalog.text[])"
_ENQUEUE = (
    "SELECT flask_pg_sse.enqueue_v1("
    "CAST({} AS pg_catalog.text), CAST({} AS pg_catalog.json[]), CAST({} AS pg_catalog.text[]))"
)
# As text, which every driver reads in the same way.
_HEAD = f"SELECT CAST(({HEAD}) AS pg_catalog.text)"


def to_notify(name: str, payloads: Sequence[str]) -> tuple[str, Sequence[Any]]:
    """Return the query that sends all payloads to PostgreSQL's channel `name`."""
    return _NOTIFY, (name, list(payloads))


def to_log(log: Installation, channel: str, rows: Sequence[Row]) -> tuple[str, Sequence[Any]]:
    """Return the query that writes events to the log and sends them. It returns the last event's id."""
    fields, data = zip(*rows, strict=True)
    return log.guarded(_PUBLISH), (channel, list(fields), list(data))


@contextlib.contextmanager
def _unconfirmed() -> Iterator[None]:
    """Say it if an error leaves open whether PostgreSQL has committed the events, or will."""
    try:
        yield
    except Unanswered as error:
        raise DatabaseUnavailable(
            f"{error} The commit is not confirmed, so the event may still come. (A commit may wait for a synchronous "
            "standby, or the connection was lost.)"
        ) from error.__cause__


class OwnConnection:
    """Sends at once, on the connections of a pool. All methods raise `DatabaseUnavailable`."""

    def __init__(self, pool: Pool) -> None:
        self.execute = pool.execute
        self.in_transaction = pool.in_transaction

    def notify(self, name: str, payloads: Sequence[str]) -> None:
        """Send all payloads to PostgreSQL's channel `name`, in one transaction."""
        with _unconfirmed():
            self.execute(*to_notify(name, payloads))

    def log(self, log: Installation, channel: str, rows: Sequence[Row]) -> int | None:
        """Write events to the log and send them, in one transaction. Return the last event's id."""
        with _unconfirmed():
            [(log_id,)] = self.execute(*to_log(log, channel, rows), more=len(rows) / _ROWS_A_SECOND)
        return int(log_id)


class CallersConnection:
    """Works in the transaction of a caller's connection. Events leave at its commit, and never after a rollback."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, query: str) -> list[Any]:
        """Run a query, and return its rows."""
        return read_on(self._connection, query)

    def notify(self, name: str, payloads: Sequence[str]) -> None:
        """Send all payloads to PostgreSQL's channel `name`."""
        for payload in payloads:
            send_on(self._connection, "SELECT pg_catalog.pg_notify({}, {})", (name, payload))

    def log(self, log: Installation, channel: str, rows: Sequence[Row]) -> int | None:
        """Write events to the log. Return None, because they get their ids only at the commit.

        `log.check` comes just before this, in a statement of its own: a guard in the same one would come too late,
        because PostgreSQL may run a function while it plans the statement. Not one message with both, because some
        drivers send only one statement at once.
        """
        fields, data = zip(*rows, strict=True)
        send_on(self._connection, _ENQUEUE, (channel, list(fields), list(data)))
        return None

    def head(self) -> int:
        """Return the id up to which every event in the log can be read here. `log.check` comes just before this."""
        [(head,)] = self.execute(_HEAD)
        return int(head)
