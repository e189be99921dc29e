"""Use psycopg2 and psycopg 3 with conversions of our own, whatever an app has registered with them.

psycopg2's adapters and typecasters belong to the process: `register_adapter(list, Json)` in an app changes every list
on every connection. psycopg 3 has its own for the process, and for each connection. The cursors here quote arguments
themselves, with libpq's functions, and read values with what the drivers come with. Nothing is registered for the
process or for an app's connection.
https://www.psycopg.org/docs/extensions.html#sql-adaptation-protocol-objects
https://www.psycopg.org/psycopg3/docs/advanced/adapt.html
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import BOOLEAN, FLOAT, INTEGER, LONGINTEGER, UNICODE, QuotedString, new_type, register_type

# The types that the package's queries return. These objects are psycopg2's own, not what an app has registered.
_TYPECASTERS = (BOOLEAN, INTEGER, LONGINTEGER, FLOAT, UNICODE, psycopg2.BINARY, new_type((2278,), "VOID", UNICODE))


def use_own_typecasters(target: Any) -> None:
    """Let a psycopg2 connection or cursor read values with psycopg2's own typecasters."""
    for typecaster in _TYPECASTERS:
        register_type(typecaster, target)


class Psycopg2Cursor(psycopg2.extensions.cursor):
    """A cursor that quotes arguments itself. Rows are tuples.

    Arguments are text, numbers, None, or lists of these. (Objects that psycopg2 quotes without a registered adapter,
    such as QuotedString, cost six times as much when they are arguments.)
    """

    def execute(self, query: Any, args: Any = None) -> None:
        super().execute(_with_literals(query, args, self._quote) if args else query)

    def _quote(self, text: str) -> bytes:
        quoted = QuotedString(text)
        quoted.prepare(self.connection)
        return quoted.getquoted()


class _ReadingPsycopg2Cursor(Psycopg2Cursor):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        use_own_typecasters(self)


@functools.cache
def _psycopg_kinds() -> tuple[Any, Any]:
    psycopg: Any = sys.modules["psycopg"]

    class PsycopgCursor(psycopg.Cursor):  # type: ignore[misc]
        def execute(self, query: Any, args: Any = None, **_: Any) -> Any:
            # Not prepared, because each query is another text.
            return super().execute(_with_psycopg_literals(self, query, args), prepare=False)

    class AsyncPsycopgCursor(psycopg.AsyncCursor):  # type: ignore[misc]
        async def execute(self, query: Any, args: Any = None, **_: Any) -> Any:
            return await super().execute(_with_psycopg_literals(self, query, args), prepare=False)

    return PsycopgCursor, AsyncPsycopgCursor


def _with_psycopg_literals(cursor: Any, query: Any, args: Any) -> Any:
    if not args:
        return query
    connection = cursor.connection
    encoding = connection.info.encoding
    encoding = "utf-8" if encoding == "ascii" else encoding  # SQL_ASCII takes any bytes
    escape = sys.modules["psycopg"].pq.Escaping(connection.pgconn).escape_literal
    return _with_literals(query, args, lambda text: bytes(escape(text.encode(encoding))))


def _psycopg_cursor(connection: Any, *, reads: bool, **_: Any) -> Any:
    psycopg: Any = sys.modules["psycopg"]
    asynchronous = isinstance(connection, psycopg.AsyncConnection)
    cursor = _psycopg_kinds()[asynchronous](connection, row_factory=psycopg.rows.tuple_row)
    if reads or asynchronous:  # SQLAlchemy reads all rows of an asynchronous cursor
        types = psycopg.types
        cursor.adapters.register_loader(16, types.bool.BoolLoader)
        cursor.adapters.register_loader(17, types.string.ByteaLoader)
        cursor.adapters.register_loader(23, types.numeric.IntLoader)
        cursor.adapters.register_loader(25, types.string.TextLoader)
        cursor.adapters.register_loader(2278, types.string.TextLoader)  # void
    return cursor


def _with_literals(query: str, args: Any, quote: Callable[[str], bytes]) -> bytes:
    """Return a query with its `%s`, or `%(name)s`, replaced by literals."""
    if isinstance(args, Mapping):
        return query.encode() % {name.encode(): _literal(value, quote) for name, value in args.items()}
    return query.encode() % tuple([_literal(value, quote) for value in args])


def _literal(value: Any, quote: Callable[[str], bytes]) -> bytes:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return b"ARRAY[%b]" % b",".join([_literal(item, quote) for item in value]) if value else b"'{}'"
    if value is None:
        return b"NULL"
    return b"'%a'::pg_catalog.float8" % value if isinstance(value, float) else b"%d" % value


def is_psycopg2(connection: Any) -> bool:
    return isinstance(connection, psycopg2.extensions.connection)


def _is_psycopg(connection: Any) -> bool:
    psycopg: Any = sys.modules.get("psycopg")
    return psycopg is not None and isinstance(connection, (psycopg.Connection, psycopg.AsyncConnection))


def new_cursor(connection: Any, *, reads: bool) -> Any:
    """Return a cursor as above on a caller's connection. With a driver that is neither it is the driver's.

    `reads` tells whether rows will be read, which costs more.
    """
    if is_psycopg2(connection):
        return connection.cursor(cursor_factory=_ReadingPsycopg2Cursor if reads else Psycopg2Cursor)
    return _psycopg_cursor(connection, reads=reads) if _is_psycopg(connection) else connection.cursor()


@contextmanager
def own_cursors(connection: Any, *, reads: bool) -> Iterator[None]:
    """Let a connection, which no other thread may use meanwhile, make cursors as above."""
    if is_psycopg2(connection):
        factory: Any = _ReadingPsycopg2Cursor if reads else Psycopg2Cursor
    elif _is_psycopg(connection):
        factory = functools.partial(_psycopg_cursor, reads=reads)
    else:
        yield
        return
    before, connection.cursor_factory = connection.cursor_factory, factory
    try:
        yield
    finally:
        connection.cursor_factory = before
