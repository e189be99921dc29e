"""What the schema flask_pg_sse means, read from PostgreSQL's catalogs: to compare two databases of one server.

pg_dump's text is not compared: it changes with its version, and it shows what the server keeps for itself.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from typing import Any

from tests.support.postgres import connect

Catalog = dict[tuple[str, str], dict[str, Any]]


class NotDescribed(AssertionError):
    """The schema holds a kind of object of which this module cannot say whether two are the same."""


# All that depends on the schema and on what stands in it, of whatever kind. Left out is what PostgreSQL makes by itself
# and names by a number: the tables of long values, and the triggers of foreign keys.
_OBJECTS = """
    WITH RECURSIVE found (classid, objid) AS (
        SELECT 'pg_namespace'::regclass::oid, oid FROM pg_namespace WHERE nspname = 'flask_pg_sse'
        UNION
        SELECT d.classid, d.objid FROM pg_depend d
        JOIN found ON d.refclassid = found.classid AND d.refobjid = found.objid
    )
    SELECT classid::regclass::text, objid, o.type, o.identity
    FROM found CROSS JOIN LATERAL pg_identify_object(classid, objid, 0) AS o
    WHERE o.schema IS DISTINCT FROM 'pg_toast'
    AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tableoid = classid AND t.oid = objid AND t.tgisinternal)
