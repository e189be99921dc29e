"""What an engine hands over: events as they go out to streams, and pages of the event log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A channel, an event as the bytes of a stream, and its id in the log; 0 for events that are not kept.
Item = tuple[str, bytes, int]


@dataclass(frozen=True, slots=True)
class Page:
    """The next events of some channels: complete up to the id `upto`. The log reaches from `pruned_through` to `head`.

    Where the next event is larger than was allowed, `too_large` is its id and size, and it is not among `items`.
    """

    pruned_through: int
    head: int
    upto: int
    items: Sequence[Item]
    too_large: tuple[int, int] | None = None

    def why_not_from(self, after: int) -> str | None:
        """Return why nobody can go on from the id `after`, or None if one can. 0 stands for all that is kept."""
        if after > self.head:
            return "future-id"
        if after and after < self.pruned_through:
            return "too-old"
        return None
