"""One event: its fields, its bytes in a stream, and its form in a NOTIFY payload. No I/O.

`Event` is checked when it is made, so that whoever holds one may send it. `encode()` gives the bytes that browsers read
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation), `to_payload()` and
`from_payload()` the text that travels through PostgreSQL.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import InvalidEvent, PayloadTooLarge

FIELDS = frozenset({"event", "id", "data", "retry", "comment"})
RESERVED_PREFIX = "sse-"
# A payload "must be shorter than 8000 bytes": https://www.postgresql.org/docs/current/sql-notify.html
MAX_PAYLOAD_BYTES = 7999

# The wire form: a control character that no JSON text and hardly any human text begins with, then the version, one line
# of JSON with every field but data, and after the first line end the data as it is (JSON would swell it). The character
# alone tells it apart from what other programs send.
_WIRE_MARK = "\x1e"
_WIRE_VERSION = "1"
# PostgreSQL sends equal payloads of one transaction once. The number makes each payload unlike its predecessors; it
# need not be unique beyond the process, because a transaction does not reach beyond it either. It always has twelve
# digits, so that the room for data is always the same.
_serial = itertools.count(10**11)

_LINE_END = re.compile(r"\r\n|\r|\n")
_FORBIDDEN = re.compile(r"[\r\n\0]")
# Python refuses to turn a number of thousands of digits into text.
_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    """One Server-Sent Event.

    data:    text; may have several lines (CRLF, CR and LF all end one) and may be empty.
    event:   the name that `addEventListener` waits for; none means `message`.
    id:      becomes the browser's `Last-Event-ID`.
    retry:   the browser's reconnection time in milliseconds.
    comment: text that browsers ignore.

    Raises `InvalidEvent` where the format cannot carry a value: line ends or NUL in `event` or `id`, text that is not
    valid Unicode, a `retry` that is not a whole number from 0 to 2**63 - 1, or a name that begins with `sse-`, which
    the package keeps for its own events.
    """

    data: str = ""
    event: str | None = None
    id: str | None = None
    retry: int | None = None
    comment: str | None = None

    def __post_init__(self) -> None:
        for field in ("data", "event", "id", "comment"):
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, str):
                raise InvalidEvent(f"The event's {field} must be a string, not {type(value).__name__}.")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InvalidEvent(
                    f"The event's {field} is not valid Unicode text: it holds half of a surrogate pair."
                ) from None
            if field in ("event", "id") and _FORBIDDEN.search(value):
                raise InvalidEvent(f"The event's {field} may not hold a line end or NUL: it is one line of the stream.")
        if self.event is not None and self.event.startswith(RESERVED_PREFIX):
            raise InvalidEvent(f"Event names that begin with {RESERVED_PREFIX!r} are reserved; choose another.")
        if self.retry is not None and (type(self.retry) is not int or not 0 <= self.retry <= _MAX_NUMBER):
            raise InvalidEvent("The event's retry must be a whole number of milliseconds, 0 or more.")


def make_event(
    data: object = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
    comment: str | None = None,
    dumps: Callable[[Any], str] = json.dumps,
) -> Event:
    """Build an event from what a caller may hand over.

    `data` may be a `str`, taken as it is; `bytes`, decoded as UTF-8; None, which is empty; or anything that `dumps`
    turns into JSON. NaN and infinities are refused, because `JSON.parse` of browsers fails on them.
    """
    if type(id) is int:
        if abs(id) > _MAX_NUMBER:
            raise InvalidEvent("The event's id is a number beyond 64 bits; give it as a string.")
        id = str(id)
    return Event(
        _to_text(data, dumps),
        None if event == "" else _plain(event),
        _plain(id),
        retry,
        _plain(comment),
    )


def _plain(text: Any) -> Any:
    """Return an exact `str` for one of a subclass (Markup, a StrEnum), whose methods may escape or translate."""
    return str.__str__(text) if isinstance(text, str) else text


def _to_text(data: object, dumps: Callable[[Any], str]) -> str:
    if data is None:
        return ""
    if isinstance(data, str):
        return str.__str__(data)
    if isinstance(data, bytes | bytearray | memoryview):
        try:
            return bytes(data).decode()
        except UnicodeDecodeError as error:
            raise InvalidEvent(f"The event's data are bytes, and not UTF-8 ({error.reason}); encode them.") from None
    text = dumps(data)
    if isinstance(text, bytes):  # some JSON providers give bytes
        text = text.decode()
    # Providers differ in the options they take, so the result is looked at, not the call changed.
    if "NaN" in text or "Infinity" in text:
        json.loads(text, parse_constant=_refuse_constant)
    return str.__str__(text)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidEvent(f"The event's data hold {name}, which is no JSON and which browsers cannot parse.")


def encode(event: Event) -> bytes:
    """Return the event as a block of a stream.

    Lines end with LF alone. Data is split where the specification splits it, and nowhere else (`str.splitlines` also
    splits at U+2028 and others). A `data:` line always stands in it, or browsers would not dispatch the event.
    """
    lines = []
    if event.comment is not None:
        lines += [f": {line}" for line in _LINE_END.split(event.comment)]
    if event.event is not None:
        lines.append(f"event: {event.event}")
    if event.id is not None:
        lines.append(f"id: {event.id}")
    if event.retry is not None:
        lines.append(f"retry: {event.retry}")
    lines += [f"data: {line}" for line in _LINE_END.split(event.data)]
    return ("\n".join(lines) + "\n\n").encode()


HEARTBEAT = b": heartbeat\n\n"


def control_block(name: str, data: Mapping[str, object], *, retry: int | None = None) -> bytes:
    """Return one of the package's own events (`sse-open`, `sse-reset`, `sse-end`) as a block of a stream."""
    first = f"retry: {retry}\n" if retry is not None else ""
    return f"{first}event: {RESERVED_PREFIX}{name}\ndata: {json.dumps(data)}\n\n".encode()


