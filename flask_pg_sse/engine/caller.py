"""Check a caller's own connection, and run queries in its transaction: psycopg2, psycopg 3 or SQLAlchemy.

Each is used through its own `execute`. SQLAlchemy and psycopg 3 are never imported here: they are used only if the
caller has imported them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import psycopg2.extensions


def check_caller(connection: Any) -> None:
    """Raise TypeError for a connection that `execute_on()` cannot use. The message says what to do."""
    if _is_sqlalchemy(connection):
        return
    kind = _kind(connection)
    if kind.startswith("sqlalchemy.ext.asyncio"):
        raise TypeError(
            f"notify() cannot use an asynchronous {kind}. Call it with the synchronous session inside it: "
            'await session.run_sync(lambda s: notify("orders", data, connection=s)).'
        )
    methods = [getattr(connection, name, None) for name in ("cursor", "execute", "commit")]
    if getattr(connection, "async_", 0) or any(map(inspect.iscoroutinefunction, methods)):
        raise TypeError(f"notify() cannot use an asynchronous {kind}; give it a synchronous connection.")
    if not callable(methods[0]) or not callable(methods[2]):
        raise TypeError(
            f"notify(connection=…) takes a psycopg2 or psycopg 3 connection, or an SQLAlchemy Connection, Session or "
            f"scoped_session (db.session), not {kind}."
        )


def execute_on(connection: Any, query: str, args: Sequence[Any] = ()) -> list[Any]:
    """Run a query on a caller's connection, through its own `execute`, and return the rows.

    Each `{}` in the query is a placeholder for an argument. Raises TypeError if the database is not PostgreSQL.
    """
    if _is_sqlalchemy(connection):
        _refuse_other_engine((connection.get_bind() if hasattr(connection, "get_bind") else connection).dialect.name)
        text = sys.modules["sqlalchemy"].text(query.format(*(f":arg{number}" for number in range(len(args)))))
        result = connection.execute(text, {f"arg{number}": arg for number, arg in enumerate(args)})
        return list(result.fetchall()) if result.returns_rows else []
    _refuse_other_engine("sqlite" if _kind(connection).startswith("sqlite3.") else "postgresql")
    # Rows must be tuples, even if the caller has chosen another row type.
    if isinstance(connection, psycopg2.extensions.connection):
        options: dict[str, Any] = {"cursor_factory": psycopg2.extensions.cursor}
    else:
        options = {"row_factory": sys.modules["psycopg.rows"].tuple_row} if "psycopg.rows" in sys.modules else {}
    with connection.cursor(**options) as cursor:
        cursor.execute(query.format(*["%s"] * len(args)), tuple(args))
        return list(cursor.fetchall())


def _is_sqlalchemy(connection: Any) -> bool:
    orm = sys.modules.get("sqlalchemy.orm")
    engine = sys.modules.get("sqlalchemy.engine")
    return (orm is not None and isinstance(connection, orm.Session | orm.scoped_session)) or (
        engine is not None and isinstance(connection, engine.Connection)
    )


def _kind(connection: Any) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refuse_other_engine(engine: str) -> None:
    if engine != "postgresql":
        raise TypeError(
            f"notify(connection=…) needs a PostgreSQL connection, and this one is for {engine}. In tests without "
            "PostgreSQL use flask_pg_sse.testing.capture(app)."
        )
