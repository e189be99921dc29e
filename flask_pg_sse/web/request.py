"""What a request for a stream says: its query, taken apart with care."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

# Bytes of a query beside its channels, and for each channel: its name with every byte as %XX, and again in the token.
_QUERY_BYTES = 16384
_QUERY_BYTES_EACH = 1200
# Parameters that are none of ours: a site may add some to every URL.
_OTHER_PARAMETERS = 100


def parse_query(raw: bytes, max_channels: int) -> dict[str, list[str]]:
    """Return the parameters of a query. ValueError where it is larger than any that could be answered.

    Looked at before it is taken apart, which for a million parameters takes a second.
    """
    most = _QUERY_BYTES + max_channels * _QUERY_BYTES_EACH
    if len(raw) > most:
        raise ValueError(f"The URL's query has {len(raw)} bytes, and {most} at the most are read.")
    if raw.count(b"&") >= max_channels + _OTHER_PARAMETERS:
        raise ValueError(
            f"The URL's query has {raw.count(b'&') + 1} parameters; one stream has {max_channels} channels."
        )
    found: dict[str, list[str]] = {}
    for parameter in raw.split(b"&"):
        name, _, value = parameter.replace(b"+", b" ").partition(b"=")
        found.setdefault(_unquoted(name), []).append(_unquoted(value))
    return found


def _unquoted(raw: bytes) -> str:
    """Return a name or a value. Bytes that are not UTF-8 become lone surrogates, which no channel's name may hold."""
    return unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
