"""Install the event log, and decide whether an app uses it: SSE_EVENT_LOG and the database's installation decide it.

A role with CREATE on the database can make a schema with the log's name. Its functions would run with the rights of
the role that calls them. So no function of the schema is called before the catalog has said that the schema and its
functions belong to an owner that is trusted (`schema.trusted()`, or SSE_LOG_OWNER), and that each function runs with
its owner's rights and its own search path. Each later call is sent with a guard: it fails unless the schema is still
the one that was looked at, and its owner is still trusted. Between the guard and the call lies nothing but the
server's own work on one message, and on a caller's connection one round-trip. Within that time a trusted owner would
have to drop the schema, and another role to make one.

Names in these queries, and operators, are written with their schema: an app's search_path may lead elsewhere first.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg2

from ...errors import DatabaseNotConfigured, DatabaseUnavailable, EventLogMissing
from ...repeats import Repeats, times
from .connect import execute
from .pool import Pool
from .schema import SCHEMA, VERSION, schema_sql, trusted

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Runs a query, and returns its rows.
Execute = Callable[[str], Sequence[Sequence[Any]]]
# Seconds until a database without a log is checked again: the log may be installed while the app runs.
_LOOK_AGAIN = 5.0
# Seconds until a log that was found is checked again. The guard needs no such check; it is for the functions' owners.
_CHECK_AGAIN = 60.0
# Seconds for the installation. It waits for another installation, and for open transactions that use the same objects.
_TIMEOUT = 600.0
MISSING = "the database has no event log. Remedy: flask sse init"

_REQUIRED = (
    'The event log is required (SSE_EVENT_LOG is true, or SSE_LISTEN_URL is "poll"), and {}; or set SSE_EVENT_LOG to '
    '"auto", and SSE_LISTEN_URL to a direct connection.'
)
_ON_THIS_CONNECTION = "The event log cannot be used on this connection: {}."
_GONE = (
    "The database had an event log a moment ago, and has none now. Nothing was sent. Remedy: flask sse init. Or call "
    "again: without a log, events are sent and not kept."
)


@dataclass(frozen=True, slots=True)
class Installation:
    """The event log of a database: its version, the key that signs its ids, and what tells its schema from others."""

    version: int
    key: bytes = field(repr=False)
    condition: str  # in SQL: the schema is the one that was looked at, and its owner is trusted
    place: str  # in SQL: the database is the one that was looked at
    check: str  # a query for one row with a boolean: whether the functions may be called on a caller's connection

    def guarded(self, query: str) -> str:
        """Return the query with a guard before it, a statement that fails if `condition` does not hold."""
        return (
            f"SELECT CAST(CASE WHEN {self.condition} THEN 'pg_catalog' ELSE '\"{SCHEMA}, as it was checked\"' END "
            f"AS pg_catalog.regnamespace); {query}"
        )


class InstallationLookup:
    """Looks up the log of one database, and remembers it. `setting` is True (required), False (not used) or "auto".

    `owner` is the role that the app trusts by SSE_LOG_OWNER.
    """

    def __init__(self, setting: bool | str, owner: str | None = None) -> None:
        self._setting = setting
        self._owner = owner
        self._found: Installation | None = None
        self._wrong: str | None = None  # why a log that is there cannot be used
        self._look_at = 0.0
        self._said = ""
        self._repeats = Repeats(most=60.0)

    @property
    def found(self) -> bool:
        """Whether the last look found the log."""
        return self._found is not None

    def look(self, execute: Execute, *, again: bool = False) -> Installation | None:
        """Return the log to use, or None. `execute` runs a query on the database.

        A log that was found is remembered for a minute, or until `forget()`; `again` looks again anyway. Raises
        `EventLogMissing` if the setting requires a log and the database has no log that can be used.
        """
        if self._setting is False:
            return None
        required = self._setting is True and self._found is None
        if again or required or time.monotonic() >= self._look_at:
            try:
                self._found, self._wrong = look_up(execute, self._owner), None
            except NotUsable as error:
                self._found, self._wrong = None, str(error)
            # Set only after the answer. Until then other callers query the database too, instead of finding "no log".
            self._look_at = time.monotonic() + (_LOOK_AGAIN if self._found is None else _CHECK_AGAIN)
            self._say(self._wrong)
        if self._found is None and self._setting is True:
            raise EventLogMissing(_REQUIRED.format(self._wrong or MISSING))
        return self._found

    def call(self, execute: Execute, run: Callable[[Installation], T]) -> T | None:
        """Return `run(log)`, which calls functions of the log, or None if there is no log to use.

        If its schema is another one than it was, that is looked up, and `run()` is called again. After any other error
        the log is forgotten, because it may have been dropped.
        """
        log = self.look(execute)
        if log is None:
            return None
        try:
            return run(log)
        except Exception as error:
            self.forget()
            if not isinstance(error.__cause__ or error, psycopg2.errors.InvalidSchemaName):
                raise
            log = self.look(execute)
            if log is None:
                raise DatabaseUnavailable(_GONE) from error
        return run(log)

    def for_caller(self, execute: Execute, own: Execute) -> Installation | None:
        """Return the log to use on a caller's connection, where `execute` runs a query, or None if the app uses none.

        Whether there is one is asked on the app's `own` connection. What the caller's answers counts for this call
        alone: it may have another role, or lead to another database. Raises `EventLogMissing` if it cannot use the log.
        """
        if self._setting is False:
            return None
        log = self.look(own)
        if log is not None and not execute(log.check)[0][0]:
            log = self.look(own, again=True)
            if log is not None and not execute(log.check)[0][0]:
                raise EventLogMissing(_why_not(execute, log, self._owner))
        return log

    def of_caller(self, execute: Execute) -> Installation | None:
        """Return the log as `for_caller()` does, where the app's own database cannot be asked."""
        if self._setting is False:
            return None
        try:
            log, wrong = look_up(execute, self._owner), MISSING
        except NotUsable as error:
            log, wrong = None, str(error)
        if log is None and (self._setting is True or wrong is not MISSING):
            raise EventLogMissing(_ON_THIS_CONNECTION.format(wrong))
        return log

    def execute(
        self, pool: Pool, query: str, args: Sequence[Any] = (), *, limit: float | None = None
    ) -> Sequence[Sequence[Any]]:
        """Run a query that calls functions of the log, on a connection of `pool`. Raises as `pool.execute()` does."""
        rows = self.call(pool.execute, lambda log: pool.execute(log.guarded(query), args, limit=limit))
        if rows is None:
            raise DatabaseUnavailable("The event log is not in use any more.")
        return rows

    def remedy_for_size(self, own: Execute, *, durable: bool) -> str:
        """Return how an event can be sent that is too large for NOTIFY. `own` runs a query on the app's database."""
        if self._setting is False:
            remedy = "Install the event log (flask sse init), which carries any size, and set no SSE_EVENT_LOG"
        else:
            with contextlib.suppress(DatabaseNotConfigured, DatabaseUnavailable, EventLogMissing):
                if self.look(own) is not None:
                    return "Leave durable=False out: the event log carries any size"
            remedy = "Install the event log (flask sse init), which carries any size"
            if self._wrong is not None:
                remedy = f"Use the event log, which carries any size ({self._wrong})"
        return remedy if durable else f"{remedy}, and leave durable=False out"

    def forget(self) -> None:
        """Look again at the next use, because something that belongs to the log was missing."""
        self._found = None
        self._look_at = 0.0

    def _say(self, wrong: str | None) -> None:
        """Log whether the event log is on, if that has changed; and again, rarely, while it is off and should be on."""
        text = "The event log is on" if self._found else f"The event log is off: {wrong or MISSING}"
        now = time.monotonic()
        if self._found is None and (self._setting is True or wrong is not None):
            if number := self._repeats.count(text, now):
                logger.error("%s%s.", text, times(number))
        else:
            ended = self._repeats.over(now)
            if ended is not None and self._found is not None:
                logger.warning("%s, after %s without it.", text, ended)
            elif text != self._said:
                logger.info("%s.", text)
        self._said = text


