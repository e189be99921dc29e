"""Whether a client takes what is sent to it. No I/O; times are given."""

from __future__ import annotations

# What a client has to take in the time that is allowed it. Pieces are no larger: one that is on its way for all that
# time is then known to have been too slow.
ENOUGH_BYTES = 16384


class Progress:
    """What one stream has handed to its server, and how fast that went.

    The stream counts; `stalled()` is asked from time to time, and judges by what it saw then.
    """

    __slots__ = ("_moved_at", "_seen", "_since", "_since_bytes", "in_flight", "judged", "sent")

    def __init__(self) -> None:
        self.in_flight = 0  # bytes of the piece that the server is sending
        self.sent = 0  # bytes of all pieces before it
        self.judged = False  # whether `stalled()` has seen something in flight
        self._seen = 0
        self._moved_at = 0.0  # when the last piece was seen to have gone
        self._since = 0.0  # beginning of the time in which `ENOUGH_BYTES` are to go, and what had gone by then
        self._since_bytes = 0

    def stalled(self, now: float, timeout: float) -> bool:
        """Tell whether the socket took less than `ENOUGH_BYTES` in `timeout` seconds while there was something to send.

        How much of the piece in flight has gone is not known. In case of doubt the client gets more time, but never for
        one piece more than `timeout`.
        """
        sent, in_flight = self.sent, self.in_flight
        if not in_flight or not self.judged:
            self.judged = bool(in_flight)
            self._moved_at = self._since = now
            self._seen = self._since_bytes = sent
            return False
        if sent != self._seen:
            self._seen, self._moved_at = sent, now
        if sent - self._since_bytes >= ENOUGH_BYTES:
            self._since, self._since_bytes = now, sent
        if now - self._moved_at >= timeout:
            return True
        return now - self._since >= timeout and sent - self._since_bytes + in_flight < ENOUGH_BYTES
