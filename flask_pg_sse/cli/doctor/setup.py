"""What the checks look at: one app, its configuration and its database, on connections of the doctor's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from flask import Flask

from ...engine.postgres.connect import connect, execute
from ...engine.postgres.dsn import Dsn
from ...engine.postgres.installation import Installation, NotUsable, look_up
from ...errors import ConfigurationError, DatabaseUnavailable, PgSSEError
from ...settings import Settings
from ...web.state import State, state_of
from ..status import look

# Seconds in which a host must accept a connection, and a statement must be answered.
_CONNECT_WITHIN = 4
ANSWER_WITHIN = 4.0
# Seconds that a heartbeat may take to come through.
_A_LITTLE = 5.0
# The longest in seconds that a quiet stream is watched, unless the user asks for more.
_LONGEST = 60.0

Rows = Sequence[Sequence[Any]]


class NotLookedAt(Exception):
    """What the check needs is not there. An earlier check has said so."""


class Setup:
    """One app, as it is configured here.

    `url` is where its site is reached. `direct` are the addresses of the hops behind that, the app's own last.
    `seconds` is how long to watch a quiet stream; by default a little longer than a heartbeat takes.
    """

    def __init__(
        self, app: Flask, *, url: str | None = None, direct: Sequence[str] = (), seconds: float | None = None
    ) -> None:
        self.app = app
        self.url = url
        self.direct = direct
        self._seconds = seconds
        self.usable: bool | None = None  # the database: reached, and a primary; None before it was tried
        self.servers: Sequence[Any] | None = None  # what web_server.py has found
        self.unread: list[str] = []  # the gunicorns whose configuration cannot be read
        self.untold: list[str] = []  # those whose arguments cannot be seen
        self.examined: Any = None  # what event_log.py has found
        self.trial: Any = None  # the stream of proxy.py
        self._connection: Any = None

    @property
    def state(self) -> State:
        return state_of(self.app)

    @property
    def settings(self) -> Settings:
        """The app's settings. Raises `NotLookedAt` if they cannot be read: the first check says so."""
        try:
            return self.state.runtime.settings
        except ConfigurationError:
            raise NotLookedAt from None

    @functools.cached_property
    def workers(self) -> Sequence[Mapping[str, Any]]:
        """The workers of this host that serve this app, as `flask sse status` knows them, with their channels."""
        try:
            return look(self.state.runtime.app_id(), names=True)
        except (PgSSEError, click.ClickException):
            return []

    @property
    def seconds(self) -> float:
        if self._seconds is not None:
            return self._seconds
        try:
            return min(self.settings.heartbeat + _A_LITTLE, _LONGEST)
        except NotLookedAt:
            return _A_LITTLE

    @property
    def uses_postgres(self) -> bool:
        return self.state.runtime.redis is None and self.settings.broker_url is None

    @functools.cached_property
    def databases(self) -> tuple[Dsn, Dsn | None]:
        """The database to notify, and the one to listen to, None for the log of the first. Raises PgSSEErrors."""
        dsn, listen = self.state.runtime.databases()
        return _impatient(dsn), listen and (_impatient(listen) if listen != dsn else _impatient(dsn))

    def connect(self, dsn: Dsn | None = None) -> contextlib.AbstractContextManager[Any]:
        """Open a connection, to the app's database if no other is given. Raises `DatabaseUnavailable`."""
        return _closing(dsn or self.database)

    @property
    def database(self) -> Dsn:
        """The app's database. Raises `NotLookedAt` if an earlier check could not use it."""
        if self.usable is False or not self.uses_postgres:
            raise NotLookedAt
        return self.databases[0]

    def execute(
        self, query: str, args: Sequence[Any] = (), *, timeout: float = ANSWER_WITHIN, patience: float | None = None
    ) -> Rows:
        """Run a query on the app's database. Raises `NotLookedAt`, psycopg2's errors and `DatabaseUnavailable`."""
        if self._connection is None:
            self._connection = connect(self.database, "flask_pg_sse doctor")
        connection = self._connection
        try:
            return execute(connection, query, tuple(args), timeout=timeout, patience=patience)
        except BaseException:
            self.forget_connection()
            connection.close()
            raise

    @property
    def connection(self) -> Any:
        """The connection of `execute()`."""
        self.execute("SELECT")
        return self._connection

    def forget_connection(self) -> None:
        """Open another connection for the next query: a check that ran out of time may still use this one."""
        self._connection = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def log(self) -> Installation | None:
        """Return the event log of the database, or None. Raises `installation.NotUsable`, and as `execute()`."""
        return look_up(lambda query: self.execute(query), self.settings.log_owner)

    @functools.cached_property
    def usable_log(self) -> Installation:
        """The event log that the app uses. Raises `NotLookedAt` if there is none, and as `execute()`."""
        try:
            log = None if self.settings.event_log is False else self.log()
        except NotUsable:
            log = None
        if log is None:
            raise NotLookedAt
        return log


@contextmanager
def _closing(dsn: Dsn) -> Iterator[Any]:
    connection = connect(dsn, "flask_pg_sse doctor")
    try:
        yield connection
    except TimeoutError as error:
        raise DatabaseUnavailable(f"PostgreSQL does not answer ({dsn}): {error}.") from error
    finally:
        connection.close()


def _impatient(dsn: Dsn) -> Dsn:
    """Return the address with a shorter time for each host, unless the app's own is shorter or comes from a "
    "function."""
    if dsn.ask is not None:
        return dsn
    dsn = dsn.current()
    own = dsn.params.get("connect_timeout", "")
    seconds = int(own) if own.isdigit() and 0 < int(own) < _CONNECT_WITHIN else _CONNECT_WITHIN
    return dataclasses.replace(dsn, params={**dsn.params, "connect_timeout": str(seconds)})


Check = Callable[[Setup], Any]
