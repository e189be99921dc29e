"""The event log's schema: the SQL that installs, upgrades and drops it.

`sql/schema_1.sql` to `sql/schema_N.sql`, run one after the other, make version N. `schema_sql()` runs the steps that a
database does not have yet, so one script does a fresh installation and an upgrade. `sql/rows.sql` and `sql/repair.sql`
fill the tables and set right what a restore has left: no rows, two rows, triggers that are off.

Rules for a step:
- Functions that old workers call (`…_v1`) stay. `installed_v1()` stays forever, because its grants tell which roles
  have access.
- `notify()` is only ever replaced, because it may be granted alone.
- A step that alters both tables locks them first, in the order in which publishers use them: `pending`, then `event`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

SCHEMA = "flask_pg_sse"
VERSION = 1
# The oldest supported PostgreSQL, as server_version_num. The SQL itself needs 13 (gen_random_uuid(), and the storage
# parameter autovacuum_vacuum_insert_threshold), but 13 has had no bug fixes since November 2025.
OLDEST = 140000

# One statement. So it is one transaction everywhere, also in psql, and it works with drivers that accept only one
# statement. It contains no ":name" and no "%", because SQLAlchemy and the drivers would read these as parameters.
_INSTALL = """\
DO $do$
DECLARE
    own_role pg_catalog.text := pg_catalog.current_setting('role');
    own_path pg_catalog.text := pg_catalog.current_setting('search_path');
    owner pg_catalog.text;
    log_owner pg_catalog.text := {log_owner};
    advice pg_catalog.text := '';
    created boolean := false;
    installed integer := 0;
    found integer;
    old pg_catalog.oid[];  -- the objects that exist already
    others pg_catalog.text;
    grantees pg_catalog.text[] := {grant_to};
    functions pg_catalog.text;
    grantee pg_catalog.text;
    problem pg_catalog.text;
    statement pg_catalog.text;
