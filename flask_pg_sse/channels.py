"""Check channel names. A legal name is text of 1 to 255 bytes in UTF-8, without control characters."""

from __future__ import annotations

import re

from .errors import InvalidChannel

RESERVED_PREFIX = "flask_pg_sse"
MAX_BYTES = 255
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
