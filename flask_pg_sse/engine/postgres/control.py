"""Read the control channel, `flask_pg_sse`: beats, pruning messages, commands to end streams, and questions.

Any role of the database can send to this channel. So a message is trusted only if our own backend sent it (a beat), if
it is signed with the app's key (a command, a question), or if a false one does no harm (pruning).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...channels import RESERVED_PREFIX
from ...repeats import Repeats
from ...tokens import Keys, Question, read_disconnect, read_question
from ..base import ControlMessage, Disconnect, Erased
from . import codec

logger = logging.getLogger(__name__)

CHANNEL = RESERVED_PREFIX
# The query for the text of a `Snapshot`.
SNAPSHOT = "SELECT pg_catalog.txid_current_snapshot()::pg_catalog.text"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The transactions that had ended at one moment.

    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
    """

    xmax: int = 0
    running: frozenset[int] = frozenset()

    @classmethod
    def read(cls, text: str) -> Snapshot:
        """Read the text of PostgreSQL's `txid_snapshot`."""
        _, xmax, running = text.split(":")
        return cls(int(xmax), frozenset(map(int, running.split(","))) if running else frozenset())

    def __contains__(self, transaction: int) -> bool:
        return transaction < self.xmax and transaction not in self.running


_EVERYTHING = Snapshot(xmax=2**64)


class DisconnectCommands:
    """Passes each authentic command to end streams to `obeyed()`, once, and each authentic question to `asked()`.

    Any role of the database can receive a NOTIFY and send it again. A command of the event log has an id, and the
    listener's position tells whether it is new. Any other command names the transaction that sends it. PostgreSQL
    delivers in the order of commits. So when a beat has come back, every command has come whose transaction had ended
    before the beat was sent, and a command that names such a transaction is a copy. Until then its nonce tells. No
    clock decides: a worker may be frozen, and clocks may be set. A question is never in the log, and otherwise the
    same.
    """

    def __init__(
        self,
        keys: Callable[[], Keys],
        obeyed: Callable[[ControlMessage], None],
        asked: Callable[[Question], None] | None = None,
    ) -> None:
        self._keys = keys
        self._obeyed = obeyed
        self._asked = asked
        self._came = Snapshot()  # the transactions whose commands have come, or were sent before we listened
        self._done: set[str] = set()  # nonces of obeyed commands, and of questions
        self._transactions: list[tuple[int, str]] = []  # a heap: the transaction of each of them
        self._ignored_ones = Repeats()

    def came(self, snapshot: Snapshot) -> None:
        """Note that no command of the transactions in `snapshot` can come any more, except from the log."""
        self._came = snapshot
        running = []
        while self._transactions and self._transactions[0][0] < snapshot.xmax:
            command = heapq.heappop(self._transactions)
            if command[0] in snapshot:
                self._done.discard(command[1])
            else:
                running.append(command)
        for command in running:
            heapq.heappush(self._transactions, command)

    def obey(self, text: str, *, logged: bool) -> None:
        """Obey a command if it is valid. `logged` says that it is from the log, and new."""
        erased = _read_erased(text) if logged else None
        if erased is not None:
            codec.head_of.cache_clear()
            self._obeyed(erased)
            return
        command = read_disconnect(self._keys(), text)
        if command is None:
            self._ignored("it is not signed with this app's key")
        elif command.nonce in self._done:
            return
        elif command.transaction in self._came and not logged:
            self._ignored("it is a copy of an earlier one")
        else:
            self._remember(command.nonce, command.transaction)
            self._obeyed(Disconnect(command.subject, command.channel))

    def ask(self, text: str) -> None:
        """Pass on a question if it is authentic and new. Others are not logged: another app's key may sign here too."""
        if self._asked is None:
            return
        question = read_question(self._keys(), text)
        if question is not None and question.nonce not in self._done and question.transaction not in self._came:
            self._remember(question.nonce, question.transaction)
            self._asked(question)

    def _remember(self, nonce: str, transaction: int) -> None:
        self._done.add(nonce)
        heapq.heappush(self._transactions, (transaction, nonce))

    def read(self, texts: Iterable[str]) -> list[Disconnect]:
        """Return what the authentic ones of these commands say, without obeying them."""
        commands = [read_disconnect(self._keys(), text) for text in texts]
        return [Disconnect(one.subject, one.channel) for one in commands if one is not None]

    def _ignored(self, why: str) -> None:
        """Log it at once and then rarely: any role can send any number of such messages, and another app does."""
        self._ignored_ones.log(logger.warning, "", time.monotonic(), "Ignored a command to end streams: %s.", why)


def _read_erased(text: str) -> Erased | None:
    """Return what erase() of sql/schema_1.sql says. The log has signed it, so its sender may use the log."""
    if not text.startswith("{"):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = json.loads(text)
        return Erased(int(content["erased"]), content["channel"])
    return None


class Control:
    """Reads the control channel for one listener. `pruned(through)` is called when old events have been pruned."""

    def __init__(self, pruned: Callable[[int], None], commands: DisconnectCommands, decoder: codec.Decoder) -> None:
        self._pruned = pruned
        self._commands = commands
        self._decoder = decoder
        self._sent = Snapshot()  # the transactions that had ended when the last beat was sent
        self.beats = 0  # sent
        self.returned = 0  # the number of the last beat that came back

    def listening(self, snapshot: str) -> None:
        """Note that a connection listens, and which transactions had ended before that."""
        self._commands.came(Snapshot.read(snapshot))

    def reads_only_the_log(self) -> None:
        """Note that no command comes but from the log, where none comes twice."""
        self._commands.came(_EVERYTHING)

    def next_beat(self) -> str:
        self.beats += 1
        return str(self.beats)

    def beat_sent(self, snapshot: str) -> None:
        """Note which transactions had ended when the last beat was sent. Call it before the beat comes back."""
        self._sent = Snapshot.read(snapshot)

    def notified(self, payload: str, ours: bool, position: int) -> int:
        """Read a notification. Return the id up to which everything in the log has now come.

        `position` is the id up to which everything had come before. `ours` says that our own backend sent it.
        """
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if codec.is_logged(payload):
                return max(position, self._logged(payload, position))
            message = json.loads(payload)
            if type(command := message.get("disconnect")) is str:
                self._commands.obey(command, logged=False)
            if type(question := message.get("ask")) is str:
                self._commands.ask(question)
            # A forged message only makes a stream read the log when memory would have been enough.
            if type(through := message.get("pruned")) is int:
                self._pruned(through)
            if ours and message.get("beat") == str(self.beats):
                self.returned = self.beats
                self._commands.came(self._sent)
                return max(position, int(message.get("head", 0)))
        return position

    def _logged(self, payload: str, position: int) -> int:
        """Read a command of the log, and return its id. A process without the log cannot check the id: 0."""
        log_id, _ = self._decoder.open(payload, CHANNEL)
        event = codec.from_payload(payload).event
        if event is not None and not 0 < log_id <= position:
            self._commands.obey(event.data, logged=log_id > 0)
        return log_id

    def read(self, commands: Iterable[str]) -> list[Disconnect]:
        """Return what the authentic ones of these commands say, without obeying them."""
        return self._commands.read(commands)

    def logged(self, command: str) -> None:
        """Obey a command from a page of the log."""
        self._commands.obey(command, logged=True)
