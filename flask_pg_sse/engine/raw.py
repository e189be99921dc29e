"""Read the payloads of other programs: text, or a JSON object of an event's fields. No I/O."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InvalidEvent
from ..event import FIELDS, RETRY_FROM, RETRY_TO, Event, make_event, refuse_constant
from ..repeats import Repeats

logger = logging.getLogger(__name__)

# What the older projects' senders may put into a payload. sep and ping change nothing that a browser sees.
_RELAY_FIELDS = FIELDS | {"sep", "ping"}
_STRICT = json.JSONDecoder(parse_constant=refuse_constant)  # kept, because loads() creates one at every call


def read_raw(payload: str) -> Event:
    """Return the event of a payload that another program has sent.

    A JSON object with no keys but event, id, data, retry, comment, sep and ping is read as those fields; senders
    written for sse_relay_server use that form. Without data it dispatches nothing. Any other payload is data. Raises
    `InvalidEvent` if the result is not a legal event.
    """
    fields = object_in(payload)
    if not fields or not fields.keys() <= _RELAY_FIELDS:
        return Event(payload)
    event = to_event(fields)
    return event if fields.get("data") is not None else replace(event, silent=True)


def to_event(fields: Mapping[str, Any]) -> Event:
    """Read fields that another program wrote. `id` and `event` may be numbers, and `retry` may be text of digits.

    A `retry` that is too small or too large becomes the smallest or the largest that is allowed.
    """
    retry = fields.get("retry")
    if isinstance(retry, str) and len(retry) < 20 and retry.isascii() and retry.isdigit():
        retry = int(retry)
    if type(retry) is int and retry >= 0:
        retry = min(max(retry, RETRY_FROM), RETRY_TO)
    texts: dict[str, Any] = {}
    for field in ("event", "id"):
        value = fields.get(field)
        texts[field] = str(value) if type(value) in (int, float) else value
    try:
        return make_event(fields.get("data"), **texts, retry=retry, comment=fields.get("comment"))
    except RecursionError:
        raise InvalidEvent("The event's data are nested too deeply.") from None


def object_in(text: str) -> dict[str, Any] | None:
    """Return `text` as a JSON object, or None if it is not one."""
    if not text.lstrip(" \t\r\n").startswith("{"):
        return None
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Dropped:
    """Counts what is not a legal event. It logs at most one a minute, because any program can send any number."""

    def __init__(self) -> None:
        self.count = 0
        self._repeats = Repeats(60.0, 60.0)

    def add(self, what: str, error: Exception) -> None:
        self.count += 1
        if self._repeats.count("", time.monotonic()):
            reason = error if isinstance(error, InvalidEvent) else type(error).__name__
            logger.warning("Dropped %s (%d so far): %s", what, self.count, reason)