"""

# What each kind of object is, by the catalog that it stands in. An object that is not among them is an error.
_PROPERTIES = {
    "pg_namespace": """
        SELECT oid, jsonb_build_object('owner', nspowner::regrole,
            'acl', coalesce(nspacl, acldefault('n', nspowner))::text[])
        FROM pg_namespace""",
    "pg_class": """
        SELECT oid, jsonb_build_object('owner', relowner::regrole,
            'kind', relkind, 'acl',
            coalesce(relacl, acldefault((CASE relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char", relowner))::text[],
            'persistence', relpersistence, 'options', reloptions, 'replica identity', relreplident,
            'row security', ARRAY[relrowsecurity, relforcerowsecurity], 'type', nullif(reloftype, 0)::regtype,
            'long values', (SELECT t.reloptions FROM pg_class t WHERE t.oid = c.reltoastrelid),
            'access', (SELECT amname FROM pg_am WHERE pg_am.oid = relam),
            'tablespace', (SELECT spcname FROM pg_tablespace s WHERE s.oid = reltablespace),
            'partition', ARRAY[pg_get_partkeydef(oid), pg_get_expr(relpartbound, oid)],
            'parents', ARRAY(SELECT inhparent::regclass FROM pg_inherits WHERE inhrelid = oid ORDER BY inhseqno),
            'view', CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END,
            'index', (SELECT jsonb_build_array(pg_get_indexdef(oid), indisclustered, indisreplident, indisvalid)
                FROM pg_index WHERE indexrelid = oid),
            'sequence', (SELECT jsonb_build_array(seqtypid::regtype, seqstart, seqincrement, seqmin, seqmax, seqcache,
                seqcycle) FROM pg_sequence WHERE seqrelid = oid),
            'of column', ARRAY(SELECT pg_describe_object(refclassid, refobjid, refobjsubid) FROM pg_depend d
                WHERE d.classid = c.tableoid AND d.objid = oid AND refobjsubid > 0 AND deptype IN ('a', 'i')))
        FROM pg_class c""",
    "pg_proc": """
        SELECT oid, jsonb_build_object('owner', proowner::regrole,
            'acl', coalesce(proacl, acldefault('f', proowner))::text[], 'is', pg_get_functiondef(oid))
        FROM (SELECT * FROM pg_proc WHERE prokind <> 'a') AS p""",
    "pg_type": """
        SELECT oid, jsonb_build_object('owner', typowner::regrole,
            'acl', coalesce(typacl, acldefault('T', typowner))::text[], 'kind', typtype,
            'base', format_type(nullif(typbasetype, 0), typtypmod), 'not null', typnotnull, 'default', typdefault,
            'collation', nullif(typcollation, 0)::regcollation,
            'labels', ARRAY(SELECT enumlabel FROM pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder))
        FROM (SELECT * FROM pg_type WHERE typtype IN ('c', 'd', 'e') OR typcategory = 'A') AS t""",
    "pg_constraint": """
        SELECT oid, jsonb_build_object('is', pg_get_constraintdef(oid), 'kind', contype, 'local', conislocal,
            'deferred', ARRAY[condeferrable, condeferred])
        FROM pg_constraint""",
    "pg_attrdef": "SELECT oid, jsonb_build_object('is', pg_get_expr(adbin, adrelid)) FROM pg_attrdef",
    "pg_trigger": "SELECT oid, jsonb_build_object('is', pg_get_triggerdef(oid), 'fires', tgenabled) FROM pg_trigger",
    "pg_rewrite": "SELECT oid, jsonb_build_object('is', pg_get_ruledef(oid), 'fires', ev_enabled) FROM pg_rewrite",
    "pg_policy": """
        SELECT oid, jsonb_build_object('command', polcmd, 'permissive', polpermissive,
            'roles', ARRAY(SELECT pg_get_userbyid(role) FROM unnest(polroles) AS role ORDER BY 1),
            'using', pg_get_expr(polqual, polrelid), 'check', pg_get_expr(polwithcheck, polrelid))
        FROM pg_policy""",
    "pg_statistic_ext": """
        SELECT oid, jsonb_build_object('owner', stxowner::regrole, 'is', pg_get_statisticsobjdef(oid),
            'target', stxstattarget)
        FROM pg_statistic_ext""",
    "pg_default_acl": """
        SELECT oid, jsonb_build_object('of', defaclrole::regrole, 'for', defaclobjtype, 'acl', defaclacl::text[])
        FROM pg_default_acl""",
}
_COLUMNS = """
    SELECT attrelid::regclass || '.' || quote_ident(attname), jsonb_build_object(
        'place', row_number() OVER (PARTITION BY attrelid ORDER BY attnum), 'acl', attacl::text[],
        'type', format_type(atttypid, atttypmod), 'not null', attnotnull,
        'collation', nullif(attcollation, 0)::regcollation,
        'identity', attidentity, 'generated', attgenerated, 'storage', attstorage,
        'compression', to_jsonb(a) -> 'attcompression', 'statistics', attstattarget, 'options', attoptions,
        'foreign', attfdwoptions, 'inherited', ARRAY[attislocal, attinhcount > 0],
        'comment', col_description(attrelid, attnum))
    FROM pg_attribute a WHERE attrelid = ANY (%s) AND attnum > 0 AND NOT attisdropped
"""
_COMMENTS = "SELECT objoid, description FROM pg_description WHERE classoid = %s::regclass AND objsubid = 0"
_LABELS = "SELECT objoid, objsubid, provider, label FROM pg_seclabel WHERE classoid = %s::regclass ORDER BY 2, 3"


def read_catalog(url: str) -> Catalog:
    """Return every object of the schema, by kind and name, with every property that a user can give it."""
    with closing(connect(url)) as connection, connection.cursor() as cursor:
        return describe(cursor)


def describe(cursor: Any) -> Catalog:
    """As `read_catalog`, in the transaction of `cursor`."""

    def rows(query: str, *args: Any) -> list[Any]:
        cursor.execute(query, args)
        return list(cursor.fetchall())

    names: dict[str, dict[int, tuple[str, str]]] = defaultdict(dict)
    for catalog, oid, kind, name in rows(_OBJECTS):
        names[catalog][oid] = kind, name
    found: Catalog = {}
    for catalog, named in names.items():
        query = _PROPERTIES.get(catalog)
        properties = dict(rows(f"{query} WHERE oid = ANY (%s)", [*named])) if query else {}
        if unknown := [name for oid, name in named.items() if oid not in properties]:
            raise NotDescribed(f"tests/catalog.py has to learn what these are, in {catalog}: {unknown}")
        for oid, name in named.items():
            found[name] = {**_comparable(properties[oid]), "comment": None, "labels": []}
        for oid, comment in rows(_COMMENTS, catalog):
            if oid in named:
                found[named[oid]]["comment"] = comment
        for oid, *label in rows(_LABELS, catalog):
            if oid in named:
                found[named[oid]]["labels"].append(label)
    for name, column in rows(_COLUMNS, [*names["pg_class"]]):
        found["column", name] = _comparable(column)
    return found


def _comparable(properties: dict[str, Any]) -> dict[str, Any]:
    """Put in order what has none, and leave out options that are the server's own.

    Debian's PostgreSQL 15.20 counts versions of a column in an option pg_attver: "pg_" begins the names that are the
    server's, everywhere in PostgreSQL.
    """
    for name in ("acl", "options", "long values", "foreign"):
        if name in properties:
            items = properties[name] or ()
            properties[name] = sorted(item for item in items if name == "acl" or not item.startswith("pg_"))
    return properties
