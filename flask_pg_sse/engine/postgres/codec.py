"""How events travel through PostgreSQL: as payloads of NOTIFY and rows of the log, on channels under its names. No I/O.

`Decoder` turns what arrives into the bytes that go out to streams, once for all of them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from ...channels import RESERVED_PREFIX
from ...errors import InvalidEvent, PayloadTooLarge
from ...event import FIELDS, MAX_NUMBER, Event, Head, encode, make_event, refuse_constant

logger = logging.getLogger(__name__)

# PostgreSQL's names end there (NAMEDATALEN - 1): LISTEN silently cuts a longer one, and pg_notify() refuses it.
_MAX_NAME_BYTES = 63
# A payload "must be shorter than 8000 bytes": https://www.postgresql.org/docs/current/sql-notify.html
MAX_PAYLOAD_BYTES = 7999

# The wire form: a control character that no JSON text and hardly any human text begins with, then the version, one line
# of JSON with every field but data (the "head"), and after the first line end the data as it is (JSON would swell it).
# The character alone tells it apart from what other programs send. What comes from the log is written in SQL
# (postgres/sql); its head has also `i`, the id in the log, `s`, its signature, and `f` where the event is too large to
# travel and has to be fetched.
_WIRE_MARK = "\x1e"
_WIRE_VERSION = "1"
_LOGGED = _WIRE_MARK + _WIRE_VERSION + '{"i":'
# What the log writes but for the large ones: id, signature, the other fields, and then the data.
_LOGGED_FORM = re.compile(re.escape(_LOGGED) + r'([1-9][0-9]{0,18}),"s":"([0-9a-f]{16})"(|,".*)\}\n', re.ASCII)
# PostgreSQL sends equal payloads of one transaction once. The number makes each payload unlike its predecessors; it
# need not be unique beyond the process, because a transaction does not reach beyond it either. It always has twelve
# digits, so that the room for data is always the same.
_serial = itertools.count(10**11)


def to_payload(event: Event, channel: str) -> str:
    """Return the event in the wire form of this package.

    Raises `PayloadTooLarge` if it is longer than a NOTIFY payload may be; an event that has data alone may have at
    least 7,800 bytes of it. `channel` is for the message only.
    """
    fields, data = _fields(event)
    payload = _WIRE_MARK + _WIRE_VERSION + _compact_json({"n": next(_serial), **fields})
    if data is not None:
        payload += "\n" + data
    size = len(payload.encode())
    if size > MAX_PAYLOAD_BYTES:
        data_size = len((data or _compact_json(event.data)[1:-1]).encode())  # as it would travel
        raise PayloadTooLarge(channel, data_size, max(0, MAX_PAYLOAD_BYTES - (size - data_size)))
    return payload


def _fields(event: Event) -> tuple[dict[str, object], str | None]:
    """Return what the event has beside its data, and the data.

    Data that hold NUL go with the rest: JSON can write it, and PostgreSQL's text cannot.
    """
    fields: dict[str, object] = {}
    for field in ("event", "id", "retry", "comment"):
        value = getattr(event, field)
        if value is not None:
            fields[field] = value
    if "\0" in event.data:
        return {**fields, "data": event.data}, None
    return fields, event.data


def _compact_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def to_row(event: Event) -> tuple[str, str | None]:
    """Return the event as it stands in the log: its fields as JSON, and its data."""
    fields, data = _fields(event)
    return _compact_json(fields), data


def from_row(fields: str, data: str | None) -> Event:
    """Return the event of a row of the log. Raises `InvalidEvent` if that is no legal event."""
    found = _load_object(fields)
    if found is None or not found.keys() <= FIELDS:
        raise _not_ours()
    return _from_head(found, data)


def _from_head(fields: dict[str, Any], data: str | None) -> Event:
    """Return the event with these fields, and data; None where the data are among the fields, and only there."""
    if (data is None) != ("data" in fields):
        raise _not_ours()
    return _from_fields(fields if data is None else {**fields, "data": data})


@dataclass(frozen=True, slots=True)
class Message:
    """What one NOTIFY says: an event, and its id in the log with the signature if it comes from there.

    `event` is None where it has to be fetched from the log.
    """

    event: Event | None
    log_id: int | None = None
    signature: str = ""


def from_payload(payload: str) -> Message:
    """Return what a NOTIFY payload of anybody means.

    The wire form is told by its first character. A JSON object whose keys are all among event, id, data, retry and
    comment is read as those fields, as senders written for sse_relay_server mean it. Anything else is data.
    Raises `InvalidEvent` if that is no legal event.
    """
    if payload.startswith(_WIRE_MARK):
        return _from_wire(payload)
    if payload.lstrip(" \t\r\n").startswith("{"):
        fields = _load_object(payload)
        if fields and fields.keys() <= FIELDS:
            return Message(_from_fields(fields))
    return Message(Event(payload))


def is_logged(payload: str) -> bool:
    """Tell whether a payload comes from the log, or claims so."""
    return payload.startswith(_LOGGED)


def from_log(payload: str) -> tuple[int, str, str, str] | None:
    """Return id, signature, the JSON of the other fields and the data of what the log sends; None for anything else.

    It is believed only with the right signature. `from_payload()` reads the same, and what this leaves to it.
    """
    found = _LOGGED_FORM.match(payload)
    if found is None:
        return None
    log_id, signed, fields = found.groups()
    return int(log_id), signed, fields, payload[found.end() :]


@functools.lru_cache(maxsize=256)  # nearly all events have the fields of others; only ids and data differ
def head_of(fields: str) -> Head:
    """Return the head of events with these fields, as `from_log()` gives them. Raises `InvalidEvent`."""
    return Head.of(from_row("{" + fields.removeprefix(",") + "}", ""))


def _from_wire(payload: str) -> Message:
    if payload[1:2] != _WIRE_VERSION:
        raise InvalidEvent("The payload is in a version of the wire form that this version of the package cannot read.")
    head, line_end, data = payload[2:].partition("\n")
    fields = _load_object(head)
    if fields is None or not fields.keys() <= FIELDS | {"n", "i", "s", "f"}:
        raise _not_ours()
    fields.pop("n", None)
    log_id, signature, large = (fields.pop(key, None) for key in "isf")
    if log_id is not None and not (type(log_id) is int and 0 < log_id <= MAX_NUMBER and type(signature) is str):
        raise _not_ours()
    if large:
        if log_id is None or line_end:
            raise _not_ours()
        return Message(None, log_id, signature)
    return Message(_from_head(fields, data if line_end else None), log_id, signature or "")


def _not_ours() -> InvalidEvent:
    return InvalidEvent("It is not in the wire form of this package: damaged or forged.")


def signature(key: bytes, log_id: int) -> str:
    """Return what the log's NOTIFY says beside an id.

    Any role of a database can send any NOTIFY, and a stream that took a forged id for the log's would take no event
    below it any more.
    """
    return hashlib.sha256(key + log_id.to_bytes(8, "big")).hexdigest()[:16]


def _from_fields(fields: dict[str, Any]) -> Event:
    """Read fields that another program wrote: numbers are taken for `id` and `event`, digits for `retry`."""
    retry = fields.get("retry")
    if isinstance(retry, str) and len(retry) < 20 and retry.isascii() and retry.isdigit():
        retry = int(retry)
    texts: dict[str, Any] = {}
    for field in ("event", "id"):
        value = fields.get(field)
        texts[field] = str(value) if type(value) in (int, float) else value
    try:
        return make_event(fields.get("data"), **texts, retry=retry, comment=fields.get("comment"))
    except RecursionError:
        raise InvalidEvent("The event's data are nested too deep.") from None


_STRICT = json.JSONDecoder(parse_constant=refuse_constant)  # kept: loads() makes one at every call


def _load_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that `text` is, or None if it is none."""
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def pg_name(channel: str) -> str:
    """Return the name under which PostgreSQL knows `channel`: itself, or a hash where it is longer than 63 bytes.

    160 bits of SHA-256 behind the reserved prefix, so that no legal channel can be called so by chance or on purpose.
    """
    raw = channel.encode()
    if len(raw) <= _MAX_NAME_BYTES:
        return channel
    return f"{RESERVED_PREFIX}:{hashlib.sha256(raw).hexdigest()[:40]}"


