"""One event: its fields, and its bytes in a stream. No I/O.

`Event` is checked when it is made, so that whoever holds one may send it. `encode()` gives what browsers read:
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import InvalidEvent

FIELDS = frozenset({"event", "id", "data", "retry", "comment"})
RESERVED_PREFIX = "sse-"
_LINE_END = re.compile(r"\r\n|\r|\n")
_FORBIDDEN = re.compile(r"[\r\n\0]")
# Python refuses to turn a number of thousands of digits into text.
MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    """One Server-Sent Event.

    data:    text; may have several lines (CRLF, CR and LF all end one) and may be empty.
    event:   the name that `addEventListener` waits for; none means `message`.
    id:      what the page sees; without the event log also the browser's `Last-Event-ID`.
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
        if self.retry is not None and (type(self.retry) is not int or not 0 <= self.retry <= MAX_NUMBER):
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
        if abs(id) > MAX_NUMBER:
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
        json.loads(text, parse_constant=refuse_constant)
    return str.__str__(text)


def refuse_constant(name: str) -> NoReturn:
    raise InvalidEvent(f"The event's data hold {name}, which is no JSON and which browsers cannot parse.")


@dataclass(frozen=True, slots=True)
class Head:
    """The lines before an event's data, with the place for an id between them. Most events of one sender share it."""

    before: str
    id: str | None
    after: str

    @classmethod
    def of(cls, event: Event) -> Head:
        comment = "" if event.comment is None else _lines("", event.comment)
        name = "" if event.event is None else f"event: {event.event}\n"
        return cls(comment + name, event.id, "" if event.retry is None else f"retry: {event.retry}\n")

    def encode(self, data: str, log_id: int | None = None) -> bytes:
        """Return the block of the event with this head and `data`."""
        shown = log_id if self.id is None else self.id
        id_line = "" if shown is None else f"id: {shown}\n"
        block = f"{self.before}{id_line}{self.after}{_lines('data', data)}\n".encode()
        if self.id is not None and log_id is not None:
            block += control_block("cursor", {}, id=log_id)
        return block


def _lines(field: str, value: str) -> str:
    """Return the lines of a field. Split where the specification splits, and not where `str.splitlines` does too."""
    if "\n" in value or "\r" in value:
        value = _LINE_END.sub(f"\n{field}: ", value)
    return f"{field}: {value}\n"


def encode(event: Event, log_id: int | None = None) -> bytes:
    """Return the event as a block of a stream, with its id in the log if it has one.

    Lines end with LF alone. A `data:` line always stands in it, or browsers would not dispatch the event. An id of the
    sender's own travels as it is, and is followed by the log's, with which the browser is to come back.
    """
    return Head.of(event).encode(event.data, log_id)


HEARTBEAT = b": heartbeat\n\n"


def control_block(name: str, data: Mapping[str, object], *, id: int | None = None, retry: int | None = None) -> bytes:
    """Return one of the package's own events (`sse-open`, `sse-cursor`, …) as a block of a stream.

    `id` is the log's, from which the browser is to go on. Never alone: some clients, htmx 4 betas among them, ignore an
    `id` or a `retry` in a block without data.
    """
    lines = [f"retry: {retry}"] if retry is not None else []
    lines += [f"event: {RESERVED_PREFIX}{name}"]
    lines += [f"id: {id}"] if id is not None else []
    return "\n".join([*lines, f"data: {json.dumps(data)}\n\n"]).encode()


@functools.lru_cache(maxsize=1)  # of ten thousand streams that open at once, nearly all at the same position
def open_block(position: int | None, retry: int) -> bytes:
    """Return the block that a stream begins with. `retry` is in milliseconds."""
    return control_block("open", {}, id=position, retry=retry)


def end_block(reason: str, retry: int, id: int | None = None) -> bytes:
    """Return the block that ends a stream. `retry` (milliseconds) is spread by half: not all are to return at once."""
    return control_block("end", {"reason": reason}, id=id, retry=max(1, int(retry * random.uniform(0.5, 1.5))))


_LOG_ID = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


def to_log_id(text: str) -> int | None:
    """Return the log's id that a `Last-Event-ID` is, or None if it is none."""
    return int(text) if _LOG_ID.fullmatch(text) and int(text) <= MAX_NUMBER else None
