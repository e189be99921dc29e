"""Signatures with the app's secret key: tokens that open channels, and orders to end streams. No I/O.

Each kind has a salt of its own, so that neither stands for the other, nor for a session cookie or any other thing that
is signed with the same key. https://itsdangerous.palletsprojects.com/en/stable/concepts/#the-salt

Keys come oldest first: the last one signs, all are taken for reading, so that a key can be replaced without a break.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

Keys = Sequence[str | bytes]

_STREAM = "flask_pg_sse: a stream's channels"
_DISCONNECT = "flask_pg_sse: the end of streams"


@dataclass(frozen=True, slots=True)
class Token:
    """What a signed URL stands for: channels, until when (seconds since the epoch; None: for ever), and for whom."""

    channels: frozenset[str]
    expires_at: float | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Disconnect:
    """An order to end the streams of a subject, on a channel, or both; when it was given, and its own number.

    The time is PostgreSQL's, in seconds since the epoch.
    """

    subject: str | None
    channel: str | None
    given_at: float
    nonce: str


def sign_token(keys: Keys, token: Token) -> str:
    """Return a token as text that may stand in a URL."""
    content: dict[str, object] = {"c": sorted(token.channels)}
    if token.expires_at is not None:
        content["x"] = round(token.expires_at * 1000)
    if token.subject is not None:
        content["s"] = token.subject
    return _sign(keys, _STREAM, content)


def read_token(keys: Keys, text: str) -> Token | None:
    """Return what an authentic token says, also if it has expired; None for anything else."""
    content = _read(keys, _STREAM, text)
    if content is None:
        return None
    expires = content.get("x")
    return Token(frozenset(content["c"]), None if expires is None else expires / 1000, content.get("s"))


def sign_disconnect(keys: Keys, subject: str | None, channel: str | None, given_at: float) -> str:
    """Return an order as text."""
    content = {"s": subject, "c": channel, "t": given_at, "n": secrets.token_urlsafe(12)}
    return _sign(keys, _DISCONNECT, content)


def read_disconnect(keys: Keys, text: str) -> Disconnect | None:
    """Return an authentic order, whatever its age; None for anything else."""
    content = _read(keys, _DISCONNECT, text)
    return Disconnect(content["s"], content["c"], content["t"], content["n"]) if content is not None else None


def _sign(keys: Keys, salt: str, content: dict[str, Any]) -> str:
    signed = _serializer(keys, salt).dumps(content)
    return signed if isinstance(signed, str) else signed.decode()


def _read(keys: Keys, salt: str, text: str) -> dict[str, Any] | None:
    # Bytes of a URL that are not UTF-8 come as lone surrogates, which itsdangerous does not take: nothing it signs has
    # a character that is not ASCII.
    if not keys or not text.isascii():
        return None
    try:
        content: dict[str, Any] = _serializer(keys, salt).loads(text)
    except BadData:
        return None
    return content


def _serializer(keys: Keys, salt: str) -> URLSafeSerializer:
    # itsdangerous' own defaults are SHA-1 and a derivation that it keeps for old signatures.
    options = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
    in_bytes = [key.encode() if isinstance(key, str) else key for key in keys]
    return URLSafeSerializer(in_bytes, salt=salt, signer_kwargs=options)


def without_token(url: str) -> str:
    """Return a URL, or its query, to be logged."""
    return re.sub(r"((?:^|[?&])token=)[^&#]*", r"\1***", url)
