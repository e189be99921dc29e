"""Convert events to and from NOTIFY payloads and rows of the log, and channels to PostgreSQL's names. No I/O.

`Decoder` turns each arriving payload into the bytes for streams, once for all streams.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from ...channels import MAX_BYTES_IN_POSTGRES, RESERVED_PREFIX
from ...errors import InvalidEvent, PayloadTooLarge
from ...event import FIELDS, MAX_NUMBER, Event, Head, encode
from ..raw import Dropped, object_in, read_raw, to_event

# A payload "must be shorter than 8000 bytes": https://www.postgresql.org/docs/current/sql-notify.html
MAX_PAYLOAD_BYTES = 7999

# The wire form of an event, in order:
# - a control character. No JSON text and hardly any human text begins with it, so it alone tells our payloads apart
#   from those of other programs;
# - the version;
# - the head: one line of JSON with every field but data;
# - after the first line end, the data as it is, because JSON would make it longer.
# For events of the log, SQL (postgres/sql) writes the wire form. Its head begins with `i`, the id in the log, and `s`,
# the signature of the id, the channel and all that follows. It has `f` if the event is too large for NOTIFY and must be
# fetched.
_WIRE_MARK = "\x1e"
_WIRE_VERSION = "1"
_LOGGED = _WIRE_MARK + _WIRE_VERSION + '{"i":'
# The beginning of the log's events: id and signature. What follows is signed.
_LOGGED_FORM = re.compile(re.escape(_LOGGED) + r'([1-9][0-9]{0,18}),"s":"([0-9a-f]{16})"', re.ASCII)
# What follows in nearly all of them: the other fields, and then the data.
_USUAL_REST = re.compile(r'(|,".*)\}\n')
# PostgreSQL sends equal payloads of one transaction only once. This number makes each payload different from those
# before. It is unique only in this process, which is enough: a transaction does not span processes. It always has
# twelve digits, so the room for data is always the same.
_serial = itertools.count(10**11)


def to_payload(event: Event, channel: str) -> str:
    """Return the event in the wire form of this package.

    Raises `PayloadTooLarge` if it is too long for one NOTIFY. An event that has only data always fits with 7,800 bytes
    of data. `channel` is only for the error message.
    """
    fields, data = _fields(event)
    payload = _WIRE_MARK + _WIRE_VERSION + _compact_json({"n": next(_serial), **fields})
    if data is not None:
        payload += "\n" + data
    size = len(payload.encode())
    if size > MAX_PAYLOAD_BYTES:
        data_size = len((data or _compact_json(event.data)[1:-1]).encode())  # in the form in which it would be sent
        raise PayloadTooLarge(channel, data_size, max(0, MAX_PAYLOAD_BYTES - (size - data_size)))
    return payload


def _fields(event: Event) -> tuple[dict[str, object], str | None]:
    """Return the event's fields without its data, and the data.

    Data with NUL is put among the fields instead: JSON can express NUL, and PostgreSQL's text type cannot.
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
    """Return the event as a row of the log: its fields as JSON, and its data."""
    fields, data = _fields(event)
    return _compact_json(fields), data


def from_row(fields: str, data: str | None) -> Event:
    """Return the event of a row of the log. Raises `InvalidEvent` if the row is not a legal event."""
    found = object_in(fields)
    if found is None or not found.keys() <= FIELDS:
        raise _not_ours()
    return _from_head(found, data)


def _from_head(fields: dict[str, Any], data: str | None) -> Event:
    """Return the event with these fields and data. `data` must be None if, and only if, `fields` contains the data."""
    if (data is None) != ("data" in fields):
        raise _not_ours()
    return to_event(fields if data is None else {**fields, "data": data})


@dataclass(frozen=True, slots=True)
class Message:
    """The content of one NOTIFY: an event. If it comes from the log, or claims to, it also has an id.

    `event` is None if it must be fetched from the log.
    """

    event: Event | None
    log_id: int | None = None


def from_payload(payload: str) -> Message:
    """Read a NOTIFY payload of any sender. Raises `InvalidEvent` if it is not a legal event.

    The wire form is recognised by its first character; `raw.py` reads any other payload.
    """
    return _from_wire(payload) if payload.startswith(_WIRE_MARK) else Message(read_raw(payload))


def is_raw(payload: str) -> bool:
    """Tell whether a payload is another program's, and not in the wire form of this package."""
    return not payload.startswith(_WIRE_MARK)


def is_logged(payload: str) -> bool:
    """Tell whether a payload comes from the log, or claims to."""
    return payload.startswith(_LOGGED)


