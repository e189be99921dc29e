"""`flask sse watch` and `flask sse unwatch`: send the changes of a table as events."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import click
import psycopg2

from ..engine.postgres.connect import execute
from ..engine.postgres.triggers import OPERATIONS, WATCHED, Watched, drop_trigger_sql, trigger_sql
from ..repeats import printable
from ..web.blueprint import sse_bp
from .database import database, settings

# Seconds. The triggers need a lock on the table, so this waits for transactions that have changed it.
_TIMEOUT = 60.0
_REMEDIES: dict[type[Exception], str] = {
    psycopg2.errors.InsufficientPrivilege: (
        "Run it as the table's owner, or as a role with TRIGGER on the table and CREATE on its schema."
    ),
}


@sse_bp.cli.command("watch")
@click.argument("table", required=False)
@click.option("--schema", default="public", show_default=True, help="The table's schema.")
@click.option("--channel", metavar="NAME", help="Default: the table's name. orders-{customer_id} has a column's value.")
@click.option(
    "--on",
    multiple=True,
    metavar="KINDS",
    default=[",".join(OPERATIONS)],
    show_default=True,
    help="Which changes. TRUNCATE counts as delete.",
)
@click.option("--columns", multiple=True, metavar="NAMES", help="What is sent besides the key. Default: all columns.")
@click.option("--when", metavar="SQL", help='A condition, such as "NEW.status <> OLD.status".')
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it; needs no database.")
@click.option("--list", "list_", is_flag=True, help="List the tables that are watched.")
def _watch(
    table: str | None,
    schema: str,
    channel: str | None,
    on: Sequence[str],
    columns: Sequence[str],
    when: str | None,
    sql: bool,
    list_: bool,
) -> None:
    """Send each change of TABLE as an event: triggers do it, in the transaction that makes the change.

    The event is called insert, update or delete (or truncate), and its data is JSON. Names are taken exactly as they
    are. Run it again to change something, and after the table's columns have changed.
    """
    if list_:
        _list()
        return
    if table is None:
        raise click.UsageError("Name the table, or ask for --list.")
    try:
        script = trigger_sql(
            table,
            schema=schema,
            channel=channel,
            on=_names(on),
            columns=_names(columns) or None,
            when=when,
            owner=settings().log_owner,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if sql:
        click.echo(script, nl=False)
        return
    with database("The table is not watched", _REMEDIES) as (connection, dsn):
        _run(connection, script)
    click.echo(f"Changes of {schema}.{table} are sent to the channel {channel or table!r} ({dsn}).")


@sse_bp.cli.command("unwatch")
@click.argument("table")
@click.option("--schema", default="public", show_default=True, help="The table's schema.")
@click.option("--channel", metavar="NAME", help="Stop this channel only, named as it was for watch. Default: all.")
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it; needs no database.")
def _unwatch(table: str, schema: str, channel: str | None, sql: bool) -> None:
    """Stop sending the changes of TABLE."""
    script = drop_trigger_sql(table, schema=schema, channel=channel)
    if sql:
        click.echo(script, nl=False)
        return
    with database("The table is still watched", _REMEDIES) as (connection, dsn):
        query = f"{script} SELECT pg_catalog.current_setting('flask_pg_sse.removed')"
        [(removed,)] = execute(connection, query, timeout=_TIMEOUT)
    if removed == "0":
        raise click.ClickException(
            f"No changes of {schema}.{table} were sent ({dsn}). List them: flask sse watch --list"
        )
    click.echo(f"Changes of {schema}.{table} are not sent any more ({dsn}).")


def _list() -> None:
    with database("The tables were not listed", {}) as (connection, dsn):
        found = watched(connection)
    if not found:
        click.echo(f"No table is watched ({dsn}).")
    for one in found:
        click.echo(printable(describe(one)))


def watched(connection: Any) -> list[Watched]:
    """Return the watched tables of a database."""
    return [Watched.read(row) for row in execute(connection, WATCHED, timeout=_TIMEOUT)]


def describe(one: Watched) -> str:
    """Say in a line what is sent of a table, and what is wrong with it."""
    table = f"{one.schema}.{one.table}"
    if one.channel is None:
        return f"{table} -> ? (the comment on its function is not as watch made it: run watch again)"
    said = f"{table} -> {one.channel}: {', '.join(one.on)}"
    if one.columns is not None:
        said += f"; columns {', '.join(one.columns)}"
    if one.when is not None:
        said += f"; when {one.when}"
    if not one.enabled:
        said += " (its triggers are switched off)"
    if one.missing:
        said += f" (the table has no {', '.join(one.missing)} any more: run watch again)"
    return said


def _run(connection: Any, script: str) -> None:
    execute(connection, f"{script} SELECT 1", timeout=_TIMEOUT)


def _names(given: Sequence[str]) -> list[str]:
    """Return the names in lists that are separated by commas; a name with a comma may be quoted."""
    return [name for names in csv.reader(given, skipinitialspace=True) for name in names]
