"""A small pool of the package's own connections, in autocommit mode, for single statements."""

from __future__ import annotations

import contextlib
import re
import select
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2

from ...concurrency.greenlets import poll
from ...errors import DatabaseUnavailable, PermissionDenied
from ...repeats import one_line, sentence
from ..turns import Turns
from .connect import PART_FOR_LOCKS, ask_for_an_answer, connect, execute, is_direct, is_read_only
from .dsn import Dsn

# Seconds to wait for a free connection, and again for the statement.
TIMEOUT = 10.0
# A connection that was used less than these seconds ago works. Any other one is tried first, with a query that may be
# sent again: a NAT or a firewall may have dropped it, and told nobody.
_FRESH = 0.01
# Seconds that it may take to answer that query.
_TRIAL = 2.0
# Seconds after which a connection is replaced: the address may lead to another server by now.
_MOST_AGE = 60.0
# The error of a connection whose session the server ended with a message. Then nothing was committed. libpq puts the
# severity (FATAL, in the server's language) and two spaces before such a message. Its own errors have no such prefix.
# A pooler's message looks the same ("server conn crashed?"), and the statement may have been committed before it.
_SERVER_ENDED_IT = re.compile(r"\S+:  ")


_DENIED = (
    'The database role "{role}" lacks a right: {reason}. Remedy: flask sse init --grant-to {quoted}, run by the '
    "role that installed the event log."
)


class Unanswered(DatabaseUnavailable):
    """A statement has got no answer, and may have been executed all the same."""


class _Pooled:
    """A connection of a pool, with the monotonic times at which it was made and last used."""

    __slots__ = ("connection", "direct", "made_at", "read_only", "used_at")

    def __init__(self, connection: Any, direct: bool) -> None:
        self.connection = connection
        self.direct = direct
        self.made_at = self.used_at = time.monotonic()
        self.read_only = is_read_only(connection)


