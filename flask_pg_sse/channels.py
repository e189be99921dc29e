"""Check channel names, and know what PostgreSQL makes of them without quotes. No I/O.

A legal name is text of 1 to 255 bytes in UTF-8, without control characters.
"""

from __future__ import annotations

import re

from .errors import InvalidChannel

RESERVED_PREFIX = "flask_pg_sse"
MAX_BYTES = 255
# PostgreSQL's longest name (NAMEDATALEN - 1). LISTEN silently cuts a longer one, and pg_notify() refuses it.
MAX_BYTES_IN_POSTGRES = 63
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc


def check_channel(name: object) -> str:
    """Return `name` if it is a legal channel name.

    A legal name has 1 to 255 bytes in UTF-8 and no control characters. Names that begin with `flask_pg_sse` are
    reserved for the package. Raises `InvalidChannel` (a `ValueError`) for any other value.
    """
    if not isinstance(name, str):
        raise InvalidChannel(f"A channel name must be a string, not {type(name).__name__}.")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidChannel(
            "The channel name is not valid Unicode text: it contains half of a surrogate pair."
        ) from None
    if not 1 <= size <= MAX_BYTES:
        raise InvalidChannel(f"A channel name must have 1 to {MAX_BYTES} bytes in UTF-8; this one has {size}.")
    if _CONTROL.search(name):
        raise InvalidChannel("A channel name must not contain control characters (line ends, tabs, NUL).")
    if name.startswith(RESERVED_PREFIX):
        raise InvalidChannel(f"Channel names that begin with {RESERVED_PREFIX!r} are reserved; choose another.")
    return str.__str__(name)  # a StrEnum may override str() with other text


# https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS
# Not ASCII is any letter. As a range that ends at U+10FFFF it takes 7 ms to compile, a tenth of the package's import.
_IDENTIFIER = re.compile(r"(?:[A-Za-z_]|[^\0-\x7f])(?:[A-Za-z0-9_$]|[^\0-\x7f])*")
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}  # PostgreSQL folds no other letters in UTF-8
_HEARD_UNQUOTED = RESERVED_PREFIX + " unquoted "


def unquoted(name: str) -> str | None:
    """Return what PostgreSQL makes of `name` without quotes: in lower case, cut after 63 bytes.

    Returns None if that is the name itself or a reserved name, or if the name cannot stand there without quotes.
    """
    if not _IDENTIFIER.fullmatch(name):
        return None
    folded = name.translate(_LOWER).encode()[:MAX_BYTES_IN_POSTGRES].decode(errors="ignore")
    return None if folded == name or folded.startswith(RESERVED_PREFIX) else folded


def heard_unquoted(name: str) -> str:
    """Return the channel of a stream that hears only the raw notifications on `name`. It is no legal name."""
    return _HEARD_UNQUOTED + name


def name_heard_unquoted(channel: str) -> str | None:
    """Return the name that `heard_unquoted()` was given for `channel`; None if it was another channel."""
    return channel[len(_HEARD_UNQUOTED) :] if channel.startswith(_HEARD_UNQUOTED) else None
