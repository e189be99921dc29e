"""The engine on PostgreSQL: NOTIFY carries events, and the event log keeps them if it is installed.

This module decides how an event is sent: through the log or by NOTIFY alone, and on the package's own connection or on
the caller's.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...concurrency.locks import Lock
from ...errors import DatabaseNotConfigured, DatabaseUnavailable, PayloadTooLarge
from ...event import Event
from ...tokens import Keys, Question, sign_answers, sign_disconnect
from ..base import LOG_READERS, Asked, Disconnect, Look, Page, Sink, Tail
from ..listener import Listening
from . import control
from .codec import pg_name, to_payload, to_row
from .control import DisconnectCommands
from .dsn import Dsn
from .history import History
from .installation import Installation, InstallationLookup
from .listener import BEAT_EVERY, PostgresListener
from .pool import Pool
from .publish import CallersConnection, OwnConnection, to_log, to_notify
from .retention import Pruner
from .watch import AddressWatch

# The package's own connections for sending. A notify takes about 1 ms, so a few connections serve a whole worker.
_NOTIFY_CONNECTIONS = 4
# Seconds for which callers' connections answer for themselves, after the app's own database could not be asked.
_ALONE = 5.0
# PostgreSQL's time, in seconds since the epoch.
_CLOCK = "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::pg_catalog.float8"
# Connections for `sse_cursor()` and for pruning, which needs one at a time. They are separate, as those for reading the
# log are: a page, notify() and the reads for clients that catch up must not wait for each other.
_OTHER_CONNECTIONS = 2


class PostgresEngine(Listening):
    """One app's database in one process; see `base.Engine`.

    `databases` returns the database to notify and the database to listen to (None: read the log of the first instead);
    it is called at first use. `event_log` is the value of `SSE_EVENT_LOG`, and `log_owner` that of `SSE_LOG_OWNER`.
    `retention` is in seconds. A lost connection must be noticed within `longest_silence` seconds. `keys` returns the
    keys that sign control messages, oldest first.
    """

    def __init__(
        self,
        databases: Callable[[], tuple[Dsn, Dsn | None]],
        *,
        event_log: bool | str,
        retention: float,
        log_owner: str | None = None,
        longest_silence: float = BEAT_EVERY,
        keys: Callable[[], Keys] = lambda: (),
    ) -> None:
        self._databases = databases
        self._installation = InstallationLookup(event_log, log_owner)
        self._retention = retention
        self._beat_every = min(BEAT_EVERY, longest_silence)
        self._keys = keys
        self._alone: Exception | None = None  # why the app's own database cannot be asked about the log
        self._alone_until = 0.0
        self._opening = Lock()
        self._connections: _Connections | None = None
        self._listener: PostgresListener | None = None
        self._watch: AddressWatch | None = None
        self._pruner: Pruner | None = None
        self._stopped = False

    @property
    def _own(self) -> _Connections:
        if self._connections is None:
            with self._opening:
                if self._connections is None:
                    self._connections = _Connections(
                        self._databases(), self._installation, self._connected, self._suspect
                    )
                    if self._stopped:
                        self._connections.close()  # a connection used after stop() is closed after its use
        return self._connections

    # -- receiving

    def start(self, sink: Sink, asked: Asked | None = None) -> None:
        own = self._own

        def pass_on(question: Question) -> None:
            if asked is not None:
                asked(question.nonce, functools.partial(self._reply, question))

        commands = DisconnectCommands(self._keys, sink.control, pass_on)
        self._listener = PostgresListener(
            own.listen_dsn or own.dsn,
            sink,
            self._installation,
            commands,
            polls=own.listen_dsn is None,
            beat_every=self._beat_every,
            on_silence=self._suspect,
            on_change=self._look_soon,
        )
        self._watch = AddressWatch(own.dsn, self._listener, own.suspect)
        self._pruner = Pruner(own.pruning, self._installation, self._retention)
        try:
            self._listener.start()
            self._pruner.start()
            self._watch.start()
        except BaseException:  # no thread can be started, or this greenlet was killed while it waited for one
            self._stop_threads(0)
            raise

    def stop(self, timeout: float) -> None:
        self._stopped = True
        self._stop_threads(timeout)
        if self._connections is not None:
            self._connections.close()

    def _stop_threads(self, timeout: float) -> None:
        for thread in (self._watch, self._pruner, self._listener):
            if thread is not None:
                thread.stop(timeout)

    def _connected(self, connection: Any) -> None:
        """Compare the server of a pool's new connection with the one that the listener is connected to."""
        if self._watch is not None:
            self._watch.made(connection)

    def _look_soon(self) -> None:
        if self._watch is not None:
            self._watch.look_soon()

    def _suspect(self) -> None:
        """Have every connection looked at, because one of them was dead and nobody had said so."""
        self._own.suspect()
        if self._listener is not None:
            self._listener.beat_soon()
        self._look_soon()

    # -- sending

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        through: OwnConnection | CallersConnection
        through = self._own.sending if connection is None else CallersConnection(connection)

        def send(log: Installation | None) -> tuple[int | None]:
            if log is not None:
                return (through.log(log, channel, [to_row(event) for event in events]),)
            try:
                payloads = [to_payload(event, channel) for event in events]
            except PayloadTooLarge as error:
                remedy = self._installation.remedy_for_size(self._own_execute, durable=durable)
                raise PayloadTooLarge(channel, error.size, error.limit, remedy) from None
            through.notify(pg_name(channel), payloads)
            return (None,)

        if not durable:
            sent = None
        elif isinstance(through, CallersConnection):
            sent = send(self._log_for(through))
        else:
            sent = self._installation.call(through.execute, send)
        return (sent or send(None))[0]

    def _own_execute(self, query: str) -> Sequence[Sequence[Any]]:
        return self._own.sending.execute(query)

    def _log_for(self, caller: CallersConnection) -> Installation | None:
        """Return the log to use on a caller's connection, or None if the app uses none. Raises `EventLogMissing`."""
        if time.monotonic() >= self._alone_until:
            try:
                return self._installation.for_caller(caller.execute, self._own_execute)
            except (DatabaseNotConfigured, DatabaseUnavailable) as error:
                self._alone, self._alone_until = error, time.monotonic() + _ALONE
        log = self._installation.of_caller(caller.execute)
        if log is None and isinstance(self._alone, DatabaseUnavailable):
            raise self._alone  # whether the app uses a log is not known
        return log

    def control(self, message: Disconnect) -> None:
        through = self._own.sending

        def query(log: Installation | None, transaction: int) -> tuple[str, Sequence[Any]]:
            command = sign_disconnect(self._keys(), message.subject, message.channel, transaction)
            if log is not None:
                return to_log(log, control.CHANNEL, [to_row(Event(command))])
            return to_notify(control.CHANNEL, [json.dumps({"disconnect": command})])

        def send(log: Installation | None) -> bool:
            through.in_transaction(functools.partial(query, log))
            return True

        if not self._installation.call(through.execute, send):
            send(None)

    def _reply(self, question: Question, workers: Sequence[Mapping[str, Any]]) -> None:
        self._own.sending.notify(question.channel, sign_answers(self._keys(), question.nonce, workers))

    # -- reading

    def head(self, connection: Any = None) -> int:
        if connection is not None:
            caller = CallersConnection(connection)
            return 0 if self._log_for(caller) is None else caller.head()
        if self._installation.look(self._own.sending.execute) is None:
            return 0
        return self._own.history.head()

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        return self._own.history.page(channels, after, max_bytes, max_event)

    def look(self, ids: Collection[int]) -> Look:
        return self._own.history.look(ids)

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        return self._own.history.last(uptos, max_bytes)

    def now(self) -> float:
        [(now,)] = self._own.sending.execute(_CLOCK)
        return float(now)


class _Connections:
    """The pools, whose connections open when they are needed, and the database to listen to."""

    def __init__(
        self,
        databases: tuple[Dsn, Dsn | None],
        installation: InstallationLookup,
        on_connect: Callable[[Any], None],
        on_silence: Callable[[], None],
    ) -> None:
        self.dsn, self.listen_dsn = databases
        new = functools.partial(Pool, self.dsn, on_connect=on_connect, on_silence=on_silence)
        self._pools = (
            new("notify", _NOTIFY_CONNECTIONS),
            new("log", LOG_READERS, down_for=0.5),
            new("head", _OTHER_CONNECTIONS, down_for=0.5),
        )
        self.sending = OwnConnection(self._pools[0])
        self.history = History(self._pools[1], self._pools[2], installation)
        self.pruning = self._pools[2]

    def suspect(self) -> None:
        """Let no connection be used that stands idle now."""
        for pool in self._pools:
            pool.suspect()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
