"""Parse the query of a request for a stream, with limits on its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import unquote_to_bytes

# The most bytes of a query: a base, and an addition for each channel. The query may have the channel's name twice: with
# every byte as %XX, and in the token.
_QUERY_BYTES = 16384
_QUERY_BYTES_EACH = 1200
# The most parameters besides the channels: a site may add some of its own to every URL.
_OTHER_PARAMETERS = 100
# The parameters that mean the same as the header Last-Event-ID, the first one first. event-source-polyfill and
# reconnecting-eventsource send `lastEventId`, other clients the header's name.
_POSITIONS = ("lastEventId", "Last-Event-ID", "last_event_id")
# An id of the log has at most 19 digits. More of an unknown one would be kept with the stream for nothing.
_POSITION_CHARACTERS = 20

# What can be done about too many channels for one stream.
OR_SEVERAL = "Open several streams, or raise SSE_MAX_CHANNELS."


def parse_query(raw: bytes, max_channels: int) -> dict[str, list[str]]:
    """Return the parameters of a query. Raises ValueError if it is larger than any valid query.

    The size is checked before parsing, because parsing a million parameters takes a second. So is the number of tokens
    before their signatures are verified: a stream needs at most one for each channel.
    """
    most = _QUERY_BYTES + max_channels * _QUERY_BYTES_EACH
    if len(raw) > most:
        raise ValueError(f"The URL's query has {len(raw)} bytes, and at most {most} are read.")
    if raw.count(b"&") >= max_channels + _OTHER_PARAMETERS:
        number = raw.count(b"&") + 1
        raise ValueError(
            f"The URL's query has {number} parameters, and one stream has at most {max_channels} channels. {OR_SEVERAL}"
        )
    found: dict[str, list[str]] = {}
    for parameter in raw.split(b"&"):
        name, _, value = parameter.replace(b"+", b" ").partition(b"=")
        found.setdefault(_unquoted(name), []).append(_unquoted(value))
    if (tokens := len(found.get("token", ()))) > max_channels:
        raise ValueError(
            f"The URL's query has {tokens} tokens, and one stream has at most {max_channels} channels. {OR_SEVERAL}"
        )
    return found


def position_of(header: str, query: Mapping[str, Sequence[str]]) -> str:
    """Return the position from which a client resumes, as it gives it; "" if it gives none.

    An EventSource that reconnects sends the header. A client that cannot set one appends a parameter of its own to the
    URL, in which the page may have put `last_event_id` when it was made: that one is older, and counts last.
    """
    given = [header, *(value for name in _POSITIONS for value in reversed(query.get(name, ())))]
    return next(filter(None, given), "")[:_POSITION_CHARACTERS]


def _unquoted(raw: bytes) -> str:
    """Decode a name or a value. Bytes that are not UTF-8 become lone surrogates, which no channel's name may have."""
    return unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
