"""What comes on the package's own channel, `flask_pg_sse`: beats, news of pruning, and orders to end streams.

Any role of the database can send there. Nothing is believed but what only our own backend can have sent, what is signed
with the app's key, and what does no harm if it is a lie.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable

from ...channels import RESERVED_PREFIX
from ..base import Item
from . import codec as wire
from .orders import DisconnectCommands

CHANNEL = RESERVED_PREFIX


class Control:
    """Reads the control channel for one listener.

    `pruned(through)` is called when the log has lost its beginning.
    """

    def __init__(self, pruned: Callable[[int], None], orders: DisconnectCommands) -> None:
        self._pruned = pruned
        self._orders = orders
        self.beats = 0  # sent
        self.returned = 0  # the number of the last one that came back

    def next_beat(self) -> str:
        self.beats += 1
        return str(self.beats)

    def notified(self, payload: str, ours: bool) -> int:
        """Obey a notification; return the log's head if it is the beat that our own backend sent last, else 0."""
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if wire.is_logged(payload):
                self._orders.obey(wire.from_payload(payload).event.data, False)  # type: ignore[union-attr]
                return 0
            message = json.loads(payload)
            if type(order := message.get("disconnect")) is str:
                self._orders.obey(order, False)
            # Forged, this costs a look into the log where memory would have done.
            if type(through := message.get("pruned")) is int:
                self._pruned(through)
            if ours and message.get("beat") == str(self.beats):
                self.returned = self.beats
                return int(message.get("head", 0))
        return 0

    def logged(self, items: Iterable[Item]) -> list[Item]:
        """Obey what a page of the log has for us; return the rest."""
        rest = []
        for item in items:
            if item[0] == CHANNEL:
                self._orders.obey(item[1].decode().partition("\ndata: ")[2].strip(), True)
            else:
                rest.append(item)
        return rest
