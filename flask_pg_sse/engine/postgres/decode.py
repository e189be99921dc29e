"""From the payload of a NOTIFY, or a row of the log, to the bytes that go out to streams."""

from __future__ import annotations

import logging
import time

from ... import event
from ...errors import InvalidEvent
from . import codec as wire

logger = logging.getLogger(__name__)


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
            found = wire.from_log(payload) if self.key is not None else None
            if found is not None:
                log_id, signed, fields, data = found
                self._check(log_id, signed)
                return log_id, wire.head_of(fields).encode(data, log_id)
            message = wire.from_payload(payload)
            log_id = message.log_id or 0
            if self.key is None:
                log_id = 0
            elif log_id:
                self._check(log_id, message.signature)
            if message.event is not None:
                return log_id, event.encode(message.event, log_id or None)
            if log_id:
                return log_id, None
            raise InvalidEvent("It is too large for NOTIFY, and the event log is not used here.")
        except Exception as error:  # whatever anybody may have sent, it ends neither the listener nor a stream
            self.dropped.add("a NOTIFY payload", error)
            return 0, None

    def _check(self, log_id: int, signed: str) -> None:
        if self.key is None or signed != wire.signature(self.key, log_id):
            raise InvalidEvent("It claims an id of the event log, and is not signed: damaged or forged.")