class Pool:
    """At most `size` connections, opened when they are needed. Callers that wait for one get it in their order.

    For `down_for` seconds after a failed attempt to connect, other callers get the same error at once. So when many
    callers wait for the database, not each of them waits for its own attempt.

    `on_connect` is called with each new connection, and `on_silence` when a connection is found that does not answer.
    """

    def __init__(
        self,
        dsn: Dsn,
        name: str,
        size: int,
        *,
        down_for: float = 0.0,
        on_connect: Callable[[Any], None] = lambda connection: None,
        on_silence: Callable[[], None] = lambda: None,
    ) -> None:
        self._dsn = dsn
        self._name = name
        self._size = size
        self._idle: list[_Pooled] = []
        self._places = Turns(size)
        self._closed = False
        self._down_for = down_for
        self._down_until = 0.0
        self._down = ""
        self._on_connect = on_connect
        self._on_silence = on_silence
        self._suspected_at = float("-inf")  # connections that were last used before that are not used any more

    def execute(
        self, query: str, args: Sequence[Any] = (), *, limit: float | None = None, more: float = 0.0
    ) -> list[Any]:
        """Run one statement and return its rows. `limit` is that of `connect.execute()`, in seconds.

        `more` is how many seconds it may take beyond the usual, apart from waiting for a lock.

        Raises `DatabaseUnavailable`, or `Unanswered` if the statement may have been executed all the same, whose
        `__cause__` is the error of psycopg2. If the server has closed a connection since its last use, the statement
        runs on another one. If a connection breaks without a message from the server, or behind a pooler, the statement
        may have been executed, so it is not sent again.
        """

        def run(connection: Any) -> list[Any]:
            seconds = TIMEOUT + more
            return execute(
                connection, query, tuple(args), timeout=seconds, limit=limit, patience=TIMEOUT * PART_FOR_LOCKS
            )

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
        turn = self._places.ask()
        try:
            if not turn.wait(TIMEOUT):
                raise DatabaseUnavailable(
                    f"All {self._size} connections for {self._name} were busy for {TIMEOUT:.0f} s: PostgreSQL answers "
                    "too slowly."
                )
            return self._run_on_one(statements)
        finally:
            turn.leave()

    def _run_on_one(self, statements: Callable[[Any], list[Any]]) -> list[Any]:
        while True:
            pooled = self._checkout()
            used_before = pooled is not None
            if pooled is None:
                pooled = self._connect()
            connection = pooled.connection
            try:
                rows = statements(connection)
            except BaseException as error:
                broken = bool(connection.closed)
                denied = isinstance(error, psycopg2.errors.InsufficientPrivilege)
                role = connection.info.user if denied else ""
                connection.close()
                if isinstance(error, TimeoutError):
                    self._found_silent()
                # The server ended the session between _checkout() and execute().
                if used_before and broken and pooled.direct and _SERVER_ENDED_IT.match(str(error)):
                    continue
                if denied:
                    raise PermissionDenied(
                        _DENIED.format(role=role, quoted=shlex.quote(role), reason=one_line(error))
                    ) from error
                if isinstance(error, psycopg2.Error | TimeoutError):
                    reason = one_line(error)
                    kind = Unanswered if broken or isinstance(error, TimeoutError) else DatabaseUnavailable
                    raise kind(f"PostgreSQL's statement for {self._name} failed: {sentence(reason)}") from error
                raise
            if self._closed:
                connection.close()
            else:
                pooled.used_at = time.monotonic()
                self._idle.append(pooled)
            return rows

    def _connect(self) -> _Pooled:
        if time.monotonic() < self._down_until:
            raise DatabaseUnavailable(self._down)
        try:
            connection = connect(self._dsn, f"flask_pg_sse {self._name}")
        except DatabaseUnavailable as error:
            self._down, self._down_until = str(error), time.monotonic() + self._down_for
            raise
        try:
            direct = is_direct(connection, TIMEOUT)
            self._on_connect(connection)
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg2.Error | OSError):
                raise DatabaseUnavailable(
                    f"PostgreSQL ended a new connection ({self._dsn}): {sentence(one_line(error))}"
                ) from error
            raise
        return _Pooled(connection, direct)

    def _checkout(self) -> _Pooled | None:
        """Return an idle connection that still works, or None."""
        while self._idle:
            try:
                pooled = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            replacement = self._replacement(pooled)
            if replacement is None and self._works(pooled):
                return pooled
            pooled.connection.close()
            if replacement is not None:
                return replacement
        return None

    def _replacement(self, pooled: _Pooled) -> _Pooled | None:
        """Return a new connection if this one is too old. If there is none to be had, it may stay."""
        if time.monotonic() - pooled.made_at <= _MOST_AGE:
            return None
        with contextlib.suppress(DatabaseUnavailable):
            return self._connect()
        pooled.made_at = time.monotonic()
        return None

    def _works(self, pooled: _Pooled) -> bool:
        """Tell whether an idle connection still works.

        It does not if there is something to read: that is nearly always the server's message that it ends the session.
        """
        connection = pooled.connection
        if pooled.used_at <= self._suspected_at or is_read_only(connection) != pooled.read_only:
            return False
        try:
            poller = poll()
            poller.register(connection.fileno(), select.POLLIN)
            if connection.closed or poller.poll(0):
                return False
            if time.monotonic() - pooled.used_at >= _FRESH:
                ask_for_an_answer(connection, min(_TRIAL, TIMEOUT))
            return True
        except TimeoutError:
            self._found_silent()
            return False
        except (psycopg2.Error, OSError):
            return False

    def _found_silent(self) -> None:
        """Have all connections looked at: what dropped one in silence has probably dropped them all."""
        self.suspect()
        self._on_silence()

    def suspect(self) -> None:
        """Let no connection be used that stands idle now. A new one costs less than to find out whether it works."""
        self._suspected_at = time.monotonic()

    def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for pooled in idle:
            pooled.connection.close()
