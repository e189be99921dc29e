"""A small pool of the package's own connections, in autocommit mode, for single statements."""

from __future__ import annotations

import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2

from ...errors import DatabaseUnavailable
from .connect import connect, execute
from .dsn import Dsn

# Seconds to wait for a free connection, and again for the statement.
TIMEOUT = 10.0
# The error of a connection whose session the server ended with a message. Then nothing was committed. libpq puts the
# severity (FATAL, in the server's language) and two spaces before such a message. Its own errors have no such prefix.
_SERVER_ENDED_IT = re.compile(r"\S+:  ")


class Pool:
    """At most `size` connections, opened when they are needed.

    For `down_for` seconds after a failed attempt to connect, other callers get the same error at once. So when many
    callers wait for the database, not each of them waits for its own attempt.
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
        """Run one statement and return its rows. `limit` is that of `connect.execute()`, in seconds.

        Raises `DatabaseUnavailable`, whose `__cause__` is the error of psycopg2. If the server has closed a connection
        since its last use, the statement runs on another one. If a connection breaks without a message from the server,
        the statement may have been executed, so it is not sent again.
        """

        def run(connection: Any) -> list[Any]:
            return execute(connection, query, tuple(args), timeout=TIMEOUT, limit=limit)

        return self._run(run)

    def in_transaction(self, query: Callable[[int], tuple[str, Sequence[Any]]]) -> None:
        """Run in one transaction the query, with arguments, that `query()` makes of the transaction's number.

        Raises as `execute()`.
        """

        def run(connection: Any) -> list[Any]:
            [(number,)] = execute(connection, "BEGIN; SELECT pg_catalog.txid_current()", timeout=TIMEOUT)
            text, args = query(number)
            return execute(connection, f"{text}; COMMIT", tuple(args), timeout=TIMEOUT)

        self._run(run)

    def _run(self, statements: Callable[[Any], list[Any]]) -> list[Any]:
        if not self._free.acquire(timeout=TIMEOUT):
            raise DatabaseUnavailable(
                f"All {self._size} connections for {self._name} were busy for {TIMEOUT:.0f} s: PostgreSQL answers too "
                "slowly."
            )
        try:
            return self._run_on_one(statements)
        finally:
            self._free.release()

    def _run_on_one(self, statements: Callable[[Any], list[Any]]) -> list[Any]:
        while True:
            connection = self._checkout()
            used_before = connection is not None
            if connection is None:
                connection = self._connect()
            try:
                rows = statements(connection)
            except BaseException as error:
                broken = bool(connection.closed)
                connection.close()
                # The server ended the session between _works() and execute().
                if used_before and broken and _SERVER_ENDED_IT.match(str(error)):
                    continue
                if isinstance(error, psycopg2.Error | TimeoutError):
                    reason = " ".join(str(error).split())
                    raise DatabaseUnavailable(f"PostgreSQL's statement for {self._name} failed: {reason}") from error
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
        """Return an idle connection that still works, or None."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if _works(connection):
                return connection
            connection.close()
        return None

    def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _works(connection: Any) -> bool:
    """Tell whether an idle connection still works.

    It does not if there is something to read: that is nearly always the server's message that it ends the session.
    """
    try:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        return not connection.closed and not poller.poll(0)
    except (psycopg2.Error, OSError):
        return False
