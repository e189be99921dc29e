"""The event log's schema: the SQL that installs it, brings it up to date and takes it away.

Version N is what `sql/schema_1.sql` to `sql/schema_N.sql` make one after the other. `schema_sql()` runs those that a
database does not have yet, so that a fresh install and an upgrade are one script. `sql/rows.sql` fills the tables, also
those that a dump without rows has left empty.

Rules for a step. Functions that old workers call (`…_v1`) stay; `installed_v1()` for ever, whose grants tell who was
let in, and `notify()`, which may be granted alone, is only replaced. One that alters both tables locks them first, in
the order in which publishers use them: `pending`, then `event`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import psycopg2

from .connect import execute

SCHEMA = "flask_pg_sse"
VERSION = 1
# The oldest PostgreSQL that is let in, as its server_version_num. The SQL needs 13 (gen_random_uuid(), and the storage
# parameter autovacuum_vacuum_insert_threshold), which has had no more repairs since November 2025.
OLDEST = 140000

# Seconds for the installation. It waits for another one, and for open transactions that use what it changes.
_TIMEOUT = 600.0

# One statement, hence one transaction wherever it is run, also by psql and by drivers that take no more than one. No
# ":name" and no "%", which SQLAlchemy and the drivers would take for parameters.
_INSTALL = """\
DO $do$
DECLARE
    own_role pg_catalog.text := pg_catalog.current_setting('role');
    own_path pg_catalog.text := pg_catalog.current_setting('search_path');
    owner pg_catalog.text;
    installed integer := 0;
    found integer;
    old pg_catalog.oid[];  -- what is there already
    grantees pg_catalog.text[] := {grant_to};
    functions pg_catalog.text;
    grantee pg_catalog.text;
    revoke pg_catalog.text;
BEGIN
    -- What others have made in schemas of the search path must not run with the rights of who installs.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    IF current_setting('server_version_num')::integer < {oldest} THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = concat(
            'the event log needs PostgreSQL {oldest_major} or newer, and this is ', current_setting('server_version'));
    END IF;
    -- Two that run at once: the second waits here, and then finds everything done.
    PERFORM pg_advisory_xact_lock(7380381037705062261);
    old := ARRAY(
        SELECT c.oid FROM pg_class c WHERE c.relnamespace = to_regnamespace('{schema}')
        UNION ALL SELECT p.oid FROM pg_proc p WHERE p.pronamespace = to_regnamespace('{schema}')
        UNION ALL SELECT n.oid FROM pg_namespace n WHERE n.nspname = '{schema}');
    SELECT r.rolname INTO owner FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = '{schema}';
    IF owner IS NULL THEN
        CREATE SCHEMA {schema};
    ELSIF owner <> current_user THEN
        -- All of it belongs to one role, as which its functions run. And if that is not the one we think, what it has
        -- put here for us to stumble over runs with its own rights.
        PERFORM set_config('role', owner, true);
    END IF;

    -- EXECUTE, because a step that is not needed any more names what does not exist yet, or not any more.
    IF to_regclass('{schema}.installation') IS NOT NULL THEN
        EXECUTE 'SELECT version FROM {schema}.installation' INTO installed;  -- NULL after a dump without rows
    END IF;
    PERFORM set_config('{schema}.version_before', coalesce(installed, 0)::text, true);  -- for install()
{steps}
    -- Nobody gets what is new unasked: functions are everybody's at first, and the owner's default privileges (ALTER
    -- DEFAULT PRIVILEGES) may be meant for other tables than this log's.
    FOR revoke IN
        SELECT concat('REVOKE ALL ON ', o.name, ' FROM ', coalesce(quote_ident(r.rolname), 'PUBLIC'))
        FROM (
            SELECT c.oid, c.relowner, c.relacl,
                concat(CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END, c.oid::regclass)
            FROM pg_class c WHERE c.relnamespace = '{schema}'::regnamespace AND c.relacl IS NOT NULL
            UNION ALL SELECT p.oid, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)),
                concat('FUNCTION ', p.oid::regprocedure)
            FROM pg_proc p WHERE p.pronamespace = '{schema}'::regnamespace
            UNION ALL SELECT n.oid, n.nspowner, n.nspacl, 'SCHEMA {schema}'
            FROM pg_namespace n WHERE n.nspname = '{schema}' AND n.nspacl IS NOT NULL
        ) AS o (oid, owner, acl, name)
        CROSS JOIN LATERAL (SELECT DISTINCT a.grantee FROM aclexplode(o.acl) a WHERE a.grantee <> o.owner) AS g
        LEFT JOIN pg_roles r ON r.oid = g.grantee
        WHERE o.oid <> ALL (old)
    LOOP
        EXECUTE revoke;
    END LOOP;

    IF installed < {version} THEN
        EXECUTE 'UPDATE {schema}.installation SET version = {version}';
        EXECUTE $version$
            CREATE OR REPLACE FUNCTION {schema}.version_v1() RETURNS integer
            LANGUAGE sql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'SELECT {version}'
        $version$;
        -- A role that was let in by an earlier version may call what the new one has brought.
        grantees := grantees || ARRAY(
            SELECT r.rolname::text FROM pg_proc p, aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
            WHERE p.oid = '{schema}.installed_v1()'::regprocedure AND r.oid <> p.proowner);
    END IF;

    -- No trigger functions: they run on tables of the role's own as well.
    SELECT string_agg(p.oid::regprocedure::text, ', ') INTO functions FROM pg_proc p
    WHERE p.pronamespace = '{schema}'::regnamespace AND p.prorettype <> 'trigger'::regtype;
    FOREACH grantee IN ARRAY grantees LOOP
        -- A name that is too long for PostgreSQL would be cut, and may then be another role's.
        IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname::text = grantee) THEN
            RAISE EXCEPTION USING ERRCODE = 'undefined_object', MESSAGE = concat('role "', grantee, '" does not exist');
        END IF;
        EXECUTE 'GRANT USAGE ON SCHEMA {schema} TO ' || quote_ident(grantee);
        EXECUTE concat('GRANT EXECUTE ON FUNCTION ', functions, ' TO ', quote_ident(grantee));
    END LOOP;
    PERFORM set_config('role', own_role, true);
    PERFORM set_config('search_path', own_path, true);
