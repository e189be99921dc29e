"""Sending, through the event log or by NOTIFY alone: on the package's own connections, or in a caller's transaction.

https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import psycopg2.extensions

from .pool import Pool

# An event as it stands in the log: fields as JSON, and data.
Row = tuple[str, str | None]

# One statement, hence one transaction and one round-trip for many. A function scan keeps the array's order.
_NOTIFY = "SELECT pg_catalog.pg_notify(%s, payload) FROM pg_catalog.unnest(%s::text[]) AS payload"
# sql/schema_1.sql explains these two.
_PUBLISH = "SELECT flask_pg_sse.publish_v1(%s, %s::json[], %s::text[])"
_ENQUEUE = "SELECT flask_pg_sse.enqueue_v1({}, CAST({} AS json[]), CAST({} AS text[]))"


class Publisher:
    """Sends on connections of its own."""

    def __init__(self, pool: Pool) -> None:
        self.execute = pool.execute

    def send(self, name: str, payloads: Sequence[str]) -> None:
        """Notify PostgreSQL's channel `name` of all payloads, in one transaction. Raises `DatabaseUnavailable`."""
        self.execute(_NOTIFY, (name, list(payloads)))

    def log(self, channel: str, rows: Sequence[Row]) -> int:
        """Write events to the log and send them, in one transaction; return the id of the last."""
        fields, data = zip(*rows, strict=True)
        [(log_id,)] = self.execute(_PUBLISH, (channel, list(fields), list(data)))
        return int(log_id)


def check_caller(connection: Any) -> None:
    """Raise TypeError, with the way, for what `send_in_transaction()` cannot use: asynchronous connections, others."""
    if _is_sqlalchemy(connection):
        return
    kind = _kind(connection)
    if kind.startswith("sqlalchemy.ext.asyncio"):
        raise TypeError(
            f"notify() cannot use an asynchronous {kind}. Call it with the synchronous session inside: "
            'await session.run_sync(lambda s: notify("orders", data, connection=s)).'
        )
    methods = [getattr(connection, name, None) for name in ("cursor", "execute", "commit")]
    if getattr(connection, "async_", 0) or any(map(inspect.iscoroutinefunction, methods)):
        raise TypeError(f"notify() cannot use an asynchronous {kind}; give it a synchronous connection.")
    if not callable(methods[0]) or not callable(methods[2]):
        raise TypeError(
            f"notify(connection=…) takes a psycopg2 or psycopg 3 connection, or an SQLAlchemy Connection, Session or "
            f"scoped_session (db.session), not {kind}."
        )


def send_in_transaction(connection: Any, name: str, payloads: Sequence[str]) -> None:
    """Notify within the transaction of the caller's connection: sent on commit, never after a rollback.

    `connection` is a psycopg2 or psycopg 3 connection, or an SQLAlchemy `Connection`, `Session` or `scoped_session`;
    all are used through their own `execute`. Raises TypeError where the database is none of PostgreSQL's.
    """
    for payload in payloads:
        execute_on(connection, "SELECT pg_catalog.pg_notify({}, {})", (name, payload))


def log_in_transaction(connection: Any, channel: str, rows: Sequence[Row]) -> None:
    """Write events to the log within the transaction of the caller's connection, and have them sent on commit."""
    fields, data = zip(*rows, strict=True)
    execute_on(connection, _ENQUEUE, (channel, list(fields), list(data)))


def execute_on(connection: Any, query: str, args: Sequence[Any] = ()) -> list[Any]:
    """Run a query on a caller's connection, through its own `execute`; return its rows. `{}` stands for an argument."""
    if _is_sqlalchemy(connection):
        _refuse_other_engine((connection.get_bind() if hasattr(connection, "get_bind") else connection).dialect.name)
        text = sys.modules["sqlalchemy"].text(query.format(*(f":arg{number}" for number in range(len(args)))))
        result = connection.execute(text, {f"arg{number}": arg for number, arg in enumerate(args)})
        return list(result.fetchall()) if result.returns_rows else []
    _refuse_other_engine("sqlite" if _kind(connection).startswith("sqlite3.") else "postgresql")
    # Rows as tuples, whatever kind the caller likes.
    if isinstance(connection, psycopg2.extensions.connection):
        options: dict[str, Any] = {"cursor_factory": psycopg2.extensions.cursor}
    else:
        options = {"row_factory": sys.modules["psycopg.rows"].tuple_row} if "psycopg.rows" in sys.modules else {}
    with connection.cursor(**options) as cursor:
        cursor.execute(query.format(*["%s"] * len(args)), tuple(args))
        return list(cursor.fetchall())


def _is_sqlalchemy(connection: Any) -> bool:
    orm = sys.modules.get("sqlalchemy.orm")
    engine = sys.modules.get("sqlalchemy.engine")
    return (orm is not None and isinstance(connection, orm.Session | orm.scoped_session)) or (
        engine is not None and isinstance(connection, engine.Connection)
    )


def _kind(connection: Any) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refuse_other_engine(engine: str) -> None:
    if engine != "postgresql":
        raise TypeError(
            f"notify(connection=…) needs a PostgreSQL connection, and this one is of {engine}. In tests without "
            "PostgreSQL use flask_pg_sse.testing.capture(app)."
        )
