"""Who may listen to which channel. Takes and returns plain values: no request, no app."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_SUBJECT_BYTES = 255


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a stream was opened. Times are monotonic.

    subjects:     whose it is, as the app and the token say; `disconnect(subject=…)` finds it by these.
    clients:      what it is counted under (`counted_under()`), if at all.
    asked_at:     when the asking for permission began. A right that was taken away since then may not have been seen.
    ends_at:      when it has to end, and `ends_because` the reason that the client is told.
    """

    subjects: frozenset[str] = frozenset()
    clients: tuple[str, ...] = ()
    asked_at: float = -math.inf
    ends_at: float = math.inf
    ends_because: str = ""


def is_public(channel: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns of `SSE_CHANNELS` opens `channel` to everybody; upper and lower case differ."""
    return any(fnmatchcase(channel, pattern) for pattern in patterns)


def how_to_open(channel: str) -> str:
    """Return the line of configuration that opens `channel` and no other, for a developer to copy.

    The name comes from a URL, so that anybody chooses what stands in this line.
    """
    pattern = re.sub(r"([*?[])", r"[\1]", channel)
    return f'app.config["SSE_CHANNELS"] = [{quoted(pattern)}]'


def quoted(text: str) -> str:
    """Return a text as a literal of Python, in one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def to_subject(value: object) -> str:
    """Return a subject as text: a string, or a user's id as databases give it, a whole number or a UUID.

    Raises TypeError for other types, which may not have one text, and ValueError for text that is empty, longer than
    255 bytes in UTF-8, or no Unicode.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | uuid.UUID):
        raise TypeError(f"A subject is a string, a whole number or a UUID, not {type(value).__name__}.")
    text = str.__str__(value) if isinstance(value, str) else str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("The subject is not valid Unicode text: it holds half of a surrogate pair.") from None
    if not 1 <= size <= _SUBJECT_BYTES:
        raise ValueError(f"A subject has 1 to {_SUBJECT_BYTES} bytes in UTF-8; this one has {size}.")
    return text


def counted_under(subjects: Collection[str], address: str | None) -> tuple[str, ...]:
    """Return what the streams of a client are counted under: its subjects or, where it has none, its address.

    Of an IPv6 address the first 64 bits count: the others are its owner's to choose.
    https://www.rfc-editor.org/rfc/rfc4291#section-2.5.4
    """
    if subjects:
        return tuple(f"subject {subject}" for subject in sorted(subjects))
    try:
        known = ipaddress.ip_address(address or "")
    except ValueError:  # the peer of a Unix socket has none
        return (f"address {address or ''}",)
    if isinstance(known, ipaddress.IPv6Address):
        known = known.ipv4_mapped or ipaddress.IPv6Address(int(known) >> 64 << 64)
    return (f"address {known}",)
