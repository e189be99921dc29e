"""Whether a client takes what is sent to it. No I/O; times are given."""

from __future__ import annotations

# What a client has to take in the time that is allowed it. Pieces are no larger: one that is on its way for all that
# time is then known to have been too slow.
ENOUGH_BYTES = 16384


class SendProgress:
    """What one stream has handed to its server, and how fast that went.

    The stream counts; `stalled()` is asked from time to time, and judges by what it saw then.
    """

    __slots__ = ("bytes_sent", "in_flight", "judged")

    def __init__(self) -> None:
        self.in_flight = 0  # bytes of the piece that the server is sending
        self.bytes_sent = 0  # bytes of all pieces before it
        self.judged: _Judged | None = None  # while `stalled()` sees something in flight, which it seldom does

    def stalled(self, now: float, timeout: float) -> bool:
        """Tell whether the socket took less than `ENOUGH_BYTES` in `timeout` seconds while there was something to send.

        How much of the piece in flight has gone is not known. In case of doubt the client gets more time, but never for
        one piece more than `timeout`.
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
    """What `stalled()` has seen of a piece that is on its way, and of those before it."""

    __slots__ = ("moved_at", "seen", "since", "since_bytes")

    def __init__(self, sent: int, now: float) -> None:
        self.seen = sent
        self.moved_at = now  # when the last piece was seen to have gone
        self.since = now  # beginning of the time in which `ENOUGH_BYTES` are to go, and what had gone by then
        self.since_bytes = sent