@functools.lru_cache(maxsize=256)  # nearly all events share their fields; only ids and data differ
def head_of(fields: str) -> Head:
    """Return the head of events with these fields, JSON without its braces. Raises `InvalidEvent`."""
    return Head.of(from_row("{" + fields.removeprefix(",") + "}", ""))


def _from_wire(payload: str) -> Message:
    if payload[1:2] != _WIRE_VERSION:
        raise InvalidEvent("The payload has a version of the wire form that this version of the package cannot read.")
    head, line_end, data = payload[2:].partition("\n")
    fields = object_in(head)
    if fields is None or not fields.keys() <= FIELDS | {"n", "i", "s", "f"}:
        raise _not_ours()
    fields.pop("n", None)
    log_id, signature, large = (fields.pop(key, None) for key in "isf")
    if log_id is not None and not (type(log_id) is int and 0 < log_id <= MAX_NUMBER and type(signature) is str):
        raise _not_ours()
    if large:
        if log_id is None or line_end:
            raise _not_ours()
        return Message(None, log_id)
    return Message(_from_head(fields, data if line_end else None), log_id)


def _not_ours() -> InvalidEvent:
    return InvalidEvent("It is not in the wire form of this package: damaged or forged.")


def _forged() -> InvalidEvent:
    return InvalidEvent("It claims an id of the event log, but has no valid signature: damaged or forged.")


def signature(key: bytes, log_id: int, channel: str, rest: str) -> str:
    """Return the signature that the log's NOTIFY carries. `rest` is what follows it in the payload.

    Any role of a database can send any NOTIFY, also one that it has heard, on another channel or with other data. A
    stream that accepted a forged id would drop every later event with a smaller id. number_v1() in sql/schema_1.sql
    says why this hash is enough.
    """
    name = channel.encode()
    signed = b"".join((key, log_id.to_bytes(8, "big"), len(name).to_bytes(4, "big"), name, rest.encode()))
    return hashlib.sha256(signed).hexdigest()[:16]


def pg_name(channel: str) -> str:
    """Return PostgreSQL's name for `channel`: the same name, or a hash if it is longer than 63 bytes in UTF-8.

    The hash is 160 bits of SHA-256 after the reserved prefix, which no legal channel name has. So no legal channel can
    have this name, by chance or on purpose. Other programs can send to it, but `Decoder` drops what is raw.
    """
    raw = channel.encode()
    if len(raw) <= MAX_BYTES_IN_POSTGRES:
        return channel
    return f"{RESERVED_PREFIX}:{hashlib.sha256(raw).hexdigest()[:40]}"


class Decoder:
    """Encodes payloads, once for all streams. `key` is the key of the event log; None if no log is used."""

    def __init__(self) -> None:
        self.key: bytes | None = None
        self.dropped = Dropped()

    def decode(self, payload: str, channel: str) -> tuple[int, bytes | None]:
        """Return the id in the log (0 without one) of an event on `channel`, and its bytes.

        An id and None mean that the event must be fetched from the log. 0 and None mean that there is nothing to send.
        """
        try:
            log_id, rest = self.open(payload, channel)
            usual = _USUAL_REST.match(rest)
            if usual is not None:
                return log_id, head_of(usual[1]).encode(rest[usual.end() :], log_id)
            if is_raw(payload) and pg_name(channel) != channel:
                raise InvalidEvent("Only notify() can send to a channel whose name is longer than 63 bytes.")
            message = from_payload(payload)
            if message.log_id and not log_id and self.key is not None:
                raise _forged()
            if message.event is not None:
                return log_id, encode(message.event, log_id or None) or None
            if log_id:
                return log_id, None
            raise InvalidEvent("It is too large for NOTIFY, and this process does not use the event log.")
        except Exception as error:  # no payload, from any sender, may end the listener or a stream
            self.dropped.add("a NOTIFY payload", error)
            return 0, None

    def open(self, payload: str, channel: str) -> tuple[int, str]:
        """Return the id in the log of a payload on `channel`, and what follows the signature; 0 and "" without an id.

        Raises `InvalidEvent` if the log has not sent exactly this to the channel. If no log is used, no id is believed.
        """
        if self.key is None or not is_logged(payload):
            return 0, ""
        found = _LOGGED_FORM.match(payload)
        if found is not None:
            log_id, rest = int(found[1]), payload[found.end() :]
            if hmac.compare_digest(found[2], signature(self.key, log_id, channel, rest)):
                return log_id, rest
        raise _forged()
