"""Check a caller's own connection, and run queries in its transaction: psycopg2, psycopg 3 or SQLAlchemy.

Each is used through its own `execute`. SQLAlchemy and psycopg 3 are never imported here: they are used only if the
caller has imported them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import IN_TESTS
from .drivers import is_psycopg2, new_cursor, own_cursors


def check_caller(connection: Any, what: str) -> None:
    """Raise TypeError for a connection that the functions below cannot use. The message says what to do.

    `what` is the name of the function that was called with it.
    """
    if _is_sqlalchemy(connection):
        return
    kind = _kind(connection)
    if kind.startswith("sqlalchemy.ext.asyncio"):
        arguments = '"orders", data, ' if what == "notify" else ""
        raise TypeError(
            f"{what}() cannot use an asynchronous {kind}. Call it with the synchronous session inside it: "
            f"await session.run_sync(lambda s: {what}({arguments}connection=s))."
        )
    methods = [getattr(connection, name, None) for name in ("cursor", "execute", "commit")]
    if getattr(connection, "async_", 0) or any(map(inspect.iscoroutinefunction, methods)):
        raise TypeError(f"{what}() cannot use an asynchronous {kind}; give it a synchronous connection.")
    if not callable(methods[0]) or not callable(methods[2]):
        raise TypeError(
            f"{what}(connection=…) takes a psycopg2 or psycopg 3 connection, or an SQLAlchemy Connection, Session or "
            f"scoped_session (db.session), not {kind}."
        )


def send_on(connection: Any, query: str, args: Sequence[Any]) -> None:
    """Run a query on a caller's connection, through its own `execute`. Its rows are not read.

    Each `{}` in the query is a placeholder for an argument: text, or a list of text and None. What the app has
    registered with its driver does not change them. Raises TypeError if the database is not PostgreSQL.
    """
    _execute_on(connection, query, args, reads=False)


def read_on(connection: Any, query: str) -> list[Any]:
    """Run a query as `send_on()` does, and return the rows. What the app has registered does not change them."""
    return _execute_on(connection, query, (), reads=True)


def _execute_on(connection: Any, query: str, args: Sequence[Any], *, reads: bool) -> list[Any]:
    if _is_sqlalchemy(connection):
        return _execute_on_sqlalchemy(connection, query, args, reads=reads)
    if not is_psycopg2(connection):
        _refuse_other_engine("sqlite" if _kind(connection).startswith("sqlite3.") else "postgresql")
        connection = getattr(connection, "driver_connection", connection)  # of SQLAlchemy's raw_connection()
    with new_cursor(connection, reads=reads) as cursor:
        cursor.execute(query.format(*["%s"] * len(args)), tuple(args))
        return list(cursor.fetchall()) if reads else []


def _execute_on_sqlalchemy(connection: Any, query: str, args: Sequence[Any], *, reads: bool) -> list[Any]:
    text = sys.modules["sqlalchemy"].text(query.format(*(f":arg{number}" for number in range(len(args)))))
    if hasattr(connection, "get_bind"):
        connection = connection.connection(bind_arguments={"clause": text})
    _refuse_other_engine(connection.dialect.name)
    if not reads and commits_writes(connection):
        text = text.execution_options(autocommit=True)  # it does not see that this SELECT writes
    # The app's options for large results would make a server-side cursor, which runs the query when rows are read.
    changed = dict.fromkeys({"stream_results", "yield_per"}.intersection(connection.get_execution_options()))
    options = {"execution_options": changed} if changed else {}
    if changed and _is_legacy(connection):  # it takes no options here, and gives a copy on the same transaction
        connection, options = connection.execution_options(**changed), {}
    with own_cursors(connection.connection.driver_connection, reads=reads):
        result = connection.execute(text, {f"arg{number}": arg for number, arg in enumerate(args)}, **options)
    if reads:
        return list(result.fetchall())
    result.close()
    return []


def _is_legacy(connection: Any) -> bool:
    # A `Connection` of SQLAlchemy 1.4, unless the engine was made with future=True.
    return not getattr(connection, "_is_future", True)


def commits_writes(connection: Any) -> bool:
    """Tell whether an SQLAlchemy `Connection` commits each statement that it takes for a write: 1.4's, if not begun.

    https://docs.sqlalchemy.org/en/14/core/connections.html#library-level-autocommit
    """
    return _is_legacy(connection) and not connection.in_transaction()


def _is_sqlalchemy(connection: Any) -> bool:
    orm = sys.modules.get("sqlalchemy.orm")
    engine = sys.modules.get("sqlalchemy.engine")
    return (orm is not None and isinstance(connection, orm.Session | orm.scoped_session)) or (
        engine is not None and isinstance(connection, engine.Connection)
    )


def to_session(connection: Any) -> Any:
    """Return the SQLAlchemy session that a caller gave, the one behind a `scoped_session`, or None."""
    orm: Any = sys.modules.get("sqlalchemy.orm")
    if orm is None:
        return None
    if isinstance(connection, orm.scoped_session):
        return connection()
    return connection if isinstance(connection, orm.Session) else None


def _kind(connection: Any) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refuse_other_engine(engine: str) -> None:
    if engine != "postgresql":
        raise TypeError(f"connection= must be for PostgreSQL, and this one is for {engine}. {IN_TESTS}")