BEGIN
    -- Objects of other roles in schemas of the search path must not run with the installing role's rights.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    IF current_setting('server_version_num')::integer < {oldest} THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = concat(
            'the event log needs PostgreSQL {oldest_major} or newer, and this is ', current_setting('server_version'));
    END IF;
    -- If two installations run at once, the second waits here, or at the lock below, and then finds everything done.
    IF to_regnamespace('{schema}') IS NULL THEN
        BEGIN
            CREATE SCHEMA {schema};
            created := true;
        EXCEPTION WHEN duplicate_schema OR unique_violation THEN
            NULL;  -- the other one was faster
        END;
    END IF;
    SELECT r.rolname INTO owner FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = '{schema}';
    -- Nothing in the schema is used before it is clear that its owner may be trusted.
    IF owner IS DISTINCT FROM log_owner AND NOT {trusted_here} THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = concat(
            'the schema {schema} is there already, and belongs to ', quote_ident(owner), ', a role that ',
            quote_ident(current_user), ' has no reason to trust'),
            HINT = concat('If you know that role, run this as that role, or set SSE_LOG_OWNER = "', owner,
                '". Otherwise find out who made the schema, and drop it.');
    END IF;
    IF owner <> current_user THEN
        BEGIN
            PERFORM set_config('role', owner, true);  -- everything in the schema belongs to that role
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege', MESSAGE = concat('the event log belongs to ',
                quote_ident(owner), ', and ', quote_ident(current_user), ' may not act as that role'),
                HINT = concat('Run this as ', quote_ident(owner), ', or as a member of it.');
        END;
    END IF;
    -- This changes nothing, and takes a lock that only the schema's owner can take. Every role that can connect could
    -- hold an advisory lock.
    EXECUTE concat('COMMENT ON SCHEMA {schema} IS ',
        coalesce(quote_literal(obj_description(to_regnamespace('{schema}'), 'pg_namespace')), 'NULL'));
    old := ARRAY(
        SELECT c.oid FROM pg_class c WHERE c.relnamespace = to_regnamespace('{schema}')
        UNION ALL SELECT p.oid FROM pg_proc p WHERE p.pronamespace = to_regnamespace('{schema}')
        UNION ALL SELECT n.oid FROM pg_namespace n WHERE n.nspname = '{schema}' AND NOT created);

    -- As after ALTER SCHEMA ... OWNER TO alone. The new owner must not get the functions of the old one without a look.
    SELECT string_agg(DISTINCT quote_ident(r.rolname), ', ') INTO others
    FROM (
        SELECT c.relowner AS role FROM pg_class c WHERE c.relnamespace = '{schema}'::regnamespace
            AND c.relname IN ('installation', 'event', 'pending', 'retention', 'event_id', 'numbering', 'pruning')
        UNION SELECT p.proowner FROM pg_proc p WHERE p.pronamespace = '{schema}'::regnamespace
            AND (p.proname = 'notify' OR p.proname ~ '_v[0-9]+$')
    ) AS o JOIN pg_roles r ON r.oid = o.role WHERE r.rolname <> owner;
    IF others IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = concat(
            'schema {schema} belongs to ', quote_ident(owner), ', and what is in it to ', others,
            '. Its functions work only if one role owns all of it'),
            HINT = concat('Set it back: ALTER SCHEMA {schema} OWNER TO ', others, '. Or, if you trust what ', others,
            ' has put there, let ', quote_ident(owner), ' own each table, view, sequence and function too.');
    END IF;

    -- EXECUTE, because a step that is not needed may name objects that do not exist yet, or no longer exist.
    IF to_regclass('{schema}.installation') IS NOT NULL THEN
        EXECUTE 'SELECT version FROM {schema}.installation' INTO installed;  -- NULL after a dump without rows
    END IF;
    PERFORM set_config('{schema}.version_before', coalesce(installed, 0)::text, true);  -- for install()
{steps}
    IF installed <= {version} THEN
        EXECUTE $rows$
{repair}
        $rows$;
    END IF;

    -- No role gets rights on new objects by default. PostgreSQL grants EXECUTE on new functions to PUBLIC, and the
    -- owner's default privileges (ALTER DEFAULT PRIVILEGES) may be meant for other tables.
    FOR statement IN
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
        EXECUTE statement;
    END LOOP;

    IF installed < {version} THEN
        EXECUTE 'UPDATE {schema}.installation SET version = {version}';
        EXECUTE $version$
            CREATE OR REPLACE FUNCTION {schema}.version_v1() RETURNS integer
            LANGUAGE sql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'SELECT {version}'
        $version$;
        -- A role with access to an earlier version may also call the new version's functions.
        grantees := grantees || ARRAY(
            SELECT r.rolname::text FROM pg_proc p, aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
            WHERE p.oid = '{schema}.installed_v1()'::regprocedure AND r.oid <> p.proowner);
    END IF;

    -- Trigger functions are left out, because a role could use them on its own tables.
    SELECT string_agg(p.oid::regprocedure::text, ', ') INTO functions FROM pg_proc p
    WHERE p.pronamespace = '{schema}'::regnamespace AND p.prorettype <> 'trigger'::regtype;
    FOREACH grantee IN ARRAY grantees LOOP
        -- PostgreSQL would cut a name that is too long, and the shorter name may be another role's.
        IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname::text = grantee) THEN
            problem := concat('role "', grantee, '" does not exist');
            IF NOT {missing_ok} THEN
                RAISE EXCEPTION USING ERRCODE = 'undefined_object', MESSAGE = problem;
            END IF;
            RAISE NOTICE USING MESSAGE = concat(problem, ', so it gets no rights on the event log');
            CONTINUE;
        END IF;
        EXECUTE 'GRANT USAGE ON SCHEMA {schema} TO ' || quote_ident(grantee);
        EXECUTE concat('GRANT EXECUTE ON FUNCTION ', functions, ' TO ', quote_ident(grantee));
        IF owner IS DISTINCT FROM log_owner AND NOT {trusted_by_grantee} THEN
            advice := concat(advice, chr(10), 'An app that runs as ', quote_ident(grantee),
                ' does not use this log before it is told to trust its owner: set SSE_LOG_OWNER = "', owner,
                '" in that app, or GRANT ', quote_ident(grantee), ' TO ', quote_ident(owner), '.');
        END IF;
    END LOOP;
    IF advice <> '' THEN
        RAISE WARNING USING MESSAGE = ltrim(advice, chr(10));
    END IF;
    PERFORM set_config('{schema}.advice', advice, true);  -- for install()
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
# Runs after the first step; repair.sql runs after all of them.
_ROWS = """
    -- As an event trigger of the database may force it on every new table: then not even their owner finds a row.
    FOR statement IN
        SELECT concat('ALTER TABLE ', c.oid::regclass, ' NO FORCE ROW LEVEL SECURITY') FROM pg_class c
        WHERE c.relnamespace = '{schema}'::regnamespace AND c.relforcerowsecurity
    LOOP
        EXECUTE statement;
    END LOOP;
    EXECUTE 'SELECT version FROM {schema}.installation' INTO found;
    IF found IS NULL THEN
        EXECUTE $rows$
{sql}
        $rows$;
        EXECUTE 'SELECT version FROM {schema}.installation' INTO found;
    END IF;
    installed := coalesce(installed, found);
"""


