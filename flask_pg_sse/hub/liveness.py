"""Tell streams that the bus is away (`sse-status` `{"live": false}`), and when they have all that came meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .. import event
from ..engine.base import Readiness
from .block import Block
from .fanout import SubscriberSet, in_portions
from .subscription import Subscription, offer_to_all

# Seconds that the bus may be away before streams are told. Most connections are made again within less.
_TOLD_AFTER = 5.0

_AWAY = Block(event.control_block("status", {"live": False}))
_BACK = Block(event.control_block("status", {"live": True}))


class Liveness:
    """Whether the bus is heard, and whether streams have been told that it is not. The hub's lock serialises calls.

    A stream that is behind is not offered anything. It is told by its generator, or when it goes live again.
    """

    def __init__(self) -> None:
        self._away_since = math.inf  # monotonic time
        self.told_away = False

    def engine_is(self, readiness: Readiness, since: float) -> None:
        """Note the engine's state, and from when on it is so."""
        if readiness is not Readiness.READY:
            self._away_since = min(self._away_since, since)

    def must_tell(self, now: float) -> bool:
        """Tell whether streams must be told now that the bus is away."""
        return not self.told_away and now - self._away_since >= _TOLD_AFTER

    def caught_up(self) -> bool:
        """Note that all that came meanwhile has been handed over. Return whether streams must be told that."""
        self._away_since = math.inf
        return self.told_away

    def tell_all(self, away: bool, sets: Iterable[SubscriberSet], now: float) -> Iterator[Subscription]:
        """Tell the live streams that have not been told yet. Yield those that are too slow for it."""
        self.told_away = away
        block = _AWAY if away else _BACK
        work = []
        for subscribers in sets:
            before = subscribers.position
            subscribers.position = before.after(block, now, shared=True)
            subscribers.scattered = True  # those that are not told stay where they are
            work.append(((before, subscribers.position), subscribers.streams))
        for (before, after), portion in in_portions(work):
            concerned = [stream for stream in portion if stream.live and stream.told_away is not away]
            for stream in concerned:
                stream.told_away = away
            yield from offer_to_all(concerned, block, block, before, after)

    def tell(self, stream: Subscription, now: float) -> bool:
        """Tell a stream that has just gone live what it missed. Returns False if it is too slow for it."""
        if stream.told_away is self.told_away:
            return True
        stream.told_away = self.told_away
        return stream.offer(_AWAY if self.told_away else _BACK, now)

    def tell_behind(self, stream: Subscription) -> bytes:
        """Return the block with which a stream that is behind learns that the bus is away; empty if it knows."""
        if not self.told_away or stream.told_away:
            return b""
        stream.told_away = True
        return _AWAY.data
