"""Read the control channel, `flask_pg_sse`: beats, pruning messages, and commands to end streams.

Any role of the database can send to this channel. So a message is trusted only if our own backend sent it (a beat), if
it is signed with the app's key (a command), or if a false one does no harm (pruning).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable

from ...channels import RESERVED_PREFIX
from ...tokens import Keys, read_disconnect
from ..base import Disconnect
from . import codec

logger = logging.getLogger(__name__)

CHANNEL = RESERVED_PREFIX
# Seconds for which a command is valid.
_COUNTS = 60.0


class DisconnectCommands:
    """Passes each authentic command to end streams to `obeyed()`, once.

    Any role of the database can receive a NOTIFY and send it again. So a command is valid for 60 s, and its nonce is
    remembered for that time. A process ignores commands from before it began to listen. The times are PostgreSQL's,
    because hosts' clocks may differ.
    """

    def __init__(self, keys: Callable[[], Keys], obeyed: Callable[[Disconnect], None]) -> None:
        self._keys = keys
        self._obeyed = obeyed
        self._began_at = math.inf  # no command is valid before the first set_clock()
        self._ahead = 0.0  # seconds from our monotonic clock to PostgreSQL's clock
        self._warned_at = -math.inf
        self._done: dict[str, float] = {}  # nonces of commands, and when they can be forgotten

    def set_clock(self, now: float) -> None:
        """Set PostgreSQL's time, in seconds since the epoch, as read on a connection that listens."""
        self._ahead = now - time.monotonic()
        self._began_at = min(self._began_at, now)

    def obey(self, text: str, *, logged: bool) -> None:
        """Obey a command if it is valid.

        A command from the event log (`logged`) is valid at any age. Only the app can write there, and a worker that
        had lost its connection finds there the commands that it missed.
        """
        command = read_disconnect(self._keys(), text)
        if command is None:
            self._ignored("it is not signed with this app's key")
            return
        now = time.monotonic() + self._ahead
        for nonce in [nonce for nonce, until in self._done.items() if until < now]:
            del self._done[nonce]
        if command.nonce in self._done:
            return
        counts = command.given_at >= self._began_at and abs(now - command.given_at) <= _COUNTS
        if not counts and not logged:
            self._ignored("it was not given within the last minute, or before this process listened")
            return
        self._done[command.nonce] = max(now, command.given_at) + _COUNTS
        self._obeyed(Disconnect(command.subject, command.channel))

    def _ignored(self, why: str) -> None:
        """Log it at most once a minute, because any role can send any number of such messages."""
        if time.monotonic() - self._warned_at >= 60:
            self._warned_at = time.monotonic()
            logger.warning("Ignored a command to end streams: %s.", why)


class Control:
    """Reads the control channel for one listener. `pruned(through)` is called when old events have been pruned."""

    def __init__(self, pruned: Callable[[int], None], commands: DisconnectCommands) -> None:
        self._pruned = pruned
        self._commands = commands
        self.beats = 0  # sent
        self.returned = 0  # the number of the last beat that came back

    def next_beat(self) -> str:
        self.beats += 1
        return str(self.beats)

    def notified(self, payload: str, ours: bool) -> int:
        """Read a notification. Return the log's head if it is the last beat of our own backend, otherwise 0."""
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if codec.is_logged(payload):
                self._commands.obey(codec.from_payload(payload).event.data, logged=False)  # type: ignore[union-attr]
                return 0
            message = json.loads(payload)
            if type(command := message.get("disconnect")) is str:
                self._commands.obey(command, logged=False)
            # A forged message only makes a stream read the log when memory would have been enough.
            if type(through := message.get("pruned")) is int:
                self._pruned(through)
            if ours and message.get("beat") == str(self.beats):
                self.returned = self.beats
                return int(message.get("head", 0))
        return 0

    def logged(self, command: str) -> None:
        """Obey a command from a page of the log."""
        self._commands.obey(command, logged=True)
