"""Send the changes of a table as events: the SQL of `flask sse watch` and `flask sse unwatch`.

`sql/watch.sql` makes one function for each watched table and channel, in the table's schema, and the triggers that call
it: one for a statement, with all rows of it. `sql/watch_body.sql` is the function's body. It works with and without the
event log, and is not a part of the log's schema, so `drop_schema_sql()` does not break the table's writers.

The function is SECURITY DEFINER: a role that may change the table needs no right on the log. No role but the function's
owner may attach it to another table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...channels import check_channel
from .schema import literal, read_sql, trusted

OPERATIONS = ("insert", "update", "delete")
# A column's name in braces, or a doubled brace, which stands for itself.
_IN_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_VALUE = re.compile(r"@(\w+)@")

# The watched tables: what the comment on the function says, whether a trigger is on, and the columns of today.
WATCHED = r"""
SELECT n.nspname::pg_catalog.text, c.relname::pg_catalog.text,
    pg_catalog.obj_description(p.oid, 'pg_proc'), pg_catalog.bool_or(t.tgenabled <> 'D'),
    ARRAY(
        SELECT a.attname::pg_catalog.text FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.proname ~ '^flask_pg_sse_watch_[0-9a-f]{16}$' AND NOT t.tgisinternal AND t.tgparentid = 0
GROUP BY n.nspname, c.relname, c.oid, p.oid
ORDER BY 1, 2, 3
"""


def trigger_sql(
    table: str,
    *,
    schema: str = "public",
    channel: str | None = None,
    on: Sequence[str] = OPERATIONS,
    columns: Sequence[str] | None = None,
    when: str | None = None,
    owner: str | None = None,
) -> str:
    """Return the SQL that makes PostgreSQL send each change of a table as an event.

    Run it with `op.execute()` in a migration of Alembic, or with psql; `flask sse watch` runs the same. It is one
    statement, and replaces what it made before for the same table and channel.

    table, schema: their names, exactly as they are.
    channel:       the channel's name; the table's by default. `orders-{customer_id}` has the value of a column in it.
    on:            some of "insert", "update" and "delete" (TRUNCATE counts as "delete").
    columns:       the columns that are sent, besides the key; by default those that the table has now.
    when:          a condition in SQL, with the rows NEW and OLD. It is your own SQL and runs with your rights.
    owner:         the role that owns the event log, if it must be trusted by name, as by `SSE_LOG_OWNER`.

    Raises `ValueError` if one of them cannot be right. PostgreSQL refuses a wrong table, column or condition.
    """
    wanted = _several("on", on)
    if not wanted or not set(wanted) <= set(OPERATIONS):
        raise ValueError(f"on must be some of {', '.join(OPERATIONS)}, not {', '.join(wanted) or 'nothing'}.")
    named = None if columns is None else _several("columns", columns)
    if named == []:
        raise ValueError("columns must name at least one column.")
    if when is not None and not when.strip():
        raise ValueError("when must be a condition in SQL.")
    template = table if channel is None else channel
    about = {
        "channel": template,
        "on": [one for one in OPERATIONS if one in wanted],
        "columns": named,
        "when": when,
    }
    return _fill(
        "watch.sql",
        schema=literal(schema),
        table=literal(table),
        channel=_array(_parts(table, channel)),
        mark=literal(_mark(template)),
        on=_array([one for one in OPERATIONS if one in wanted]),
        columns="NULL" if named is None else _array(named),
        when="NULL" if when is None else literal(when),
        log_owner="NULL" if owner is None else literal(owner),
        about=literal(json.dumps(about)),
        **dict(zip(("body_start", "body_end"), _body(), strict=True)),
    )


def drop_trigger_sql(table: str, *, schema: str = "public", channel: str | None = None) -> str:
    """Return the SQL that undoes `trigger_sql()` for a table: for one of its channels, or for all by default.

    It is no error if the table is gone already, or was not watched.
    """
    return _fill(
        "unwatch.sql",
        schema=literal(schema),
        table=literal(table),
        mark="NULL" if channel is None else literal(_mark(channel)),
    )


@dataclass(frozen=True, slots=True)
class Watched:
    """A table whose changes are sent to a channel. `missing` are the columns that the table no longer has.

    `channel` is None if nobody knows: somebody has changed the comment that has all this, or a dump has left it out.
    """

    schema: str
    table: str
    channel: str | None
    on: Sequence[str]
    columns: Sequence[str] | None
    when: str | None
    enabled: bool
    missing: Sequence[str]

    @classmethod
    def read(cls, row: Sequence[Any]) -> Watched:
        """Read a row of the query `WATCHED`."""
        schema, table, comment, enabled, present = row
        about: dict[str, Any] = {"channel": None, "on": (), "columns": None, "when": None}
        missing: list[str] = []
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(comment)
            about = {key: said[key] for key in about}
            missing = [name for name in said["sent"] if name not in present]
        return cls(schema, table, enabled=enabled, missing=missing, **about)


def _several(name: str, value: Sequence[str]) -> list[str]:
    if isinstance(value, str):
        raise TypeError(f"{name} must be a list, not a string.")
    return list(value)


def _parts(table: str, channel: str | None) -> list[str]:
    """Return the text between the columns of a channel's template, and the columns' names, by turns."""
    if channel is None:
        check_channel(table)
        return [table]
    parts = [""]
    end = 0
    for found in _IN_BRACES.finditer(channel):
        parts[-1] += channel[end : found.start()]
        end = found.end()
        if found[1] is not None:
            parts += [found[1], ""]
        elif len(found[0]) == 2:
            parts[-1] += found[0][0]
        else:
            raise ValueError(f"The channel {channel!r} has a brace without its partner; write it twice.")
    parts[-1] += channel[end:]
    # The shortest name that it can give, because a column may be empty text.
    check_channel("".join(parts[::2]) or "x")
    return parts


def _mark(channel: str) -> str:
    """Return what the names of the triggers for a channel have in common."""
    return hashlib.sha256(channel.encode()).hexdigest()[:8]


def _array(texts: Sequence[str]) -> str:
    return f"ARRAY[{', '.join(map(literal, texts))}]::pg_catalog.text[]"


def _body() -> list[str]:
    """Return the text of the function before and after the queries that `watch.sql` makes for the table."""
    return _fill("watch_body.sql", open="@@", trusted=trusted("s.nspowner", "current_user")).split("@@")


def _fill(name: str, **values: str) -> str:
    """Return a script with its values. The parts that several scripts have are among them."""

    def value(found: re.Match[str]) -> str:
        return values[found[1]] if found[1] in values else _fill(f"watch_{found[1]}.sql").rstrip()

    values |= {
        "cast_trusted": trusted("p.proowner", "current_user"),
        "type_trusted": trusted("y.typowner", "current_user"),
    }
    return _VALUE.sub(value, read_sql(name))