# The catalog can be read by every role. To name a function that does not exist, or that this role may not call, would
# be an error, and would abort a caller's transaction. The last column has functions that are not as the installation
# makes them. The types are those that are read on every driver in the driver's own way.
_DATABASE = (
    "SELECT CAST(d.oid AS pg_catalog.int4) FROM pg_catalog.pg_database d "
    "WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
)
_LOOK_UP = f"""
SELECT CAST(n.oid AS pg_catalog.int4), CAST(n.nspowner AS pg_catalog.int4), {trusted("n.nspowner", "current_user")},
    ({_DATABASE}), pg_catalog.has_function_privilege('public', 'pg_catalog.pg_control_system()', 'EXECUTE'),
    CAST(pg_catalog.pg_get_userbyid(n.nspowner) AS pg_catalog.text), CAST(current_user AS pg_catalog.text),
    pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on',
    pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE'),
    (SELECT pg_catalog.string_agg(CAST(f.proname AS pg_catalog.text), ', ') FROM pg_catalog.pg_proc f
    WHERE f.pronamespace OPERATOR(pg_catalog.=) n.oid AND NOT (
        f.proowner OPERATOR(pg_catalog.=) n.nspowner AND f.prosecdef AND COALESCE(
            'search_path=pg_catalog, pg_temp' OPERATOR(pg_catalog.=) ANY (f.proconfig), false)))
FROM pg_catalog.pg_namespace n LEFT JOIN pg_catalog.pg_proc p
    ON p.pronamespace OPERATOR(pg_catalog.=) n.oid AND p.proname OPERATOR(pg_catalog.=) 'installed_v1'
WHERE n.nspname OPERATOR(pg_catalog.=) '{SCHEMA}'
"""
_INSTALLED = f"SELECT version, key FROM {SCHEMA}.installed_v1()"
_SYSTEM = "SELECT CAST(system_identifier AS pg_catalog.text) FROM pg_catalog.pg_control_system()"
# Whether a caller's connection may write to a log: its role may, and its database is the log's. Copies of a database
# have the same numbers in another database or on another server.
_FOR_CALLERS = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n
    JOIN pg_catalog.pg_proc p ON p.pronamespace OPERATOR(pg_catalog.=) n.oid
        AND p.proname OPERATOR(pg_catalog.=) 'enqueue_v1'
    WHERE n.oid OPERATOR(pg_catalog.=) CAST({oid} AS pg_catalog.oid) AND {condition}
        AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE'))
    AND {place}
