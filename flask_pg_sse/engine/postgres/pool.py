"""A few connections of the package's own, in autocommit mode, for statements that stand by themselves."""

from __future__ import annotations

import re
import select
import threading
import time
from collections.abc import Sequence
from typing import Any

import psycopg2

from ...errors import DatabaseUnavailable
from .connect import connect, execute
from .dsn import Dsn

# Seconds for a free connection, and for the statement.
TIMEOUT = 10.0
# The error of a connection on which the server has said why it ends the session, so that nothing was committed: libpq
# puts the severity (FATAL, in the server's language) and two spaces before it. What it says by itself has neither.
_SERVER_ENDED_IT = re.compile(r"\S+:  ")


class Pool:
    """At most `size` connections, opened as they are needed.

    For `down_for` seconds after a failed attempt to connect the next callers are told the same: where many wait for the
    database, they need not all find out.
    """

    def __init__(self, dsn: Dsn, name: str, size: int, *, down_for: float = 0.0) -> None:
        self._dsn = dsn
        self._name = name
        self._size = size
        self._idle: list[Any] = []
        self._free = threading.BoundedSemaphore(size)
        self._closed = False
        self._down_for = down_for
        self._down_until = 0.0
        self._down = ""

    def execute(self, query: str, args: Sequence[Any] = (), *, limit: float | None = None) -> list[Any]:
        """Run one statement, and return its rows. `limit` as in `connect.execute()`.

        Raises `DatabaseUnavailable`; its `__cause__` is what psycopg2 raised. A connection that the server has closed
        since its last use is replaced. Of one that breaks without a word nobody knows whether the statement has been
        executed: it is not sent again.
        """
        if not self._free.acquire(timeout=TIMEOUT):
            raise DatabaseUnavailable(
                f"{self._name} found all {self._size} connections busy for {TIMEOUT:.0f} s: PostgreSQL answers too "
                "slowly."
            )
        try:
            return self._execute(query, tuple(args), limit)
        finally:
            self._free.release()

    def _execute(self, query: str, args: tuple[Any, ...], limit: float | None) -> list[Any]:
        while True:
            connection = self._checkout()
            used_before = connection is not None
            if connection is None:
                connection = self._connect()
            try:
                rows = execute(connection, query, args, timeout=TIMEOUT, limit=limit)
            except BaseException as error:
                broken = bool(connection.closed)
                connection.close()
                # Between our look and our call.
                if used_before and broken and _SERVER_ENDED_IT.match(str(error)):
                    continue
                if isinstance(error, psycopg2.Error | TimeoutError):
                    reason = " ".join(str(error).split())
                    raise DatabaseUnavailable(f"PostgreSQL did not do what {self._name} asked: {reason}") from error
                raise
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)
            return rows

    def _connect(self) -> Any:
        if time.monotonic() < self._down_until:
            raise DatabaseUnavailable(self._down)
        try:
            return connect(self._dsn, f"flask_pg_sse {self._name}")
        except DatabaseUnavailable as error:
            self._down, self._down_until = str(error), time.monotonic() + self._down_for
            raise

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
    """Tell whether an idle connection is still good. What comes unasked is the server's farewell, hardly ever more."""
    try:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        return not connection.closed and not poller.poll(0)
    except (psycopg2.Error, OSError):
        return False
