"""Sign and read, with the app's secret key, tokens that open channels and messages between workers. No I/O.

Each kind has a salt of its own. So none can be used as another, or as a session cookie or anything else signed with the
same key. https://itsdangerous.palletsprojects.com/en/stable/concepts/#the-salt

Keys come oldest first. The last key signs, and every key verifies, so a key can be replaced without an interruption.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import operator
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

Keys = Sequence[str | bytes]

_STREAM = "flask_pg_sse: a stream's channels"
_DISCONNECT = "flask_pg_sse: the end of streams"
_QUESTION = "flask_pg_sse: a question to all hosts"
_ANSWER = "flask_pg_sse: the answer of a host"
_HIDDEN = "flask_pg_sse: what a command names"
# A message's content is filled up to a multiple of this, so that its length tells nothing about a name.
_HIDDEN_BYTES = 640
# So many bytes of an answer fit into one NOTIFY (7,999 bytes) when they are hidden and signed.
_ANSWER_BYTES = 6 * _HIDDEN_BYTES


@dataclass(frozen=True, slots=True)
class Token:
    """The content of a signed URL: the channels that it opens, when it expires, and for which subject.

    `expires_at` is in seconds since the epoch; None means never. `alone` says that only the token has the names: with
    them the URL would be too long.
    """

    channels: frozenset[str]
    expires_at: float | None = None
    subject: str | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens of one URL. Each opens its own channels until it expires.

    authentic: those that are signed with the app's key, even if they have expired
    others:    how many further ones the URL has; these open nothing
    """

    authentic: Sequence[Token] = ()
    others: int = 0

    @property
    def channels(self) -> frozenset[str]:
        """The channels that at least one token opens, or has opened before it expired."""
        return frozenset[str]().union(*(token.channels for token in self.authentic))

    def channels_with(self, named: Sequence[str]) -> list[str]:
        """Return a stream's channels: those named in the URL, and those of each token that alone has its names.

        Such a token says so, or the URL names none of its channels. Otherwise the URL chooses among them.
        """
        alone = [token for token in self.authentic if token.alone or token.channels.isdisjoint(named)]
        return [*named, *(name for token in alone for name in sorted(token.channels))]

    def expires_at(self, channels: Iterable[str]) -> float:
        """Return when the first of a stream's channels loses its last token, in seconds since the epoch.

        `math.inf` means never. A channel without a token is open in another way, and does not count.
        """
        last: dict[str, float] = {}
        for token in self.authentic:
            until = math.inf if token.expires_at is None else token.expires_at
            for channel in token.channels:
                last[channel] = max(until, last.get(channel, until))
        return min((last[channel] for channel in channels if channel in last), default=math.inf)

    def subjects(self, now: float) -> frozenset[str]:
        """Return the subjects of the tokens that have not expired at `now`, in seconds since the epoch."""
        valid = [token for token in self.authentic if token.expires_at is None or token.expires_at > now]
        return frozenset(token.subject for token in valid if token.subject is not None)


@dataclass(frozen=True, slots=True)
class Disconnect:
    """A command to end the streams of a subject or on a channel. If both are given, a stream must match both.

    `transaction` is the number of PostgreSQL's transaction that sends it. `nonce` is unique to the command.
    """

    subject: str | None
    channel: str | None
    transaction: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question what the workers of all hosts do. The answers go to PostgreSQL's channel `channel`.

    `transaction` is the number of PostgreSQL's transaction that sends it. `nonce` is unique to the question.
    """

    channel: str
    transaction: int
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(16))


def sign_token(keys: Keys, token: Token) -> str:
    """Return a token as signed, URL-safe text."""
    content: dict[str, object] = {"c": sorted(token.channels)}
    if token.expires_at is not None:
        content["x"] = round(token.expires_at * 1000)
    if token.subject is not None:
        content["s"] = token.subject
    if token.alone:
        content["a"] = 1
    return _sign(keys, _STREAM, content)


def read_token(keys: Keys, text: str) -> Token | None:
    """Return the token if its signature is valid, even if it has expired; otherwise None."""
    content = _read(keys, _STREAM, text)
    if content is None:
        return None
    expires = content.get("x")
    return Token(
        frozenset(content["c"]), None if expires is None else expires / 1000, content.get("s"), bool(content.get("a"))
    )


def read_tokens(keys: Keys, texts: Iterable[str]) -> Tokens:
    """Return the tokens of a URL. One that is repeated, or empty, does not count."""
    found = [read_token(keys, text) for text in dict.fromkeys(texts) if text]
    authentic = [token for token in found if token is not None]
    return Tokens(authentic, len(found) - len(authentic))


def sign_disconnect(keys: Keys, subject: str | None, channel: str | None, transaction: int) -> str:
    """Return a command as signed text, in which only the nonce can be read.

    Every role of the database can hear it.
    """
    return _sign_hidden(keys, _DISCONNECT, secrets.token_urlsafe(16), [subject, channel, transaction])


def read_disconnect(keys: Keys, text: str) -> Disconnect | None:
    """Return the command if its signature is valid, however old it is; otherwise None."""
    found = _read_hidden(keys, _DISCONNECT, text)
    if found is None:
        return None
    nonce, (subject, channel, transaction) = found
    return Disconnect(subject, channel, transaction, nonce)


def sign_question(keys: Keys, question: Question) -> str:
    """Return a question as signed text, in which only the nonce can be read: not where the answers go."""
    return _sign_hidden(keys, _QUESTION, question.nonce, [question.channel, question.transaction])


def read_question(keys: Keys, text: str) -> Question | None:
    """Return the question if its signature is valid, however old it is; otherwise None."""
    found = _read_hidden(keys, _QUESTION, text)
    if found is None:
        return None
    nonce, (channel, transaction) = found
    return Question(channel, transaction, nonce)


def sign_answers(keys: Keys, nonce: str, workers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the answer to the question with this nonce, as signed texts that each fit into a NOTIFY.

    Only their number and length can be read, which tell about how many workers there are.
    """
    parts: list[list[Mapping[str, Any]]] = [[]]
    for worker in workers:
        if len(json.dumps([nonce, [*parts[-1], worker]], ensure_ascii=False).encode()) > _ANSWER_BYTES:
            parts.append([])
        parts[-1].append(worker)
    return [_sign_hidden(keys, _ANSWER, secrets.token_urlsafe(16), [nonce, part]) for part in parts]


