"""The PostgreSQL that the app sends to and listens to: reached, writable, the same one each time, and on time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psycopg2
from psycopg2.extensions import quote_ident

from ...engine.postgres import connect, watch
from ...engine.postgres.dsn import Dsn
from ...engine.postgres.identity import Server, who
from ...engine.postgres.listener import DEAF
from ...engine.postgres.obstacle import END_THE_TRANSACTION, NOT_NOW, look_at_the_queue
from ...errors import DatabaseUnavailable, PgSSEError
from .result import Result, fault, in_two, ok, warning
from .setup import ANSWER_WITHIN, Check, NotLookedAt, Setup

# Connections that are compared, to find an address that leads to several servers.
_LOOKS = 6
# Seconds by which the clocks may differ.
_CLOCK_DIFFERENCE = 2.0
_CLOCK = "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::pg_catalog.float8"
# How full PostgreSQL's queue of notifications may be. Its usual room is 8 GB, so this is 8 MB that some session has not
# read. When it is full, nobody can notify.
_QUEUE_SOME, _QUEUE_MUCH = 0.001, 0.5


def database(setup: Setup) -> Result:
    """PostgreSQL can be reached."""
    if not setup.uses_postgres:
        raise NotLookedAt
    setup.usable = False
    dsn, _ = setup.databases
    with setup.connect(dsn) as connection:
        role, said = connection.info.user, connection.info.parameter_status
        version, encoding = said("server_version"), said("server_encoding")
    setup.usable = True
    text = f"PostgreSQL {version} answers at {dsn} (from {dsn.source}), as role {role}."
    if encoding != "UTF8":
        return warning(
            f"{text} The database's encoding is {encoding}: text that it cannot represent cannot be sent.",
            "Use a database with the encoding UTF8.",
        )
    return ok(text)


def primary(setup: Setup) -> Result:
    """The server takes writes, and so do the role's transactions."""
    try:
        connection = setup.connection
    except DatabaseUnavailable:  # a standby: every later check would say the same
        setup.usable = False
        raise
    if connect.is_read_only(connection):
        role = connection.info.user
        return warning(
            f"Transactions of role {role} are read-only by default. flask_pg_sse asks for writable ones itself, "
            "but notify(…, connection=…) in a transaction of the app's fails.",
            f"ALTER ROLE {quote_ident(role, connection)} RESET default_transaction_read_only; or the same with ALTER "
            "DATABASE.",
        )
    return ok("It is a primary, and transactions are writable.")


def address(setup: Setup) -> Iterator[Result]:
    """The address leads to one server each time, and that for LISTEN to the same one."""
    dsn, listen = setup.database, setup.databases[1]
    try:
        servers = dict.fromkeys(_server(setup, dsn) for _ in range(_LOOKS))
    except psycopg2.errors.InsufficientPrivilege:
        return
    heard = None
    with contextlib.suppress(PgSSEError):  # the next check says it
        heard = None if listen is None or listen == dsn else _server(setup, listen)
    if len(servers) > 1:
        yield fault(
            f"{dsn} {watch.UNSTEADY}. Events that are sent to one do not arrive from the other.",
            f"Set {dsn.source} to {watch.STEADY}.",
        )
    elif heard is not None and listen is not None and heard not in servers:
        yield fault(*in_two(watch.apart(dsn, next(iter(servers)), listen, heard)))
    else:
        yield ok(f"The address led to one server {_LOOKS} times: {next(iter(servers))}.")


def _server(setup: Setup, dsn: Dsn) -> Server:
    with setup.connect(dsn) as connection:
        return who(lambda query: connect.execute(connection, query, timeout=ANSWER_WITHIN))


def listen(setup: Setup) -> Result | None:
    """What is notified comes back to a connection that LISTENs."""
    _ = setup.database
    dsn = setup.databases[1]
    if dsn is None:
        return None
    with setup.connect(dsn) as connection:
        started = time.monotonic()
        try:
            heard = watch.hears_itself(connection)
        except NOT_NOW:
            raise NotLookedAt from None  # the check of publishing says why
        took = time.monotonic() - started
    if heard:
        return ok(f"A notification came back after {took * 1000:.0f} ms, on a connection of its own.")
    text, remedy = in_two(DEAF)
    try:
        _ = setup.usable_log
    except NotLookedAt:
        return fault(f"{text} Streams are refused.", remedy)
    return warning(
        f"{text} The event log is read once a second instead: events come late, and raw NOTIFYs and events with "
        "durable=False do not come at all.",
        remedy,
    )


def clock(setup: Setup) -> Result:
    """The clocks of this host and of the database agree."""
    _ = setup.connection
    before = time.time()
    [(there,)] = setup.execute(_CLOCK)
    after = time.time()
    ahead = float(there) - (before + after) / 2
    if abs(ahead) - (after - before) / 2 <= _CLOCK_DIFFERENCE:
        return ok(f"The clocks of this host and of the database differ by {abs(ahead):.1f} s.")
    which = "ahead of" if ahead > 0 else "behind"
    return warning(
        f"The database's clock is {abs(ahead):.0f} s {which} this host's. Signed URLs expire too early or too late on "
        "a host whose clock is wrong, and the ages of events are wrong.",
        "Let NTP (chrony, systemd-timesyncd) set the clock of every host.",
    )


def notify_queue(setup: Setup) -> Result:
    """PostgreSQL's queue of notifications has room."""
    queue = look_at_the_queue(lambda query, args: setup.execute(query, args))
    text = f"PostgreSQL's queue of notifications is {queue.usage:.1%} full"
    if queue.usage < _QUEUE_SOME:
        return ok(f"{text}.")
    held = queue.holder or "a session that this role cannot see (GRANT pg_read_all_stats shows it)"
    text += (
        f". It is held up by a session that listens and stays in a transaction, probably {held}. When it is full, "
        "nothing that notifies can commit."
    )
    remedy = END_THE_TRANSACTION[:1].upper() + END_THE_TRANSACTION[1:] + "."
    return warning(text, remedy) if queue.usage < _QUEUE_MUCH else fault(text, remedy)


CHECKS: dict[str, Check] = {
    "database": database,
    "primary": primary,
    "address": address,
    "listen": listen,
    "clock": clock,
    "notify queue": notify_queue,
}
