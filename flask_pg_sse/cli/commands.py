"""The command line: `flask sse …`, in every app that has the blueprint."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import click
import psycopg2
from flask import current_app
from werkzeug.routing import BuildError

from ..engine.postgres import installation, schema
from ..engine.postgres.connect import execute
from ..engine.postgres.retention import prune
from ..errors import PgSSEError
from ..web.api import LONGEST, notify, sse_url
from ..web.blueprint import sse_bp
from . import drop as _drop  # noqa: F401  # these have commands of their own
from . import erase as _erase  # noqa: F401
from . import status as _status  # noqa: F401
from . import tables as _tables  # noqa: F401
from . import tail as _tail  # noqa: F401
from .database import database, settings

# Seconds for one batch of events.
_PRUNE_TIMEOUT = 60.0

sse_bp.cli.help = "Server-Sent Events from PostgreSQL: manage the event log, sign URLs and send events."
sse_bp.cli.short_help = sse_bp.cli.help


@sse_bp.cli.command("init")
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it; needs no database.")
@click.option(
    "--grant-to",
    multiple=True,
    metavar="ROLE",
    help="Let this role use the event log, if the app runs as another role than this command. Repeatable.",
)
def _init(sql: bool, grant_to: tuple[str, ...]) -> None:
    """Install the event log in the app's database, or bring it up to date.

    Every deploy may run this: it changes nothing if the log is up to date.
    """
    try:
        script = schema.schema_sql(grant_to, owner=settings().log_owner)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--grant-to") from None
    if sql:
        click.echo(script, nl=False)
        return
    with database("The event log was not installed", _INIT_REMEDIES) as (connection, dsn):
        before, advice = installation.install(connection, grant_to, owner=settings().log_owner)
    new = schema.VERSION
    if before == 0:
        said = f"Installed version {new} of the event log"
    elif before < new:
        said = f"Upgraded the event log from version {before} to version {new}"
    elif before == new:
        said = f"Version {new} of the event log is already there"
    else:
        said = f"The event log has version {before}, and this flask_pg_sse brings version {new}: left as it is"
    granted = f" Granted to {', '.join(grant_to)}." if grant_to else ""
    click.echo(f"{said} ({dsn}).{granted}")
    if advice:
        click.echo(advice, err=True)


@sse_bp.cli.command("prune")
@click.option(
    "--max-age",
    type=click.FloatRange(min=0, max=LONGEST),
    metavar="SECONDS",
    help="Delete events older than this. Default: the app's SSE_RETENTION.",
)
def _prune(max_age: float | None) -> None:
    """Delete the event log's old events now."""
    with database("The event log was not pruned", _PRUNE_REMEDIES) as (connection, dsn):
        run = functools.partial(execute, connection, timeout=_PRUNE_TIMEOUT)
        log = installation.look_up(run, settings().log_owner)
        if log is None:
            raise installation.NotUsable(_NOT_INSTALLED)
        if max_age is None:
            max_age = settings().retention
        deleted, another = prune(lambda query, args: run(log.guarded(query), tuple(args)), max_age)
    click.echo(f"Deleted {deleted} event{'' if deleted == 1 else 's'} older than {max_age:g} s ({dsn}).")
    if another:
        click.echo("Another session is pruning the log at this moment, so this command stopped.")


@sse_bp.cli.command("sign")
@click.argument("channels", metavar="CHANNEL...", nargs=-1, required=True)
@click.option(
    "--expires", type=float, metavar="SECONDS", help="How long the URL is valid. Default: as long as the secret key."
)
@click.option("--subject", help="The client that the URL is for: disconnect() finds it, and streams count for it.")
@click.option(
    "--external", is_flag=True, help="Print the whole URL, with the site's name: SERVER_NAME or SSE_SERVER_URL."
)
def _sign(channels: tuple[str, ...], expires: float | None, subject: str | None, external: bool) -> None:
    """Print a URL that opens the channels, and no others, to everybody who has it."""
    # Building a path needs a request, and does not need the site's name; with a request the name would be localhost.
    context: Any = nullcontext() if external else current_app.test_request_context()
    try:
        with context:
            click.echo(sse_url(channels, sign=True, expires=expires, subject=subject, external=external))
    except (PgSSEError, ValueError, BuildError, RuntimeError) as error:
        raise click.ClickException(f"The URL was not signed: {error}") from None


@sse_bp.cli.command("notify")
@click.argument("channel")
@click.argument("data")
@click.option("--event", metavar="NAME", help="The event's name in the browser. Default: message.")
@click.option("--id", "id_", metavar="ID", help="The id that the page sees. Default: the event's id in the log.")
def _notify(channel: str, data: str, event: str | None, id_: str | None) -> None:
    """Send an event to every stream that listens to CHANNEL. DATA is sent as it is."""
    try:
        log_id = notify(channel, data, event=event, id=id_)
    except PgSSEError as error:
        raise click.ClickException(f"The event was not sent: {error}") from None
    click.echo(f"Sent to {channel}." if log_id is None else f"Sent to {channel}, as event {log_id} of the log.")


_RIGHTS = (
    'Run it as a role that owns the schema or may create it, or give the output of "flask sse init --sql --grant-to '
    'ROLE" to an administrator.'
)
_INIT_REMEDIES: dict[type[Exception], str] = {
    psycopg2.errors.InsufficientPrivilege: _RIGHTS,
    psycopg2.errors.UndefinedObject: "Create the role first, or correct --grant-to. Nothing has been changed.",
    psycopg2.errors.DeadlockDetected: "Run it again: it conflicted with sessions that were using the log.",
    psycopg2.errors.FeatureNotSupported: "Upgrade PostgreSQL. Without the event log, the older version works too.",
}
_NOT_INSTALLED = 'It is not installed there: run "flask sse init"'
_PRUNE_REMEDIES: dict[type[Exception], str] = {
    psycopg2.errors.InsufficientPrivilege: 'Give the role access with "flask sse init --grant-to ROLE".',
}
