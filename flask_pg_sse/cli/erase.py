"""`flask sse erase`: take back what events of the log said, before they are pruned."""

from __future__ import annotations

import click
import psycopg2

from ..engine.postgres.connect import execute
from ..engine.postgres.schema import literal
from ..web.blueprint import sse_bp
from .database import database

# Seconds.
_TIMEOUT = 600.0
_REMEDIES: dict[type[Exception], str] = {
    psycopg2.errors.InsufficientPrivilege: (
        "With --where, run it as the role that owns the log: the condition reads its table. A channel can be erased by "
        "every role that may use the log."
    ),
    psycopg2.errors.InvalidSchemaName: "There is no event log to erase from.",
}
_ERASE = "SELECT flask_pg_sse.erase({channel}::pg_catalog.text, {ids}::bigint[])"
# The condition is evaluated here, with the rights of the role that runs the command, and not in erase(). It sees the
# channel's events alone: OFFSET keeps it from those whose data it may not be able to read.
_FOUND = (
    "ARRAY(SELECT e.id FROM (SELECT * FROM flask_pg_sse.event WHERE channel = coalesce({channel}, channel) OFFSET 0) "
    "AS e WHERE ({where}\n))"
)


@sse_bp.cli.command("erase")
@click.argument("channel", required=False)
@click.option(
    "--where",
    metavar="SQL",
    help="A condition on the columns id, channel, fields, data and created_at: \"data::json ->> 'user' = '7'\".",
)
def _erase(channel: str | None, where: str | None) -> None:
    """Erase the events of CHANNEL, or those that a condition finds, or both together.

    Their text goes, also from the workers' memory. Their ids stay, so browsers resume as before, and are told nothing.
    Events that were sent already cannot be taken back.
    """
    if channel is None and where is None:
        raise click.UsageError("Name a channel, or a condition with --where, or both.")
    name = "NULL" if channel is None else literal(channel)
    found = "NULL" if where is None else _FOUND.format(channel=name, where=where)
    query = _ERASE.format(channel=name, ids=found)
    with database("Nothing was erased", _REMEDIES) as (connection, dsn):
        [(number,)] = execute(connection, query, timeout=_TIMEOUT)
    click.echo(f"Erased {number} event{'' if number == 1 else 's'} ({dsn}).")
    if number:
        click.echo("The text is gone from PostgreSQL's files after: VACUUM flask_pg_sse.event, flask_pg_sse.pending")
