"""How an event travels through PostgreSQL: as the payload of a NOTIFY, and as a row of the event log. No I/O."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidEvent, PayloadTooLarge
from ...event import FIELDS, MAX_NUMBER, Event, Head, make_event, refuse_constant

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
