"""One event: its fields, and its bytes in a stream. No I/O.

An `Event` is checked when it is made, so every `Event` is legal. `encode()` returns the format that browsers read, and
`decode()` reads it:
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import codecs
import functools
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from .errors import InvalidEvent

FIELDS = frozenset({"event", "id", "data", "retry", "comment"})
RESERVED_PREFIX = "sse-"
# Names that are reserved, or become so in a client that takes away what stands before them. Browsers take away nothing
# here, but clients in other languages trim values, and each has its own idea of what is blank.
_RESERVED = re.compile(rf"[\s\0-\x20\ufeff\u180e]*{RESERVED_PREFIX}")
# A browser waits so many milliseconds before it reconnects. Below the first it would flood the server; a browser that
# is told to wait for days does not come back.
RETRY_FROM, RETRY_TO = 100, 3_600_000
_LINE_END = re.compile(r"\r\n|\r|\n")
_FORBIDDEN = re.compile(r"[\r\n\0]")
# The largest id. Without a limit a number could have thousands of digits, and Python refuses to turn such a
# number into text.
MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    """One Server-Sent Event.

    data:    text. It may be empty, and may have several lines, each ended by CRLF, CR or LF.
    event:   the name for `addEventListener`. Without a name the browser dispatches a `message` event.
    id:      the id that the page sees. Without the event log it is also the browser's `Last-Event-ID`.
    retry:   the browser's reconnection time in milliseconds.
    comment: text that browsers ignore.
    silent:  whether clients dispatch nothing. Only other programs send such events: they have no data at all.

    Raises `InvalidEvent` if the format cannot carry a value: line ends or NUL in `event` or `id`, text that is not
    valid Unicode, or a `retry` that is not a whole number from 100 to 3,600,000. Names that begin with `sse-`, also
    after blanks or a byte order mark, are refused too: they are reserved for the package's own events.
    """

    data: str = ""
    event: str | None = None
    id: str | None = None
    retry: int | None = None
    comment: str | None = None
    silent: bool = False

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
                    f"The event's {field} is not valid Unicode text: it contains half of a surrogate pair."
                ) from None
            if field in ("event", "id") and _FORBIDDEN.search(value):
                raise InvalidEvent(f"The event's {field} must be one line: it must not contain a line end or NUL.")
        if self.event is not None and _RESERVED.match(self.event):
            raise InvalidEvent(f"Event names that begin with {RESERVED_PREFIX!r} are reserved; choose another.")
        if self.retry is not None and (type(self.retry) is not int or not RETRY_FROM <= self.retry <= RETRY_TO):
            raise InvalidEvent(
                f"The event's retry must be a whole number of milliseconds, from {RETRY_FROM} to {RETRY_TO} (an hour)."
            )


def make_event(
    data: object = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
    comment: str | None = None,
    dumps: Callable[[Any], str] = json.dumps,
) -> Event:
    """Build an event from the arguments of `notify()`.

    A `str` as `data` is sent unchanged, `bytes` are decoded as UTF-8, None means empty data, and `dumps` turns
    anything else into JSON. NaN and infinities are refused with `InvalidEvent`, because `JSON.parse` in browsers fails
    on them.
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
    """Turn a subclass of `str` (Markup, a StrEnum) into an exact `str`: its methods may escape or translate text."""
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
            raise InvalidEvent(
                f"The event's data are bytes, but not UTF-8 ({error.reason}). Send text, or encode it as UTF-8."
            ) from None
    text = dumps(data)
    if isinstance(text, bytes):  # some JSON providers return bytes
        text = text.decode()
    # JSON providers take different options, so the result is checked instead of passing allow_nan=False.
    if "NaN" in text or "Infinity" in text:
        json.loads(text, parse_constant=refuse_constant)
    return str.__str__(text)


def refuse_constant(name: str) -> NoReturn:
    raise InvalidEvent(f"The event's data contain {name}, which is not JSON: browsers cannot parse it.")


