"""The listener on PostgreSQL: it LISTENs in batches, and sends itself beats.
https://www.postgresql.org/docs/current/sql-listen.html

The events themselves go through `receiver.py`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import select
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import psycopg2

from ...concurrency.greenlets import poll, sleep
from ...errors import DatabaseUnavailable
from ..base import Readiness, Sink, Status, Ticket, TooManyChannels
from ..listener import ANSWER_WITHIN, BATCH, LINGER, Listener
from ..listens import ListenTable
from ..outage import Outage
from . import control
from .codec import pg_name
from .connect import connect_to_listen, execute, is_read_only
from .control import DisconnectCommands
from .dsn import Dsn
from .foreign import listen
from .identity import Server, who
from .installation import Installation, InstallationLookup
from .obstacle import NOT_NOW, Obstacle
from .receiver import Receiver

logger = logging.getLogger(__name__)

# Seconds between two beats. Only a beat detects a server that vanished silently (a dropped NAT entry, a power failure).
BEAT_EVERY = 10.0
# Seconds that a beat may wait for the lock of NOTIFY, when nothing is received, and after which it is tried again.
_BEAT_PATIENCE = 1.0
_BEAT_AGAIN = 1.0
# Seconds between two reads of the log without LISTEN, and between two that new streams cause.
_POLL_EVERY = 1.0
_POLL_AGAIN = 0.05

# The server's limits for idle sessions and transactions are not meant for this session. Not every version has them.
_SETUP = """
SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
WHERE name OPERATOR(pg_catalog.=) ANY ('{idle_session_timeout,transaction_timeout}'::pg_catalog.text[])
"""
# Both beats return which transactions have ended; with a log also its key, and why it does not have the id that the
# last beat brought.
_BEAT = (
    "SELECT pg_catalog.pg_notify('flask_pg_sse', "
    "pg_catalog.json_build_object('beat', %s::pg_catalog.text)::pg_catalog.text); "
    f"{control.SNAPSHOT}, NULL::pg_catalog.bytea, NULL::pg_catalog.text"
)
_BEAT_OF_LOG = (
    f"SELECT flask_pg_sse.beat_v1(%s::pg_catalog.text); {control.SNAPSHOT}, "
    "(SELECT key FROM flask_pg_sse.installed_v1()), (SELECT refusal FROM flask_pg_sse.look_v1(ARRAY[%s::bigint]))"
)
_OTHER_LOG = "The event log is a different one: it was installed again, or restored"
DEAF = (
    "LISTEN receives nothing here, as through PgBouncer: set SSE_LISTEN_URL to a direct connection to PostgreSQL, or "
    'to "poll"'
)


class PostgresListener(Listener):
    """Listens to PostgreSQL, or `polls` the event log without LISTEN. `commands` gets the commands to end streams.

    `linger` and `beat_every` are in seconds. `on_silence` is called when the server has not answered, and `on_change`
    when it has become read-only or writable.
    """

    APPLICATION_NAME = "flask_pg_sse listener"

    def __init__(
        self,
        dsn: Dsn,
        sink: Sink,
        installation: InstallationLookup,
        commands: DisconnectCommands,
        *,
        polls: bool = False,
        linger: float = LINGER,
        beat_every: float = BEAT_EVERY,
        on_silence: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(sink, ListenTable(linger, pg_name), Outage(dsn, psycopg2.Error))
        self.dsn = dsn
        self.server: Server | None = None  # the one that the present connection leads to, if that is known
        self.polls = polls
        self.hears = not polls  # whether LISTEN works, as far as is known
        self.read_only = False  # whether transactions there are read-only by default
        self._on_silence = on_silence
        self._on_change = on_change
        self._successor: Any = None  # a connection to move to
        self._installation = installation
        self._beat_every = beat_every
        self._receiver = Receiver(dsn, sink, self._listens, commands)
        self._control = self._receiver.control
        self._beat_at = 0.0  # when the last beat came back
        self._heard_at: float | None = None  # the same, and never changed to have the next beat sent earlier or later
        self._took = 0.0  # seconds that the last beat took
        self._obstacle = Obstacle()

    def stop(self, timeout: float) -> None:
        self._receiver.stopping = True
        super().stop(timeout)

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> Ticket:
        try:
            return super().subscribe(self._receiver.unquoted.add(channels), client)
        except TooManyChannels:
            self._receiver.unquoted.remove(channels)
            raise

    def unsubscribe(self, channels: Iterable[str]) -> None:
        super().unsubscribe(self._receiver.unquoted.remove(channels))

    def status(self) -> Status:
        return Status(self._readiness, self._receiver.position, self._listens.count(), self._lag())

    def _lag(self) -> float | None:
        heard_at = self._heard_at
        if heard_at is None:
            return None
        overdue = time.monotonic() - heard_at - (self._beat_every if self.hears else _POLL_EVERY)
        return max(self._took, overdue)

    def _heard(self, sent_at: float) -> None:
        """Note that what was sent at this monotonic time has come back, and everything before it has been heard."""
        self._heard_at = time.monotonic()
        self._took = self._heard_at - sent_at

    def beat_soon(self) -> None:
        """Look whether the connection still works. Any thread may call it."""
        self._beat_at = float("-inf")
        self._wakeup.set()

    def move_to(self, connection: Any, *, instead_of: Server) -> None:
        """Continue on another connection, unless the listener has left that server already. Any thread may call it."""
        if self.server != instead_of or self._stopping:
            connection.close()
            return
        self._successor = connection
        self._wakeup.set()

    def _close(self) -> None:
        super()._close()
        if self._successor is not None:
            self._successor.close()

    def _connect(self) -> Any:
        connection, self._successor = self._successor, None
        return connection or connect_to_listen(self.dsn, self.APPLICATION_NAME)

    def _lost(self) -> None:
        self.server = None
        self._receiver.lost()

    @property
    def _goes_on(self) -> bool:
        return not self._stopping and self._successor is None

    def _identify(self, connection: Any) -> None:
        self.read_only = is_read_only(connection)
        with contextlib.suppress(psycopg2.errors.InsufficientPrivilege):
            self.server = who(lambda query: self._execute(connection, query))

    def _serve(self, connection: Any) -> None:
        """Listen on an open connection until it breaks."""
        if self._stopping:
            return
        self._receiver.connected()
        self._find_log(connection, again=True)
        if self.polls:
            self._poll_log(connection)
            return
        # LISTEN takes effect at the commit, so what is heard comes from transactions that have not ended here.
        [(ended,)] = self._execute(connection, f"LISTEN {control.CHANNEL}; {control.SNAPSHOT}")
        self._control.listening(ended)
        try:
            self._beat(connection, None)
        except _Deaf:
            if not self._receiver.log_is_on:
                raise
            self._execute(connection, f"UNLISTEN {control.CHANNEL}")
            logger.warning("%s. Until then events come late, and raw and ephemeral ones not at all.", DEAF)
            self.hears = False
            self._poll_log(connection)
            return
        self._execute(connection, _SETUP)
        self._identify(connection)
        confirmed = []
        for _ in range(0, self._listens.restart(), BATCH):
            names = self._listens.due(BATCH)[1]
            confirmed.append((names, self._listen(connection, names)))
        self.hears = True
        # After every LISTEN, so from here on nothing is missed. Before any event that has arrived meanwhile: it would
        # seem to follow directly on the position.
        brought = self._recover(connection)
        for names, heard in confirmed:
            self._listens.confirm(names, heard)
        self._outage.over(brought=brought)

        self._wakeup.watch(connection.fileno())
        while self._goes_on:
            # One batch between two hand-overs, so a steady arrival of subscribers does not hold up events.
            busy = self._change_listens(connection)
            while self._receiver.hand_over(connection) and self._goes_on:
                pass
            self._wakeup.wait(0 if busy else self._next_chore_in())
            if time.monotonic() >= self._beat_at + self._beat_every:
                self._find_log(connection)
                self._beat(connection, self._receiver.log)
                if is_read_only(connection) != self.read_only:
                    self.read_only = not self.read_only
                    self._on_change()

    def _find_log(self, connection: Any, *, again: bool = False) -> None:
        installation = self._installation.look(lambda query: self._execute(connection, query), again=again)
        before = self._receiver.log
        if before is not None and not again and (installation is None or installation.key != before.key):
            raise DatabaseUnavailable(_OTHER_LOG)
        self._receiver.use(installation)

    def _next_chore_in(self) -> float:
        """Return the seconds until an UNLISTEN or a beat is due."""
        beat_in = self._beat_at + self._beat_every - time.monotonic()
        return max(0.0, min(beat_in, self._listens.next_due_in()))

    def _change_listens(self, connection: Any) -> bool:
        """Send one batch of UNLISTEN and LISTEN for the wanted channels. Return True if there may be more to do."""
        if self._stopping:
            return False
        ended, begun = self._listens.due(BATCH)
        if ended:
            self._execute(connection, ";".join(listen("UNLISTEN", name, connection) for name in ended))
        if begun:
            heard = self._listen(connection, begun)
            # Either of them moves the position to the log's head as it was after LISTEN.
            beaten = not self._obstacle.stands and self._beat(connection, self._receiver.log)
            if not beaten and self._receiver.log_is_on:
                self._receiver.catch_up(connection)
            self._listens.confirm(begun, heard)
        return bool(ended or begun)

    def _listen(self, connection: Any, names: Sequence[str]) -> set[str]:
        """LISTEN to `names`. Return the confirmed ones; the database's encoding may lack characters of the others."""
        try:
            self._execute(connection, ";".join(listen("LISTEN", name, connection) for name in names))
            return set(names)
        except psycopg2.errors.UntranslatableCharacter:
            if len(names) == 1:
                return set()
            half = len(names) // 2
            return self._listen(connection, names[:half]) | self._listen(connection, names[half:])

    def _execute(self, connection: Any, query: str, args: Sequence[Any] = (), patience: float | None = None) -> Any:
        try:
            return execute(connection, query, tuple(args), timeout=ANSWER_WITHIN, patience=patience)
        except TimeoutError:
            self._on_silence()
            raise

    def _beat(self, connection: Any, log: Installation | None) -> bool:
        """Send a beat, of the log if given, and hand over events until it comes back.

        Raises `_Deaf` if it does not come back in 5 s. Returns False if the beat could not be sent, which says nothing
        against the connection.
        """
        nonce, known = self._control.next_beat(), self._receiver.confirmed
        sent_at = time.monotonic()
        query, args = (_BEAT, (nonce,)) if log is None else (log.guarded(_BEAT_OF_LOG), (nonce, known))
        try:
            [(ended, key, refusal)] = self._execute(connection, query, args, _BEAT_PATIENCE)
        except NOT_NOW as error:
            self._obstacle.met(error, connection.notices, functools.partial(self._execute, connection))
            self._beat_at = time.monotonic() + _BEAT_AGAIN - self._beat_every
            return False
        self._obstacle.over()
        self._control.beat_sent(ended)
        if log is not None and (key is None or bytes(key) != log.key):
            # Before the position moves: events of the new log were dropped as forged, and must be read from it.
            raise DatabaseUnavailable(_OTHER_LOG)
        if refusal not in (None, "too-old"):
            # Restored in place. The position may be that of a newer event, so the id that is gone takes its place.
            self._receiver.position = known
            raise DatabaseUnavailable("The event log has lost events that it had: it was restored")
        deadline = time.monotonic() + ANSWER_WITHIN
        poller = poll()
        poller.register(connection.fileno(), select.POLLIN)
        while True:
            more = self._receiver.hand_over(connection)
            if self._control.returned == self._control.beats:
                self._heard(sent_at)
                self._beat_at = time.monotonic()
                self._receiver.confirmed = self._receiver.position
                return True
            left = deadline - time.monotonic()
            if not more and (left <= 0 or not poller.poll(left * 1000)):
                raise _Deaf(DEAF)

    def _recover(self, connection: Any) -> bool:
        again = self._was_ready
        earlier = None if again else self._receiver.begin(connection)
        self._ready(Readiness.READY, earlier=earlier)  # commands are heard from here on, or read from the log
        after_an_outage = self._receiver.recover(connection) and again
        self._sink.caught_up()
        return after_an_outage

    def _poll_log(self, connection: Any) -> None:
        """Serve without LISTEN: read the log once a second, and at once for channels that are new."""
        self._identify(connection)
        self._control.reads_only_the_log()
        self._listens.restart()
        begun = self._listens.due(sys.maxsize)[1]
        brought = self._recover(connection)
        self._listens.confirm(begun, set(begun))
        self._outage.over(brought=brought)
        read_at = time.monotonic()
        while self._goes_on:
            self._wakeup.wait(max(0.0, read_at + _POLL_EVERY - time.monotonic()))
            begun = self._listens.due(sys.maxsize)[1]
            if begun:  # those that come at once are served by one query
                sleep(max(0.0, read_at + _POLL_AGAIN - time.monotonic()))
                begun += self._listens.due(sys.maxsize)[1]
            elif time.monotonic() < read_at + _POLL_EVERY:
                continue
            read_at = time.monotonic()
            self._receiver.poll(connection)
            self._heard(read_at)
            self._control.reads_only_the_log()
            self._listens.confirm(begun, set(begun))


class _Deaf(DatabaseUnavailable, TimeoutError):
    """The connection accepts LISTEN but receives no notifications."""
