"""`flask sse drop`: take the event log out of the database, and say before what else that breaks."""

from __future__ import annotations

from typing import Any

import click
import psycopg2

from ..engine.postgres import schema
from ..engine.postgres.connect import execute
from ..repeats import printable
from ..web.blueprint import sse_bp
from .database import database

# Seconds. It waits for transactions that use the log.
_TIMEOUT = 60.0
_REMEDIES: dict[type[Exception], str] = {
    psycopg2.errors.InsufficientPrivilege: "Run it as the role that owns the schema flask_pg_sse.",
}
_OWNER = f"""
SELECT pg_catalog.pg_get_userbyid(n.nspowner)::pg_catalog.text FROM pg_catalog.pg_namespace n
WHERE n.nspname = '{schema.SCHEMA}'
"""
# Functions elsewhere that name the log in their text, with the tables whose triggers call them. Those that `watch` made
# do without the log.
_CALLERS = rf"""
SELECT p.oid::pg_catalog.int8, p.proname ~ '^flask_pg_sse_watch_[0-9a-f]{{16}}$',
    p.oid::pg_catalog.regprocedure::pg_catalog.text, ARRAY(
    SELECT DISTINCT t.tgrelid::pg_catalog.regclass::pg_catalog.text FROM pg_catalog.pg_trigger t
    WHERE t.tgfoid = p.oid AND NOT t.tgisinternal AND t.tgparentid = 0 ORDER BY 1)
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname <> '{schema.SCHEMA}' AND pg_catalog.strpos(p.prosrc, '{schema.SCHEMA}.') > 0
ORDER BY 3
"""
# What depends on something in the log, also indirectly, and is not in it: DROP ... CASCADE drops it too. A table is a
# type too, so columns and functions of others may depend on it. Parts (deptype 'i' and 'a') go with the whole, which is
# named. A view depends by a rule of its own.
_DEPENDENTS = f"""
WITH RECURSIVE dropped (classid, objid, objsubid, own, named) AS (
    SELECT d.classid, d.objid, d.objsubid, true, false
    FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_namespace n ON n.oid = d.refobjid
    WHERE d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass AND n.nspname = '{schema.SCHEMA}'
    UNION
    SELECT CASE WHEN r.oid IS NULL THEN d.classid ELSE 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid END,
        coalesce(r.ev_class, d.objid), CASE WHEN r.oid IS NULL THEN d.objsubid ELSE 0 END,
        dropped.own AND d.deptype <> 'n', d.deptype = 'n'
    FROM pg_catalog.pg_depend d JOIN dropped ON dropped.classid = d.refclassid AND dropped.objid = d.refobjid
        AND dropped.objsubid IN (0, d.refobjsubid)
    LEFT JOIN pg_catalog.pg_rewrite r ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND r.oid = d.objid
        AND r.rulename = '_RETURN'
    WHERE d.deptype IN ('n', 'a', 'i')
)
SELECT DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid),
    CASE WHEN d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass THEN d.objid::pg_catalog.int8 END
FROM dropped d WHERE d.named AND NOT EXISTS (
    SELECT FROM dropped o WHERE o.own AND o.classid = d.classid AND o.objid = d.objid
)
ORDER BY 1
"""
_SESSIONS = """
SELECT count(*) FROM pg_catalog.pg_stat_activity a
WHERE a.datname = pg_catalog.current_database() AND a.pid <> pg_catalog.pg_backend_pid()
    AND pg_catalog.starts_with(a.application_name, 'flask_pg_sse')
"""


@sse_bp.cli.command("drop")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it; needs no database.")
def _drop(yes: bool, sql: bool) -> None:
    """Drop the event log with all its events.

    It first says what else would be dropped or fail: views, triggers and functions that use the log.
    """
    if sql:
        click.echo(schema.drop_schema_sql(), nl=False)
        return
    with database("The event log was not dropped", _REMEDIES) as (connection, dsn):
        if not execute(connection, _OWNER, timeout=_TIMEOUT):
            click.echo(f"There is no event log ({dsn}).")
            return
        click.echo(f"This deletes the event log with all its events ({dsn}).")
        for line in consequences(connection):
            click.echo(printable(line))
        if not yes:
            click.confirm("Drop it?", abort=True)
        execute(connection, f"{schema.drop_schema_sql()} SELECT 1", timeout=_TIMEOUT)
    click.echo("Dropped the event log.")


def consequences(connection: Any) -> list[str]:
    """Return a line for everything outside of the log that its end concerns."""
    dependents = execute(connection, _DEPENDENTS, timeout=_TIMEOUT)
    lines = [f"Is dropped with it: {what}." for what, _ in dependents]
    dropped = {function for _, function in dependents}
    for oid, ours, function, tables in execute(connection, _CALLERS, timeout=_TIMEOUT):
        if oid in dropped:
            continue
        if ours and tables:
            lines.append(f"Goes on without the log, by NOTIFY: the changes of {', '.join(tables)} (flask sse unwatch).")
        elif tables:
            lines.append(f"Fails afterwards: writing to {', '.join(tables)}, whose triggers call {function}.")
        elif not ours:
            lines.append(f"Fails afterwards: {function}, if it calls the log.")
    [(sessions,)] = execute(connection, _SESSIONS, timeout=_TIMEOUT)
    if sessions:
        lines.append(f"Apps are connected ({sessions} sessions): with SSE_EVENT_LOG = True their streams end.")
    return lines
