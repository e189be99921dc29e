"""The database of the current app, for the commands that look into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import psycopg2

from ..engine.postgres import installation
from ..engine.postgres.connect import connect
from ..engine.postgres.dsn import Dsn
from ..errors import PgSSEError
from ..repeats import one_line, sentence
from ..settings import Settings
from ..web.state import current_state


def settings() -> Settings:
    """Return the settings of the current app."""
    return current_state().runtime.settings


@contextmanager
def database(failed: str, remedies: dict[type[Exception], str]) -> Iterator[tuple[Any, Dsn]]:
    """Connect to the app's database. Any failure becomes one line that says what failed, why, and the remedy."""
    try:
        dsn, _ = current_state().runtime.databases()
    except PgSSEError as error:
        raise click.ClickException(f"{failed}: {error}") from None
    try:
        connection = connect(dsn, "flask_pg_sse cli")
        try:
            yield connection, dsn
        finally:
            connection.close()
    except PgSSEError as error:
        raise click.ClickException(f"{failed}: {error}") from None
    except installation.NotUsable as error:
        raise click.ClickException(f"{failed} ({dsn}): {error}.") from None
    except (TimeoutError, psycopg2.errors.QueryCanceled, psycopg2.errors.LockNotAvailable):
        raise click.ClickException(
            f"{failed} ({dsn}): PostgreSQL did not finish in time. Look in pg_stat_activity for what blocks it."
        ) from None
    except psycopg2.Error as error:
        # A server's message is usually one line, but a translation or an extension may use several.
        why = one_line(error.diag.message_primary or error)
        remedy = next((text for kind, text in remedies.items() if isinstance(error, kind)), error.diag.message_hint)
        raise click.ClickException(f"{failed} ({dsn}): {sentence(why)} {remedy or ''}".rstrip()) from None
