"""Sending: pg_notify() on the package's own connections, or in the transaction of a connection that the caller gives.

https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import inspect
import select
import sys
import threading
from collections.abc import Sequence
from typing import Any

import psycopg2

from ..errors import DatabaseUnavailable
from .connect import connect, execute
from .dsn import Dsn

# Connections of the package's own. A notify takes about a millisecond, so a few serve a whole worker.
POOL_SIZE = 4
# Seconds for a free connection, and for the statement.
_TIMEOUT = 10.0

# One statement, hence one transaction and one round-trip for many. A function scan keeps the array's order.
_NOTIFY = "SELECT pg_catalog.pg_notify(%s, payload) FROM pg_catalog.unnest(%s::text[]) AS payload"


class Publisher:
    """A small pool of autocommit connections."""

    def __init__(self, dsn: Dsn) -> None:
        self._dsn = dsn
        self._idle: list[Any] = []
        self._free = threading.BoundedSemaphore(POOL_SIZE)
        self._closed = False

    def send(self, name: str, payloads: Sequence[str]) -> None:
        """Notify PostgreSQL's channel `name` of all payloads, in one transaction.

        Raises `DatabaseUnavailable`. A connection that the server has closed since its last use is replaced.
        """
        if not self._free.acquire(timeout=_TIMEOUT):
            raise DatabaseUnavailable(
                f"notify() found all {POOL_SIZE} connections busy for {_TIMEOUT:.0f} s: PostgreSQL answers too slowly."
            )
        try:
            self._send(name, payloads)
        finally:
            self._free.release()

    def _send(self, name: str, payloads: Sequence[str]) -> None:
        while True:
            connection = self._checkout()
            used_before = connection is not None
            if connection is None:
                connection = connect(self._dsn, "flask_pg_sse notify")
            try:
                execute(connection, _NOTIFY, (name, list(payloads)), timeout=_TIMEOUT)
            except BaseException as error:
                broken = bool(connection.closed)
                connection.close()
                # Ended between our look and our call: nothing was executed, or the server was just being stopped.
                if broken and used_before and isinstance(error, psycopg2.Error):
                    continue
                if isinstance(error, psycopg2.Error | TimeoutError):
                    reason = " ".join(str(error).split())
                    raise DatabaseUnavailable(f"PostgreSQL did not take the notification: {reason}") from error
                raise
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)
            return

    def _checkout(self) -> Any:
        """Return an idle connection that still stands, or None."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if _stands(connection):
                return connection
            connection.close()
        return None

    def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _stands(connection: Any) -> bool:
    """Tell whether an idle connection is still good. The server's farewell makes it readable."""
    try:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        while poller.poll(0):
            connection.poll()  # the first after the end succeeds, the second raises
    except (psycopg2.Error, OSError):
        return False
    return not connection.closed


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
    if _is_sqlalchemy(connection):
        _refuse_other_engine((connection.get_bind() if hasattr(connection, "get_bind") else connection).dialect.name)
        query = sys.modules["sqlalchemy"].text("SELECT pg_catalog.pg_notify(:name, :payload)")
        for payload in payloads:
            connection.execute(query, {"name": name, "payload": payload})
        return
    _refuse_other_engine("sqlite" if _kind(connection).startswith("sqlite3.") else "postgresql")
    with connection.cursor() as cursor:
        for payload in payloads:
            cursor.execute("SELECT pg_catalog.pg_notify(%s, %s)", (name, payload))


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
