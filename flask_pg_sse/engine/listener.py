"""The background thread with the one connection of a process that listens. It reconnects when the connection is lost.

Each engine has a subclass, which knows how to connect, and what to do with an open connection. Other threads only
change the wanted channels and wake this thread through a socketpair. Everything is sent by this thread, and all calls
of the sink run in it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Any

from ..concurrency.background import BackgroundThread
from ..errors import EventLogMissing, PgSSEError
from .base import Earlier, Readiness, Sink, Status, Ticket
from .listens import ListenTable
from .outage import Outage

# Seconds from a channel's last stream to UNLISTEN, so a page that reloads costs no round-trip.
LINGER = 10.0
# Seconds in which the bus must answer a question. If it does not, the connection is given up.
ANSWER_WITHIN = 5.0
# Channels in one command or statement. A long one delays events that have arrived.
BATCH = 500
# Limits of one turn. A flood is handed over in pieces, and other threads or greenlets run between them.
TURN_EVENTS = 1000
TURN_BYTES = 65536
# A pause between two full turns, in which streams send. In a flood a stream's buffer would fill up without it, and with
# no log the stream would end. In seconds, and only for threads: equal to the interpreter's switch interval.
PAUSE = 0.005


class Listener(BackgroundThread):
    """Listens to the wanted channels, from `start()` to `stop()`, and hands their events to `sink`."""

    def __init__(self, sink: Sink, listens: ListenTable, outage: Outage) -> None:
        super().__init__("pg-sse-listener")
        self._sink = sink
        self._listens = listens
        self._outage = outage
        self._readiness = Readiness.AWAY
        self._was_ready = False

    # -- what each engine does in its own way

    def _connect(self) -> Any:
        """Return an open connection, which has a `close()`."""
        raise NotImplementedError

    def _serve(self, connection: Any) -> None:
        """Listen on an open connection until it breaks, or until `_stopping`."""
        raise NotImplementedError

    def _lost(self) -> None:
        """Note that a connection is gone on which a LISTEN may have been active."""

    # -- called by other threads

    def stop(self, timeout: float) -> None:
        """End the thread and its connection, within `timeout` seconds, and the wait of streams that wait for LISTEN."""
        self._stopping = True
        self._listens.cancel()
        super().stop(timeout)

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> Ticket:
        """Count one more stream on each of `channels`. The ticket tells when LISTEN is confirmed; it may already be."""
        ticket, missing = self._listens.add(channels, client)
        if missing:
            self._wakeup.set()
        return ticket

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Count one stream fewer on each of `channels`. UNLISTEN follows later, unless another stream comes first."""
        if self._listens.remove(channels):  # the thread does not know yet that an UNLISTEN is due later
            self._wakeup.set()

    def status(self) -> Status:
        return Status(self._readiness, 0, self._listens.count())

    # -- the thread

    def _work(self) -> None:
        while not self._stopping:
            connection: Any = None
            failure: Exception | None = None
            what = "Cannot listen"
            try:
                connection = self._connect()
                what = "Lost the listener's connection"
                self._serve(connection)
            except PgSSEError as error:  # no connection, no log although it is required, or deaf
                what, failure = "Cannot listen", error
            except Exception as error:  # if the listener died, streams would get no more events
                failure = error
                if not self._outage.expects(error):
                    what = "The listener failed"
            finally:
                if connection is not None:
                    self._lost()
                    self._listens.lost()
                    self._wakeup.watch(-1)
                    connection.close()
            if failure is not None and not self._stopping:
                missing = isinstance(failure, EventLogMissing)
                silent_for = ANSWER_WITHIN if isinstance(failure, TimeoutError) else 0.0
                away = Readiness.LOG_MISSING if missing else Readiness.AWAY
                self._ready(away, why=str(failure), silent_for=silent_for)
                if missing:  # after ready(): a stream that comes in between learns it there
                    self._listens.cancel()
                self._pause(what, failure)

    def _ready(self, readiness: Readiness, *, why: str = "", silent_for: float = 0.0, earlier: Earlier = None) -> None:
        """Tell the sink of a change (see `Sink.ready()`)."""
        if readiness is not self._readiness:
            self._readiness = readiness
            self._was_ready = self._was_ready or readiness is Readiness.READY
            self._sink.ready(readiness, why=why, silent_for=silent_for, earlier=earlier)

    def _pause(self, what: str, error: Exception) -> None:
        delay = self._outage.failed(what, error)
        self._wakeup.clear()
        deadline = time.monotonic() + delay
        # New streams wake the thread too, and must not shorten the pause.
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            self._wakeup.wait(left)


class Listening:
    """The part of an engine that hands its calls to a listener, once `start()` has made one."""

    _listener: Listener | None = None

    def subscribe(self, channels: Iterable[str], client: Hashable = ()) -> Ticket:
        assert self._listener is not None, "subscribe() before start()"
        return self._listener.subscribe(channels, client)

    def unsubscribe(self, channels: Iterable[str]) -> None:
        assert self._listener is not None, "unsubscribe() before start()"
        self._listener.unsubscribe(channels)

    def status(self) -> Status:
        return Status(Readiness.AWAY, 0, 0) if self._listener is None else self._listener.status()