def to_payload(event: Event, channel: str) -> str:
    """Return the event in the wire form of this package.

    Raises `PayloadTooLarge` if it is longer than a NOTIFY payload may be; an event that has data alone may have at
    least 7,800 bytes of it. `channel` is for the message only.
    """
    head: dict[str, object] = {"n": next(_serial)}
    for field in ("event", "id", "retry", "comment"):
        value = getattr(event, field)
        if value is not None:
            head[field] = value
    body = "\n" + event.data
    if "\0" in body:  # PostgreSQL's text has no NUL; JSON can write it
        head["data"], body = event.data, ""
    payload = _WIRE_MARK + _WIRE_VERSION + _compact_json(head) + body
    size = len(payload.encode())
    if size > MAX_PAYLOAD_BYTES:
        data_size = len((body[1:] or _compact_json(event.data)[1:-1]).encode())  # as it would travel
        raise PayloadTooLarge(channel, data_size, max(0, MAX_PAYLOAD_BYTES - (size - data_size)))
    return payload


def _compact_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def from_payload(payload: str) -> Event:
    """Return the event that a NOTIFY payload of anybody means.

    The wire form is told by its first character. A JSON object whose keys are all among event, id, data, retry and
    comment is read as those fields, as senders written for sse_relay_server mean it. Anything else is data.
    Raises `InvalidEvent` if that is no legal event.
    """
    if payload.startswith(_WIRE_MARK):
        return _from_wire(payload)
    if payload.lstrip(" \t\r\n").startswith("{"):
        fields = _load_object(payload)
        if fields and fields.keys() <= FIELDS:
            return _from_fields(fields)
    return Event(payload)


def _from_wire(payload: str) -> Event:
    if payload[1:2] != _WIRE_VERSION:
        raise InvalidEvent("The payload is in a version of the wire form that this version of the package cannot read.")
    head, line_end, data = payload[2:].partition("\n")
    fields = _load_object(head)
    if fields is None or not fields.keys() <= FIELDS | {"n"} or bool(line_end) == ("data" in fields):
        raise InvalidEvent("The payload begins like the package's wire form and is not: damaged or forged.")
    fields.pop("n", None)
    if line_end:
        fields["data"] = data
    return _from_fields(fields)


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


def _load_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that `text` is, or None if it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