def trusted(owner: str, role: str) -> str:
    """Return an SQL condition: `role` has reason to trust `owner`, the owner of the schema or of a function in it.

    The functions may run with the rights of the role that calls them, whatever they are today. So the owner must be a
    role that has these rights anyway: the role itself, a member of it, the database's owner, or a superuser (which is
    a member of every role). Both arguments are SQL expressions.
    """
    return (
        f"(pg_catalog.pg_has_role({owner}, {role}, 'MEMBER')"
        f" OR pg_catalog.pg_has_role({owner}, 'pg_database_owner', 'MEMBER'))"
    )


def schema_sql(grant_to: Sequence[str] = (), *, owner: str | None = None, missing_ok: bool = False) -> str:
    """Return the SQL that installs the event log or upgrades an older one. It changes nothing in a current one.

    Run it with `op.execute()` in a migration of Alembic, or with psql. It is one statement, so it is applied completely
    or not at all. `grant_to` names the roles that apps run as, if another role installs the log. They get the rights
    that `notify()` and the streams need. If such an app needs `SSE_LOG_OWNER`, the SQL raises a warning that says so.
    A role that does not exist is an error, and nothing is installed. With `missing_ok` it is left out instead: a
    developer's database has no role of production.

    The SQL refuses a schema of a role that the installing one has no reason to trust, unless `owner` names that role.
    """
    if isinstance(grant_to, str):
        raise TypeError("grant_to must be a list of roles, not a string.")
    for role in grant_to:
        if role in ("", "public", "none"):  # special to PostgreSQL, even in quotes
            raise ValueError(f"grant_to must be a list of role names, and {role!r} is not one.")
    first, *later = [_STEP.format(number=n, sql=read_sql(f"schema_{n}.sql")) for n in range(1, VERSION + 1)]
    return _INSTALL.format(
        schema=SCHEMA,
        version=VERSION,
        oldest=OLDEST,
        oldest_major=OLDEST // 10000,
        steps="".join([first, _ROWS.format(schema=SCHEMA, sql=read_sql("rows.sql")), *later]),
        repair=read_sql("repair.sql"),
        grant_to=f"ARRAY[{', '.join(map(literal, grant_to))}]::pg_catalog.text[]",
        log_owner="NULL" if owner is None else literal(owner),
        missing_ok=str(missing_ok).lower(),
        trusted_here=trusted("owner::name", "current_user"),
        trusted_by_grantee=trusted("owner::name", "grantee::name"),
    )


def drop_schema_sql() -> str:
    """Return the SQL that drops the event log with all its events."""
    return f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE;\n"


def include_name(name: str | None, type_: str, parent_names: Mapping[str, str | None]) -> bool:
    """Leave the event log out of what Alembic compares: `context.configure(include_name=include_name, …)`.

    With `include_schemas=True`, Alembic's autogenerate would otherwise write a migration that drops the log.
    https://alembic.sqlalchemy.org/en/latest/api/runtime.html, `EnvironmentContext.configure.params.include_name`
    """
    return SCHEMA not in ((name,) if type_ == "schema" else (parent_names.get("schema_name"),))


def literal(text: str) -> str:
    """Return text as an SQL literal that contains no parameters for drivers and no quotes of the script."""
    escaped = re.sub(r"[^\w .@-]", lambda found: f"\\U{ord(found[0]):08x}", text)
    return f"'{text}'" if escaped == text else f"E'{escaped}'"


def read_sql(name: str) -> str:
    return (files(__package__) / "sql" / name).read_text(encoding="utf-8")