class Dropped:
    """Counts what is no legal event, and says so in the log once a minute at the most: anybody may send more."""

    def __init__(self) -> None:
        self.count = 0
        self._said_at = float("-inf")

    def add(self, what: str, error: Exception) -> None:
        self.count += 1
        now = time.monotonic()
        if now - self._said_at >= 60:
            self._said_at = now
            reason = error if isinstance(error, InvalidEvent) else type(error).__name__
            logger.warning("Dropped %s, number %d so far: %s", what, self.count, reason)


class Decoder:
    """Encodes payloads, once for all streams. `key` is the event log's, None where none is used."""

    def __init__(self) -> None:
        self.key: bytes | None = None
        self.dropped = Dropped()

    def decode(self, payload: str) -> tuple[int, bytes | None]:
        """Return an event's id in the log, 0 without one, and its bytes.

        An id without bytes is that of an event that has to be fetched; neither means that there is nothing to send.
        """
        try:
            found = from_log(payload) if self.key is not None else None
            if found is not None:
                log_id, signed, fields, data = found
                self._check(log_id, signed)
                return log_id, head_of(fields).encode(data, log_id)
            message = from_payload(payload)
            log_id = message.log_id or 0
            if self.key is None:
                log_id = 0
            elif log_id:
                self._check(log_id, message.signature)
            if message.event is not None:
                return log_id, encode(message.event, log_id or None)
            if log_id:
                return log_id, None
            raise InvalidEvent("It is too large for NOTIFY, and the event log is not used here.")
        except Exception as error:  # whatever anybody may have sent, it ends neither the listener nor a stream
            self.dropped.add("a NOTIFY payload", error)
            return 0, None

    def _check(self, log_id: int, signed: str) -> None:
        if self.key is None or signed != signature(self.key, log_id):
            raise InvalidEvent("It claims an id of the event log, and is not signed: damaged or forged.")