@dataclass(frozen=True, slots=True)
class Head:
    """The lines before an event's data, apart from the `id:` line, which is the last one. Most events share it."""

    before: str
    id: str | None

    @classmethod
    def of(cls, event: Event) -> Head:
        comment = "" if event.comment is None else _lines("", event.comment)
        retry = "" if event.retry is None else f"retry: {event.retry}\n"
        name = "" if event.event is None else f"event: {event.event}\n"
        return cls(comment + retry + name, event.id)

    def encode(self, data: str, log_id: int | None = None) -> bytes:
        """Return the block of the event with this head and `data`."""
        shown = log_id if self.id is None else self.id
        id_line = "" if shown is None else f"id: {shown}\n"
        block = f"{self.before}{id_line}{_lines('data', data)}\n".encode()
        if self.id is not None and log_id is not None:
            block += control_block("cursor", {}, id=log_id)
        return block


def _lines(field: str, value: str) -> str:
    """Return the lines of a field, split as the specification says; `str.splitlines` splits at more characters."""
    if "\n" in value or "\r" in value:
        value = _LINE_END.sub(f"\n{field}: ", value)
    return f"{field}: {value}\n"


def encode(event: Event, log_id: int | None = None) -> bytes:
    """Return the event as a block of bytes for a stream. `log_id` is its id in the event log, if it has one.

    Lines end with LF and come in the order comment, `retry`, `event`, `id`, `data`. Empty data is a `data:` line too,
    because browsers do not dispatch an event without one. An id that the sender chose is sent unchanged. An
    `sse-cursor` event with the log's id follows it: the browser resumes from that one.

    A silent event is only its comment, `retry` and `id`, without a blank line (see `HEARTBEAT`). It may have none.
    """
    if event.silent:
        head = Head.of(replace(event, event=None))
        return (head.before + ("" if head.id is None else f"id: {head.id}\n")).encode()
    return Head.of(event).encode(event.data, log_id)


# No blank line follows: fetch-event-source, httpx-sse and others dispatch an empty message at each one. The comment is
# then the first line of the next block.
HEARTBEAT = b": heartbeat\n"


def control_block(name: str, data: Mapping[str, object], *, id: int | None = None, retry: int | None = None) -> bytes:
    """Return one of the package's own events (`sse-open`, `sse-cursor`, …) as a block of bytes for a stream.

    `id` is the id in the event log from which the browser resumes, and `retry` is in milliseconds. The block always
    has data, because some clients (the htmx 4 betas, for example) ignore an `id` or a `retry` in a block without data.
    """
    lines = [f"retry: {retry}"] if retry is not None else []
    lines += [f"event: {RESERVED_PREFIX}{name}"]
    lines += [f"id: {id}"] if id is not None else []
    return "\n".join([*lines, f"data: {json.dumps(data)}\n\n"]).encode()


def first_lines(retry: int, comment: str = "") -> bytes:
    """Return the first line of a stream's first block, and a comment after it. `retry` is in milliseconds."""
    return f"retry: {retry}\n{_lines('', comment) if comment else ''}".encode()


@functools.lru_cache(maxsize=1)  # ten thousand streams may open at once, nearly all at one position
def open_block(position: int | None) -> bytes:
    """Return the rest of a stream's first block, after `first_lines()`."""
    return control_block("open", {}, id=position)


def end_block(reason: str, retry: int, *, id: int | None = None, comment: str = "") -> bytes:
    """Return the last block of a stream.

    `retry` is in milliseconds. It is spread at random by up to half, so the clients do not all return at once.
    """
    block = control_block("end", {"reason": reason}, id=id, retry=max(1, int(retry * random.uniform(0.5, 1.5))))
    return _lines("", comment).encode() + block if comment else block


_LOG_ID = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


def to_log_id(text: str) -> int | None:
    """Return a `Last-Event-ID` as an id of the event log, or None if it is not one."""
    return int(text) if _LOG_ID.fullmatch(text) and int(text) <= MAX_NUMBER else None


def decode(chunks: Iterable[bytes], comment: Callable[[], object] = lambda: None) -> Iterator[tuple[str, str, str]]:
    """Parse a stream as browsers do, and yield the name, the data and the last id of each event.

    `comment()` is called for each comment line, such as a heartbeat.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    last_id = ""
    name = ""
    data: list[str] = []
    for line in _lines_of(chunks):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield name or "message", "\n".join(data), last_id
            name, data = "", []
        elif not field:
            comment()
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value


def _lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    # A CR at a chunk's end may be the first half of a CRLF: the decoder holds it back.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    rest: list[str] = []  # of a line that goes on in the next chunk; joined once, for a line may have megabytes
    for chunk in chunks:
        first, *others = decoder.decode(chunk).split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            yield from others[:-1]
            rest = others[-1:]