END $do$;
"""
_STEP = """
    IF installed < {number} THEN
        EXECUTE $step$
{sql}
        $step$;
    END IF;
"""
# After the first step.
_ROWS = """
    EXECUTE 'SELECT version FROM {schema}.installation' INTO found;
    IF found IS NULL THEN
        EXECUTE $rows$
{sql}
        $rows$;
        EXECUTE 'SELECT version FROM {schema}.installation' INTO found;
    END IF;
    installed := coalesce(installed, found);
"""


def schema_sql(grant_to: Sequence[str] = ()) -> str:
    """Return the SQL that installs the event log or brings an older one up to date; harmless where it is there.

    For `op.execute()` in a migration of Alembic, or psql: one statement, all or nothing. `grant_to` names the roles
    that apps run as, where the role that installs is another; they get what `notify()` and the streams need.
    """
    if isinstance(grant_to, str):
        raise TypeError("grant_to is a list of roles, not a string.")
    for role in grant_to:
        if role in ("", "public", "none"):  # PostgreSQL reads them so even between quotes
            raise ValueError(f"grant_to names roles, and {role!r} is none.")
    first, *later = [_STEP.format(number=n, sql=_read(f"schema_{n}.sql")) for n in range(1, VERSION + 1)]
    return _INSTALL.format(
        schema=SCHEMA,
        version=VERSION,
        oldest=OLDEST,
        oldest_major=OLDEST // 10000,
        steps="".join([first, _ROWS.format(schema=SCHEMA, sql=_read("rows.sql")), *later]),
        grant_to=f"ARRAY[{', '.join(map(_literal, grant_to))}]::pg_catalog.text[]",
    )


def drop_schema_sql() -> str:
    """Return the SQL that takes the event log away, with all that is kept in it."""
    return f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE;\n"


def install(connection: Any, grant_to: Sequence[str] = ()) -> int:
    """Run `schema_sql()` on a connection of `connect()`, and return the version that was there before, 0 for none.

    A role that may not install, but was let in where the version is there already, has nothing to do and gets no error.
    """
    # In a transaction of its own, READ COMMITTED: who had to wait for another installation is to see it.
    query = f"""
        {schema_sql(grant_to)}
        SELECT pg_catalog.current_setting('{SCHEMA}.version_before')::pg_catalog.int4
    """
    try:
        ((before,),) = execute(connection, query, timeout=_TIMEOUT)
    except psycopg2.errors.InsufficientPrivilege:
        try:
            rows = execute(connection, f"SELECT version FROM {SCHEMA}.installed_v1()", timeout=_TIMEOUT)
            before = rows[0][0] if rows else 0
        except psycopg2.Error:
            before = 0
        if before < VERSION or grant_to:
            raise
    return int(before)


def _literal(text: str) -> str:
    """Return a text as an SQL literal in which neither drivers nor the script's own quotes find anything of theirs."""
    escaped = re.sub(r"[^\w .@-]", lambda found: f"\\U{ord(found[0]):08x}", text)
    return f"'{text}'" if escaped == text else f"E'{escaped}'"


def _read(name: str) -> str:
    return (files(__package__) / "sql" / name).read_text(encoding="utf-8")
