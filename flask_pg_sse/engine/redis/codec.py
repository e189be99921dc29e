"""Convert events to and from the payloads of Redis' pub/sub. No I/O.

There is no wire form of our own: what is sent here is what sse_relay_server and flask-sse send, so all of them can hear
each other.
"""

from __future__ import annotations

import json
from dataclasses import replace

from ...event import Event, encode
from ..raw import Dropped, object_in, read_raw, to_event

# The keys of flask-sse's payloads. `type` is its name for `event`, and its data are any JSON.
_FLASK_SSE = frozenset({"data", "type", "id", "retry"})


def to_payload(event: Event) -> str:
    """Return the event as `from_payload()` reads it: its data alone, if that is the whole event, else a JSON object."""
    fields = {name: getattr(event, name) for name in ("event", "id", "retry", "comment")}
    fields = {name: value for name, value in fields.items() if value is not None}
    if not fields and object_in(event.data) is None:
        return event.data
    return json.dumps({**fields, "data": event.data}, ensure_ascii=False)


def from_payload(payload: str) -> Event:
    """Read a payload of any sender. Raises `InvalidEvent` if it is not a legal event.

    A JSON object with no keys but data, type, id and retry is flask-sse's. `raw.py` reads any other payload.
    """
    fields = object_in(payload)
    if not fields or not fields.keys() <= _FLASK_SSE:
        return read_raw(payload)
    known = {**fields, "event": fields.get("type")}
    if "data" in fields and fields["data"] is None:
        known["data"] = "null"
    event = to_event(known)
    return event if "data" in fields else replace(event, silent=True)


class Decoder:
    """Encodes payloads, once for all streams."""

    def __init__(self) -> None:
        self.dropped = Dropped()

    def decode(self, payload: bytes) -> bytes | None:
        """Return the bytes of a payload's event for streams; None if there is nothing to send."""
        try:
            return encode(from_payload(payload.decode())) or None
        except Exception as error:  # no payload, from any sender, may end the listener or a stream
            self.dropped.add("a payload of Redis", error)
            return None