"""


class NotUsable(Exception):
    """There is an event log, but this role or this version of the package cannot use it. The text has the remedy."""


def look_up(execute: Execute, log_owner: str | None = None) -> Installation | None:
    """Return the event log of the database, or None. `execute` runs a query on it. Raises `NotUsable`.

    `log_owner` is a role that is trusted, whatever its rights.
    """
    found = execute(_LOOK_UP)
    if not found:
        return None
    oid, owner_oid, trusts, database, told_system, owner, role, superuser, usable, strange = found[0]
    if not trusts and owner != log_owner:
        raise NotUsable(
            f'the schema {SCHEMA} belongs to the role "{owner}", and the app\'s role "{role}" has no reason to trust '
            f'it. Remedy: if you know that role, set SSE_LOG_OWNER = "{owner}" in the app'
            + ("" if superuser else f', or GRANT "{role}" TO "{owner}"')
            + "; otherwise find out who made the schema, and drop it"
        )
    if usable is None:
        return None  # the schema is there for an installation that is still to come
    if not usable:
        raise NotUsable(
            f'the database has an event log, but the app\'s role "{role}" may not use it. Remedy: flask sse init '
            f"--grant-to {shlex.quote(role)}, run by the role that installed it"
        )
    if strange:
        raise NotUsable(
            f"functions in the schema {SCHEMA} are not as flask sse init makes them (owner, SECURITY DEFINER, "
            f"search_path): {strange}. Remedy: give them back what they had, or drop the schema and install it again"
        )
    condition = f"pg_catalog.to_regnamespace('{SCHEMA}') OPERATOR(pg_catalog.=) CAST({oid} AS pg_catalog.oid)"
    if trusts:
        condition += f" AND {trusted(f'CAST({owner_oid} AS pg_catalog.oid)', 'current_user')}"
    place = f"{database} OPERATOR(pg_catalog.=) ({_DATABASE})"
    if told_system:
        place += f" AND '{execute(_SYSTEM)[0][0]}' OPERATOR(pg_catalog.=) ({_SYSTEM})"
    rows = execute(_INSTALLED)
    if not rows:
        raise NotUsable(
            "the database's event log has no rows, as after restoring a dump of the schema alone. Remedy: "
            "flask sse init"
        )
    [(version, key)] = rows
    if version < VERSION:
        raise NotUsable(
            f"the database's event log has version {version}, and this package needs version {VERSION}. Remedy: "
            "flask sse init"
        )
    check = _FOR_CALLERS.format(oid=oid, condition=condition, place=place)
    return Installation(version, bytes(key), condition, place, check)


def _why_not(execute: Execute, log: Installation, owner: str | None) -> str:
    """Return why a caller's connection cannot use the app's log."""
    [(here, database)] = execute(f"SELECT {log.place}, CAST(pg_catalog.current_database() AS pg_catalog.text)")
    why = "the database has another event log than a moment ago. Remedy: try again"
    if not here:
        why = (
            f'its database "{database}" is not the one that the app\'s streams listen to. Remedy: call it without '
            "connection=, or on a connection to that one"
        )
    else:
        try:
            look_up(execute, owner)
        except NotUsable as error:
            why = str(error)
    return _ON_THIS_CONNECTION.format(why)


def install(connection: Any, grant_to: Sequence[str] = (), *, owner: str | None = None) -> tuple[int, str]:
    """Run `schema_sql()` on a connection of `connect()`.

    Return the version that was there before, 0 if there was none, and what apps with other roles must set, one line
    each. It does nothing, without an error, for a role that may not install but has access to a log of the current
    version.
    """
    # execute() runs it in one READ COMMITTED transaction: after waiting for another installation, this one must see it.
    query = f"""
        {schema_sql(grant_to, owner=owner)}
        SELECT CAST(pg_catalog.current_setting('{SCHEMA}.version_before') AS pg_catalog.int4),
            pg_catalog.current_setting('{SCHEMA}.advice')
    """
    try:
        [(before, advice)] = execute(connection, query, timeout=_TIMEOUT)
        return int(before), str(advice).strip()
    except psycopg2.errors.InsufficientPrivilege:
        try:
            found = look_up(lambda query: execute(connection, query, timeout=_TIMEOUT), owner)
        except (NotUsable, psycopg2.Error):
            found = None
        if found is None or grant_to:
            raise
        return found.version, ""
