"""The event log's schema: the SQL that installs it, and whether a database has it.

Version N is what `sql/schema_1.sql` to `sql/schema_N.sql` make one after the other. `schema_sql()` runs those that a
database does not have yet, so that a fresh install and an upgrade are one script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

SCHEMA = "flask_pg_sse"
VERSION = 1

# Two that run at once: the second waits here, and then finds everything done.
_BEGIN = f"""\
SELECT pg_advisory_xact_lock(7380381037705062261);
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
"""
# EXECUTE, because a step that is not needed any more names what does not exist yet, or not any more.
_STEP = """
DO $do$
DECLARE
    version integer := 0;
BEGIN
    IF to_regclass('{schema}.installation') IS NOT NULL THEN
        SELECT i.version INTO version FROM {schema}.installation i;
    END IF;
    IF version < {number} THEN
        EXECUTE $step$
{sql}
        $step$;
        UPDATE {schema}.installation SET version = {number};
    END IF;
END $do$;
"""
# A role that was let in by an earlier version may call what the new one has brought.
_KEEP_GRANTS = f"""
DO $do$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT r.rolname FROM pg_proc p, aclexplode(p.proacl) a, pg_roles r
        WHERE p.oid = '{SCHEMA}.installed_v1()'::regprocedure AND a.grantee = r.oid AND r.oid <> p.proowner
    LOOP
        EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {SCHEMA} TO %I', grantee);
    END LOOP;
END $do$;
"""


def schema_sql(grant_to: Sequence[str] = ()) -> str:
    """Return the SQL that installs the event log or brings an older one up to date; harmless where it is there.

    For `op.execute()` in a migration of Alembic, or psql: run it in one transaction. `grant_to` names the roles that
    apps run as, where the role that installs is another; they get what `notify()` and the streams need.
    """
    steps = [_STEP.format(schema=SCHEMA, number=n, sql=_read(f"schema_{n}.sql")) for n in range(1, VERSION + 1)]
    if isinstance(grant_to, str):
        raise TypeError("grant_to is a list of roles, not a string.")
    return "".join([_BEGIN, *steps, _KEEP_GRANTS, *map(_grant, grant_to)])


def drop_schema_sql() -> str:
    """Return the SQL that takes the event log away, with all that is kept in it."""
    return f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE;\n"


def _grant(role: str) -> str:
    quoted = '"' + role.replace('"', '""') + '"'
    return f"""
GRANT USAGE ON SCHEMA {SCHEMA} TO {quoted};
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {SCHEMA} TO {quoted};
"""


def _read(name: str) -> str:
    return (files(__package__) / "sql" / name).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Installation:
    """The event log that a database has: its version, and the key that signs its ids."""

    version: int
    key: bytes = field(repr=False)


# From the catalog, which everybody may read: naming a function that is not there, or that this role may not call, would
# be an error, and end a transaction.
_LOOK_UP = f"""
SELECT has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = '{SCHEMA}' AND p.proname = 'installed_v1'
"""


class NotUsable(Exception):
    """There is an event log, and this role or this version of the package cannot use it; the text says the remedy."""


def look_up(execute: Callable[[str], Sequence[Sequence[Any]]]) -> Installation | None:
    """Return the event log of the database that `execute` runs queries on, or None. Raises `NotUsable`."""
    found = execute(_LOOK_UP)
    if not found:
        return None
    if not found[0][0]:
        raise NotUsable(
            "the database has an event log, which its role may not use. Remedy: flask sse init --grant-to ROLE, run by "
            "the role that installed it"
        )
    [(version, key)] = execute(f"SELECT version, key FROM {SCHEMA}.installed_v1()")
    if version < VERSION:
        raise NotUsable(
            f"the database's event log is of version {version}, and this package needs {VERSION}. Remedy: "
            "flask sse init"
        )
    return Installation(version, bytes(key))
