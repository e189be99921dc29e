"""Decide whether a client takes what is sent to it (`SSE_SEND_TIMEOUT`). No I/O; the caller passes the time."""

from __future__ import annotations

# The bytes that a client must take within the send timeout. No piece is larger, so a piece that is in flight for all of
# that time shows that the client is too slow.
ENOUGH_BYTES = 16384


class SendProgress:
    """How much one stream has handed to its server, and how fast that went.

    The stream counts. `stalled()` is called from time to time, and judges by the counts at those times.
    """

    __slots__ = ("bytes_sent", "in_flight", "judged")

    def __init__(self) -> None:
        self.in_flight = 0  # bytes of the piece that the server is sending
        self.bytes_sent = 0  # bytes of all earlier pieces
        self.judged: _Judged | None = None  # set while `stalled()` sees a piece in flight, which is rare

    def stalled(self, now: float, timeout: float) -> bool:
        """Tell whether the socket took less than `ENOUGH_BYTES` in `timeout` seconds while there was something to send.

        It is not known how much of the piece in flight has left. In case of doubt the client gets more time, but never
        more than `timeout` for one piece.
        """
        sent, in_flight = self.bytes_sent, self.in_flight
        if not in_flight:
            self.judged = None
            return False
        judged = self.judged
        if judged is None:
            self.judged = _Judged(sent, now)
            return False
        if sent != judged.seen:
            judged.seen, judged.moved_at = sent, now
        if sent - judged.since_bytes >= ENOUGH_BYTES:
            judged.since, judged.since_bytes = now, sent
        if now - judged.moved_at >= timeout:
            return True
        return now - judged.since >= timeout and sent - judged.since_bytes + in_flight < ENOUGH_BYTES


class _Judged:
    """The counts that `stalled()` saw earlier."""

    __slots__ = ("moved_at", "seen", "since", "since_bytes")

    def __init__(self, sent: int, now: float) -> None:
        self.seen = sent
        self.moved_at = now  # when the last finished piece was seen
        self.since = now  # the start of the time in which `ENOUGH_BYTES` must leave
        self.since_bytes = sent  # how many bytes had left by then
