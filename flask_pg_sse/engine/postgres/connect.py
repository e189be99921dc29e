"""Open the package's own connections: asynchronous psycopg2. Only `connect()` and `wait()` wait for them.

A psycopg2 connection with `async_=1` never blocks; `wait()` drives it with poll(). Under gevent only the calling
greenlet waits. psycopg2's wait callback is not used: it is set for the whole process, breaks the app's own COPY and
large objects, and ignores `connect_timeout`. https://www.psycopg.org/docs/advanced.html#asynchronous-support
"""

from __future__ import annotations

import ipaddress
import os
import random
import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, make_dsn

from ...concurrency.forks import close_in_children
from ...concurrency.greenlets import hub_here, original, poll
from ...errors import DatabaseUnavailable
from ...repeats import one_line, sentence
from ..drivers import Psycopg2Cursor, use_own_typecasters
from . import foreign
from .dsn import Dsn

# Seconds that one host may take to answer, unless the URL has a connect_timeout.
CONNECT_TIMEOUT = 10.0
# The part of a statement's time that it may wait for a lock: less, because that error can name who holds the lock.
PART_FOR_LOCKS = 0.8
# Seconds that a host has for itself before the next host is tried beside it. A host that loses all packets then costs
# this much, and not its whole time.
_HEAD_START = 1.0
# A server or a network that vanishes silently is noticed within these times. A URL may have others.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-KEEPALIVES-IDLE
_DEFAULTS = {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

STANDBY = (
    "The PostgreSQL server at {0.host}:{0.port} is a standby. Sending and listening need the primary: set "
    "SSE_DATABASE_URL (and SSE_LISTEN_URL, if you use it) to the primary's URL, or name all servers in it, with "
    "?target_session_attrs=primary."
)
_STANDBY_OF_SEVERAL = (
    "The PostgreSQL server at {0.host}:{0.port} is a standby. Sending and listening need the primary, and {1} names "
    "several hosts without saying which one is wanted: add ?target_session_attrs=primary to it."
)


def connect(dsn: Dsn, application_name: str) -> Any:
    """Return a new connection in autocommit mode, with client encoding UTF-8.

    The hosts are tried in order, and one that is slow does not hold up the next. Each may be silent for
    `connect_timeout` seconds (10 by default). Raises `DatabaseUnavailable` if none answers.
    """
    return _connect(dsn, application_name, "UTF8", psycopg2.extensions.connection)


def connect_to_listen(dsn: Dsn, application_name: str) -> Any:
    """Return a connection as `connect()` does, for LISTEN; in a database that is not UTF-8 a `ForeignConnection`."""
    connection = connect(dsn, application_name)
    if not foreign.is_foreign(connection):
        return connection
    connection.close()
    connection = _connect(dsn, application_name, foreign.UNCONVERTED, foreign.ForeignConnection)
    foreign.prepare(connection)
    return connection


def _connect(dsn: Dsn, application_name: str, client_encoding: str, kind: Any) -> Any:
    dsn = dsn.current()
    params = {"application_name": application_name, **_DEFAULTS, **dsn.params, "client_encoding": client_encoding}
    timeout = _timeout(params.pop("connect_timeout", ""))
    race = _Race(timeout, kind)
    try:
        connection = race.first(_attempts(params, race.errors))
    finally:  # also when, for example, the greenlet is killed while it waits
        race.close()
    if connection is not None:
        if "," in params.get("host", "") and "target_session_attrs" not in params:
            _refuse_standby(connection, dsn)
        use_own_typecasters(connection)
        return connection
    why = sentence("; ".join(dict.fromkeys(race.errors)))
    raise DatabaseUnavailable(
        f"PostgreSQL cannot be reached ({dsn}): {why} Check that it runs, and that {dsn.source} is right."
    )


def _refuse_standby(connection: Any, dsn: Dsn) -> None:
    """Raise `DatabaseUnavailable` if libpq took a standby because no kind of server was asked for."""
    if connection.info.parameter_status("in_hot_standby") == "on":
        text = _STANDBY_OF_SEVERAL.format(connection.info, dsn.source)
        connection.close()
        raise DatabaseUnavailable(text)


class _Race:
    """Attempts to connect, each with a head start over the next. The first that succeeds wins."""

    def __init__(self, timeout: float, kind: Any) -> None:
        self.errors: list[str] = []
        self._kind = kind
        self._timeout = timeout
        self._running: dict[Any, tuple[int, float]] = {}  # what each waits for, and until when

    def first(self, attempts: Iterator[dict[str, str]]) -> Any:
        """Return the first connection that succeeds, or None. Each attempt is libpq's parameters for one server."""
        following = next(attempts, None)
        start_at = 0.0
        while following is not None or self._running:
            now = time.monotonic()
            if following is not None and (now >= start_at or not self._running):
                self._start(following)
                following, start_at = next(attempts, None), now + _HEAD_START
            deadlines = [deadline for _, deadline in self._running.values()]
            failed = len(self.errors)
            winner = self._step(min([*deadlines, start_at] if following is not None else deadlines, default=now))
            if winner is not None:
                return winner
            if len(self.errors) > failed:  # the next one need not wait any longer
                start_at = 0.0
        return None

    def _start(self, params: dict[str, str]) -> None:
        try:
            # The class itself, because apps and agents replace psycopg2.connect().
            connection = self._kind(make_dsn(**params), async_=1)
        except psycopg2.Error as error:
            self.errors.append(_reason(error, None))
            return
        close_in_children(connection)
        self._running[connection] = (connection.poll(), time.monotonic() + self._timeout)

    def _step(self, until: float) -> Any:
        """Wait until one of the connections can go on, or until a time. Return one that is complete, or None."""
        poller = poll()  # not select(): it cannot take a descriptor above 1023
        by_number = {}
        for connection, (state, _) in self._running.items():
            by_number[connection.fileno()] = connection
            poller.register(connection.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        ready = {by_number[number] for number, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000)}
        now = time.monotonic()
        for connection, (_, deadline) in list(self._running.items()):
            try:
                if connection in ready:
                    state = connection.poll()
                    self._running[connection] = (state, now + self._timeout)
                    if state == POLL_OK:
                        del self._running[connection]
                        return connection
                elif now >= deadline:
                    raise TimeoutError("no answer in time")
            except (psycopg2.Error, OSError, UnicodeDecodeError) as error:
                self.errors.append(_reason(error, connection))
                del self._running[connection]
                connection.close()
        return None

    def close(self) -> None:
        """Give up the attempts that have not won."""
        for connection in self._running:
            connection.close()
        self._running.clear()


def _reason(error: Exception, connection: Any) -> str:
    # A server that refuses before it knows our encoding may use another one. Then `error` is a UnicodeDecodeError or,
    # with some Python versions, an OperationalError without a text. The connection has the text in any case.
    said = "" if connection is None else connection.info.error_message
    return one_line(said or error)


def _timeout(text: str) -> float:
    """Return a connect_timeout in seconds, or our default.

    The default replaces 0 or less, which means "forever" in libpq, and text that is not a number.
    """
    try:
        return float(max(int(text), 0)) or CONNECT_TIMEOUT
    except ValueError:
        return CONNECT_TIMEOUT


def wait(connection: Any, timeout: float) -> None:
    """Wait until `connection` has finished its operation.

    Raises TimeoutError when the connection makes no progress for `timeout` seconds.
    """
    while (state := connection.poll()) != POLL_OK:
        poller = poll()  # not select(): it cannot take a descriptor above 1023
        poller.register(connection.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        if not poller.poll(timeout * 1000):
            raise TimeoutError("no answer in time")


def ask_for_an_answer(connection: Any, timeout: float) -> None:
    """Send the cheapest query. Raises TimeoutError if the server is silent for `timeout` seconds."""
    with connection.cursor(cursor_factory=Psycopg2Cursor) as cursor:
        cursor.execute("SELECT")
        wait(connection, timeout)


def is_direct(connection: Any, timeout: float) -> bool:
    """Ask whether PostgreSQL itself is at the other end, and no pooler: poolers make the number of a backend up."""
    with connection.cursor(cursor_factory=Psycopg2Cursor) as cursor:
        cursor.execute("SELECT pg_catalog.pg_backend_pid()")
        wait(connection, timeout)
        return bool(cursor.fetchone() == (connection.info.backend_pid,))


def is_read_only(connection: Any) -> bool:
    """Tell whether transactions are read-only by default. PostgreSQL reports a change with its next answer."""
    return bool(connection.info.parameter_status("default_transaction_read_only") == "on")


def execute(
    connection: Any,
    query: str,
    args: tuple[Any, ...] | None = None,
    *,
    timeout: float,
    limit: float | None = None,
    patience: float | None = None,
) -> list[Any]:
    """Run a query and return its rows. Close the connection after an error, because the query may still be running.

    `timeout` is how many seconds the server may be silent. `limit` is how many seconds the statement may take in total,
    for long answers; by default it is equal to `timeout`. `patience` is how many seconds it may wait for a lock; by
    default that is 80 % of `timeout`.

    PostgreSQL gets slightly shorter timeouts (90 % for the statement), because it would not notice
    that this client has given up. Statements that wait for a lock would pile up there until no connection is left, and
    would then publish events whose senders got an error. The lock's is the shorter one, because its error can name who
    holds the lock. (A commit with NOTIFY waits for a lock too; it is the same one for all databases.) The
    transaction is READ COMMITTED. If the database's default is SERIALIZABLE, our reads would make publishers fail. The
    transaction is READ WRITE, whatever the role's default. On a standby that raises `DatabaseUnavailable`, with the
    remedy.

    Names are looked up in pg_catalog alone, whatever the role's search_path: other schemas may have functions and
    operators of other roles.

    The settings and the query are sent together and form one transaction. The settings end with it, also through a
    pooler.
    """
    for_lock, in_all = patience or timeout * PART_FOR_LOCKS, (limit or timeout) * 0.9
    settings = (
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE; "
        f"SET LOCAL lock_timeout = {for_lock * 1000:.0f}; SET LOCAL statement_timeout = {in_all * 1000:.0f}; "
        "SET LOCAL search_path = pg_catalog, pg_temp; "
    )
    kind = Psycopg2Cursor
    if isinstance(connection, foreign.ForeignConnection):
        kind, settings = foreign.ForeignCursor, settings + foreign.SETTINGS
    with connection.cursor(cursor_factory=kind) as cursor:
        cursor.execute(settings + query, args)
        try:
            wait(connection, timeout)
        except (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ReadOnlySqlTransaction) as error:
            if _is_standby(connection, timeout):
                raise DatabaseUnavailable(STANDBY.format(connection.info)) from error
            raise
        return list(cursor.fetchall()) if cursor.description else []


def _is_standby(connection: Any, timeout: float) -> bool:
    """Tell whether the server is a standby, after an error, by a question that every server answers."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.pg_is_in_recovery()")
        wait(connection, timeout)
        return bool(cursor.fetchall()[0][0])


def _attempts(params: Mapping[str, str], errors: list[str]) -> Iterator[dict[str, str]]:
    """Yield connection parameters for one server address after another. Add an error for each name that has none.

    libpq can try a list of hosts too. But it resolves names with a call that stops all greenlets, and with `async_` it
    never leaves a host that does not answer.
    """
    servers = list(_servers(params, errors))
    if params.get("load_balance_hosts") == "random":
        random.shuffle(servers)
    wanted = params.get("target_session_attrs")
    for target in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
        for server in servers:
            attempt = {**params, **server}
            attempt.pop("load_balance_hosts", None)
            if target is not None:
                attempt["target_session_attrs"] = target
            yield attempt


def _servers(params: Mapping[str, str], errors: list[str]) -> Iterator[dict[str, str]]:
    host = params.get("host") or os.environ.get("PGHOST") or ""
    if params.get("hostaddr") or not host:
        yield {}
        return
    hosts = host.split(",")
    ports = (params.get("port") or os.environ.get("PGPORT") or "5432").split(",")
    for index, name in enumerate(hosts):
        server = {"host": name, "port": ports[index if len(ports) == len(hosts) else 0] or "5432"}
        if not name or name.startswith(("/", "@")):  # a Unix socket
            yield server
            continue
        try:
            addresses = _resolve(name)
        except (OSError, UnicodeError) as error:
            errors.append(f"the host name {name!r} cannot be resolved ({error})")
            continue
        yield from ({**server, "hostaddr": address} for address in addresses)


def _resolve(host: str) -> list[str]:
    """Return the addresses of a host. It uses the `socket` module at call time, which gevent may have patched."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        resolve = socket.getaddrinfo if hub_here() is not None else original("socket", "getaddrinfo")
        found = resolve(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
