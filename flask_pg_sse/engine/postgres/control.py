"""What comes on the package's own channel, `flask_pg_sse`: beats, news of pruning, and commands to end streams.

Any role of the database can send there. Nothing is believed but what only our own backend can have sent, what is signed
with the app's key, and what does no harm if it is a lie.
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
# Seconds for which a command counts.
_COUNTS = 60.0


class DisconnectCommands:
    """Passes authentic commands to end streams on to `obeyed()`, each once.

    Any role of the database can hear what goes over NOTIFY and send it again. So a command counts for a minute, and its
    number is remembered for that time; and a process obeys none that was given before it began to listen. The times are
    PostgreSQL's, because hosts' clocks may differ.
    """

    def __init__(self, keys: Callable[[], Keys], obeyed: Callable[[Disconnect], None]) -> None:
        self._keys = keys
        self._obeyed = obeyed
        self._began_at = math.inf  # no command counts before PostgreSQL has told the time
        self._ahead = 0.0  # PostgreSQL's clock of our monotonic one
        self._warned_at = -math.inf
        self._done: dict[str, float] = {}  # numbers of commands, and when they can be forgotten

    def set_clock(self, now: float) -> None:
        """Take PostgreSQL's time, in seconds since the epoch, on a connection that listens."""
        self._ahead = now - time.monotonic()
        self._began_at = min(self._began_at, now)

    def obey(self, text: str, *, logged: bool) -> None:
        """Do what a command says, if it counts.

        One from the event log (`logged`) counts at any age: only the app can write there, and a worker that had lost
        its connection finds there what it did not hear.
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
        """Say it in the log at most once a minute: anybody may send such things, and as many as they like."""
        if time.monotonic() - self._warned_at >= 60:
            self._warned_at = time.monotonic()
            logger.warning("Ignored a command to end streams: %s.", why)


class Control:
    """Reads the control channel for one listener.

    `pruned(through)` is called when the log has lost its beginning.
    """

    def __init__(self, pruned: Callable[[int], None], commands: DisconnectCommands) -> None:
        self._pruned = pruned
        self._commands = commands
        self.beats = 0  # sent
        self.returned = 0  # the number of the last one that came back

    def next_beat(self) -> str:
        self.beats += 1
        return str(self.beats)

    def notified(self, payload: str, ours: bool) -> int:
        """Obey a notification; return the log's head if it is the beat that our own backend sent last, else 0."""
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if codec.is_logged(payload):
                self._commands.obey(codec.from_payload(payload).event.data, logged=False)  # type: ignore[union-attr]
                return 0
            message = json.loads(payload)
            if type(command := message.get("disconnect")) is str:
                self._commands.obey(command, logged=False)
            # Forged, this costs a look into the log where memory would have done.
            if type(through := message.get("pruned")) is int:
                self._pruned(through)
            if ours and message.get("beat") == str(self.beats):
                self.returned = self.beats
                return int(message.get("head", 0))
        return 0

    def logged(self, command: str) -> None:
        """Obey what a page of the log has for us."""
        self._commands.obey(command, logged=True)
