"""When a client counts as one that takes nothing: judged by the bytes and the clock alone."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import example, given
from hypothesis import strategies as st

from flask_pg_sse.server.stall import ENOUGH_BYTES, SendProgress


class Client:
    """A client that takes `pace(now)` bytes a second, as the server sees it: whole pieces, one after the other."""

    def __init__(self, timeout: float, piece: int, look: float) -> None:
        self.progress = SendProgress()
        self.timeout, self.piece, self.look = timeout, piece, look
        self._taken = 0.0

    def cut_after(self, seconds: float, pace: Callable[[float], float]) -> float | None:
        """Return when the client is cut, None if it is not within `seconds`."""
        progress, now, step = self.progress, 1000.0, self.look / 10
        progress.in_flight = self.piece
        next_look = now
        while now < 1000 + seconds:
            self._taken += pace(now - 1000) * step
            pieces, self._taken = divmod(self._taken, self.piece)
            progress.bytes_sent += int(pieces) * self.piece
            now += step
            if now >= next_look:
                next_look = now + self.look
                if progress.stalled(now, self.timeout):
                    return now - 1000
        return None


PIECES = st.integers(1, ENOUGH_BYTES)
LOOKS = st.sampled_from([0.1, 0.25, 0.5, 1.0])
# Looks within the timeout: the hub has at least four. With fewer, a client of the right pace is never seen to be late.
LOOKS_IN_TIME = st.integers(4, 40)


@given(PIECES, LOOKS, st.floats(1, 10))
def test_who_takes_nothing_is_cut_soon(piece: int, look: float, timeout: float) -> None:
    cut = Client(timeout, piece, look).cut_after(3 * timeout + 5, lambda now: 0)
    assert cut is not None and timeout <= cut <= timeout + 3 * look


@given(PIECES, LOOKS_IN_TIME, st.floats(1, 10), st.floats(0, 0.4))
@example(8192, 4, 1.5, 0.375)
@example(8192, 4, 3.0, 0.4)
def test_who_takes_less_than_two_fifths_is_cut(piece: int, looks: int, timeout: float, share: float) -> None:
    """Up to one half it depends on when the looks come: a piece in flight counts in the client's favour."""
    pace = share * ENOUGH_BYTES / timeout
    assert Client(timeout, piece, timeout / looks).cut_after(10 * timeout, lambda now: pace) is not None


@given(PIECES, LOOKS, st.floats(2, 10), st.floats(2.2, 50))
def test_who_takes_twice_as_much_is_not(piece: int, look: float, timeout: float, share: float) -> None:
    pace = share * ENOUGH_BYTES / timeout
    assert Client(timeout, piece, look).cut_after(20 * timeout, lambda now: pace) is None


def test_who_has_nothing_to_take_is_not() -> None:
    progress = SendProgress()
    for now in range(1000, 2000):
        assert not progress.stalled(now, 1)


def test_the_time_begins_again_with_the_next_piece() -> None:
    progress = SendProgress()
    assert not progress.stalled(1000, 30)
    assert not progress.stalled(1900, 30)
    progress.in_flight = 100
    assert not progress.stalled(1901, 30)
    assert not progress.stalled(1929, 30)
    assert progress.stalled(1932, 30)