def read_answer(keys: Keys, text: str, nonce: str) -> list[dict[str, Any]]:
    """Return the workers in an answer to the question with this nonce; none if it is no authentic answer to it."""
    found = _read_hidden(keys, _ANSWER, text)
    return found[1][1] if found is not None and found[1][0] == nonce else []


def _sign_hidden(keys: Keys, salt: str, nonce: str, content: list[Any]) -> str:
    data = json.dumps(content, ensure_ascii=False).encode()
    size = -(-len(data) // _HIDDEN_BYTES) * _HIDDEN_BYTES
    hidden = _xor(keys[-1], nonce, data.ljust(size))  # spaces, which JSON ignores
    return _sign(keys, salt, {"n": nonce, "h": base64.b64encode(hidden).decode()})


def _read_hidden(keys: Keys, salt: str, text: str) -> tuple[str, list[Any]] | None:
    """Return the nonce and the content."""
    for key in reversed(keys):  # not all at once, because the key is needed again
        content = _read([key], salt, text)
        if content is not None:
            nonce = content["n"]
            return nonce, json.loads(_xor(key, nonce, base64.b64decode(content["h"])))
    return None


def _xor(key: str | bytes, nonce: str, data: bytes) -> bytes:
    """Hide data, or show hidden data: XOR with a key stream that no two nonces share.

    SHAKE-256 of a secret of fixed length and a nonce is such a stream. What is hidden so must also be signed.
    https://nvlpubs.nist.gov/nistpubs/FIPS/NIST.FIPS.202.pdf
    """
    secret = hmac.digest(_to_bytes(key), _HIDDEN.encode(), "sha256")
    stream = hashlib.shake_256(secret + nonce.encode()).digest(len(data))
    return bytes(map(operator.xor, data, stream))


def _sign(keys: Keys, salt: str, content: dict[str, Any]) -> str:
    signed = _serializer(keys, salt).dumps(content)
    return signed if isinstance(signed, str) else signed.decode()


def _read(keys: Keys, salt: str, text: str) -> dict[str, Any] | None:
    # Bytes of a URL that are not UTF-8 arrive as lone surrogates, on which itsdangerous fails. All that it signs is
    # ASCII, so other text cannot be authentic.
    if not keys or not text.isascii():
        return None
    try:
        content: dict[str, Any] = _serializer(keys, salt).loads(text)
    except BadData:
        return None
    return content


def _serializer(keys: Keys, salt: str) -> URLSafeSerializer:
    # The defaults of itsdangerous are SHA-1 and a key derivation that it keeps only for old signatures.
    options = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
    return URLSafeSerializer([_to_bytes(key) for key in keys], salt=salt, signer_kwargs=options)


# A parameter's name may have any of its characters as %XX.
_NAME = "".join(f"(?:{character}|%{ord(character):02x}|%{ord(character):02X})" for character in "token")
_TOKEN_IN_URL = re.compile(rf"((?:^|[?&]){_NAME}=)[^&#]*")


def _to_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def without_token(url: str) -> str:
    """Return a URL, or its query, with each token replaced by `***`, for the log."""
    return _TOKEN_IN_URL.sub(r"\1***", url)
