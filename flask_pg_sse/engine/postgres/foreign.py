"""Listen in a database whose encoding is not UTF-8.

PostgreSQL converts a notification to the client's encoding when it sends it. If it cannot, it ends the session, and
any role that may connect can send such bytes. So a connection that listens there has the client encoding SQL_ASCII,
with which PostgreSQL converts nothing by itself. The bytes are then converted by a query, which may fail harmlessly
and which knows PostgreSQL's own tables (Python's differ from them for EUC_JP and EUC_KR). What is sent is ASCII, with
a call of convert_from() for any other text.
https://www.postgresql.org/docs/current/multibyte.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import UNICODE, Notify, encodings, new_type, quote_ident, register_type

from ...errors import InvalidEvent
from ..drivers import Psycopg2Cursor

# The client encoding with which PostgreSQL converts nothing, and the key that psycopg2 has for it.
UNCONVERTED = "SQL_ASCII"
_KEY = "SQLASCII"
# For psycopg2, each byte is one character.
_BYTES = "iso8859_1"
_CONVERT = """
SELECT pg_catalog.convert(pg_catalog.decode(t.text, 'hex'), pg_catalog.getdatabaseencoding(), 'UTF8')
FROM pg_catalog.unnest(%s::pg_catalog.text[]) WITH ORDINALITY AS t (text, number) ORDER BY t.number
"""
_NOT_CONVERTED = (psycopg2.errors.CharacterNotInRepertoire, psycopg2.errors.UntranslatableCharacter)

Run = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]


class ForeignConnection(psycopg2.extensions.connection):
    """A connection with the client encoding SQL_ASCII, whose strings have one character for each byte.

    psycopg2 drops, without a word, a notification that it cannot decode, and decodes this encoding as ASCII. It looks
    up the codec while it connects, in a table of the process, and keeps it. So the table has another codec during
    these calls, in which neither psycopg2 nor gevent lets another thread or greenlet run.
    """

    def poll(self) -> Any:
        if self.status == psycopg2.extensions.STATUS_READY:
            return super().poll()
        codec, encodings[_KEY] = encodings[_KEY], _BYTES
        try:
            return super().poll()
        finally:
            encodings[_KEY] = codec


class ForeignCursor(Psycopg2Cursor):
    """A cursor for queries that begin with `SETTINGS`, so that answers come in UTF-8."""

    def _quote(self, text: str) -> bytes:
        return super()._quote(text) if text.isascii() else _literal(text).encode()


# PostgreSQL sends no notification within a transaction, so this one is never converted.
SETTINGS = "SET LOCAL client_encoding = 'UTF8'; "
_TEXT = new_type(UNICODE.values, "TEXT", lambda value, _: None if value is None else _utf8(value))


def _utf8(value: Any) -> str:
    return bytes(value.encode(_BYTES)).decode()


def prepare(connection: Any) -> None:
    """Let a new connection read text from the answers to queries of `ForeignCursor`."""
    register_type(_TEXT, connection)


def is_foreign(connection: Any) -> bool:
    """Tell whether the connection's database has another encoding than UTF-8."""
    return bool(connection.info.parameter_status("server_encoding") != "UTF8")


def listen(command: str, name: str, connection: Any) -> str:
    """Return a statement: LISTEN or UNLISTEN, for one of PostgreSQL's channels."""
    if name.isascii() or not isinstance(connection, ForeignConnection):
        return f"{command} {quote_ident(name, connection)}"
    return f"DO $$ BEGIN EXECUTE pg_catalog.concat('{command} ', pg_catalog.quote_ident({_literal(name)})); END $$"


def _literal(text: str) -> str:
    return f"pg_catalog.convert_from(pg_catalog.decode('{text.encode().hex()}', 'hex'), 'UTF8')"


def take(connection: Any, run: Run, drop: Callable[[InvalidEvent], None]) -> list[Any]:
    """Take the notifications that a connection has received, in order, as text.

    `run` executes a query on it. `drop` is called for each notification that is not text in the database's encoding.
    """
    came, connection.notifies = connection.notifies, []
    if not isinstance(connection, ForeignConnection):
        return list(came)
    taken: list[Any] = []
    while came:
        taken += _converted(came, run, drop)
        came, connection.notifies = connection.notifies, []  # what came during the queries
    return taken


def _converted(came: Sequence[Any], run: Run, drop: Callable[[InvalidEvent], None]) -> list[Any]:
    texts = [text.encode(_BYTES).hex() for one in came if not _is_ascii(one) for text in (one.channel, one.payload)]
    try:
        found = iter([bytes(row[0]).decode() for row in run(_CONVERT, (texts,))] if texts else [])
    except _NOT_CONVERTED:
        if len(came) == 1:
            drop(InvalidEvent("It is not text in the database's encoding."))
            return []
        half = len(came) // 2
        return _converted(came[:half], run, drop) + _converted(came[half:], run, drop)
    return [one if _is_ascii(one) else Notify(one.pid, next(found), next(found)) for one in came]


def _is_ascii(one: Any) -> bool:
    return bool(one.payload.isascii() and one.channel.isascii())
