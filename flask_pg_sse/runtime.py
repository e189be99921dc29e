"""What one app has running: settings, hub and engine, started at first use in each process.

Making a `Runtime` opens nothing and makes no lock: under --preload that happens in gunicorn's arbiter, before the
workers are forked and before gevent patches them. What was started belongs to the process that started it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from psycopg2.extensions import get_wait_callback

from . import concurrency as wakeup
from .channels import RESERVED_PREFIX as CONTROL
from .channels import check_channel, pg_name
from .engine.postgres.codec import to_payload, to_row
from .engine.postgres.dsn import Dsn, is_postgres, to_dsn
from .engine.postgres.history import EventLog
from .engine.postgres.installation import InstallationLookup
from .engine.postgres.listener import BEAT_EVERY, CLOCK, Listener
from .engine.postgres.orders import DisconnectCommands
from .engine.postgres.pool import Pool
from .engine.postgres.publish import Publisher, check_caller, execute_on, log_in_transaction, send_in_transaction
from .engine.postgres.retention import Pruner
from .errors import ConfigurationError, DatabaseNotConfigured, DatabaseUnavailable
from .event import Event, make_event
from .hub.admission import Admission, TryLater
from .hub.hub import Hub
from .hub.places import StreamLimiter
from .hub.replay import Replay
from .hub.ticker import Ticker
from .server import shutdown
from .server.capacity import room_for_streams
from .settings import Settings, database_sources, secret_keys
from .tokens import sign_disconnect

logger = logging.getLogger(__name__)

_NO_DATABASE = (
    "No PostgreSQL database is configured for flask_pg_sse. Set SSE_DATABASE_URL (or SQLALCHEMY_DATABASE_URI, or the "
    "environment's DATABASE_URL) to postgresql://user:password@host/database."
)


class Runtime:
    """One app's streams and notifications.

    `config` is read, and checked, at first use, and then fixed. `dumps` turns data into JSON.
    """

    def __init__(self, config: Mapping[str, Any], dumps: Callable[[Any], str]) -> None:
        self._config = config
        self._dumps = dumps
        self._settings: Settings | None = None
        self._log_presence: InstallationLookup | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._process: Process | None = None
        self.collect: Callable[[str, Event], None] | None = None  # gets the events in PostgreSQL's place, in tests

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = Settings.from_config(self._config)
        return self._settings

    def notify(
        self,
        channel: str,
        items: Sequence[object],
        fields: Mapping[str, Any],
        connection: Any = None,
        *,
        durable: bool = True,
    ) -> int | None:
        """Send one event for each of `items` in one transaction: the caller's, or one of the package's own.

        Returns the last one's id in the log where it is known.
        """
        check_channel(channel)
        if connection is not None:
            check_caller(connection)
        events = [make_event(item, **fields, dumps=self._dumps) for item in items]
        if self.collect is not None:
            if not durable or self.settings.event_log is not True:
                _ = [to_payload(event, channel) for event in events]  # as large as it may be
            for event in events:
                self.collect(channel, event)
        elif events:
            return self._send(channel, events, connection, durable)
        return None

    def _send(self, channel: str, events: Sequence[Event], connection: Any, durable: bool) -> int | None:
        presence, publisher = self._presence(), None
        if connection is None:
            publisher = self.process.publisher
            rows_of = publisher.execute
        else:
            rows_of = functools.partial(execute_on, connection)
        if not durable or presence.look(rows_of) is None:
            payloads = [to_payload(event, channel) for event in events]
            if publisher is None:
                send_in_transaction(connection, pg_name(channel), payloads)
            else:
                publisher.send(pg_name(channel), payloads)
            return None
        rows = [to_row(event) for event in events]
        try:
            if publisher is not None:
                return publisher.log(channel, rows)
            log_in_transaction(connection, channel, rows)
        except Exception:
            presence.forget()  # it may have been taken away
            raise
        return None

    def cursor(self) -> int | None:
        """Return the head of the event log, None without a log."""
        if self.collect is not None:
            return None
        process = self.process
        if self._presence().look(process.publisher.execute) is None:
            return None
        return process.log.head()

    def keys(self) -> Sequence[str | bytes]:
        """Return the keys of signatures, oldest first; none if the app has none. Raises `ConfigurationError`."""
        return secret_keys(self.settings, self._config)

    def signing_keys(self, what: str) -> Sequence[str | bytes]:
        """Return the keys; `ConfigurationError` if there is none with which to do `what`."""
        keys = self.keys()
        if not keys:
            raise ConfigurationError(f"{what} needs a secret key: set SECRET_KEY, or SSE_SECRET_KEY, to a random text.")
        return keys

    def disconnect(self, subject: str | None, channel: str | None) -> None:
        """Have every process end streams. Through the event log, where there is one: it is then also obeyed late."""
        keys = self.signing_keys("disconnect()")
        if self.collect is not None:
            return
        publisher = self.process.publisher
        [(now,)] = publisher.execute(CLOCK)
        order = sign_disconnect(keys, subject, channel, now)
        if self._presence().look(publisher.execute) is None:
            publisher.send(CONTROL, [json.dumps({"disconnect": order})])
        else:
            publisher.log(CONTROL, [to_row(make_event(order))])

    def _presence(self) -> InstallationLookup:
        if self._log_presence is None:
            self._log_presence = InstallationLookup(self.settings.event_log)
        return self._log_presence

    def close(self, timeout: float = 5.0) -> None:
        """End all streams, threads and connections of this process; the next use starts anew."""
        with self._lock():
            process, self._process = self._process, None
        if process is not None and process.pid == os.getpid():
            process.stop(timeout)

    @property
    def process(self) -> Process:
        """What this app has in this process."""
        process = self._process
        if process is None or process.pid != os.getpid():
            with self._lock():
                process = self._process
                if process is None or process.pid != os.getpid():
                    process = Process(self.dsns, self.settings, self._presence(), self.keys)
                    self._process = process
        return process

    def _lock(self) -> threading.Lock:
        # One a process: a lock that was made before a fork may be held there for ever, and be of the wrong kind.
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def dsns(self) -> tuple[Dsn, Dsn]:
        """Return where to notify and where to listen."""
        for source, value, connect_args in database_sources(self.settings, self._config, os.environ):
            if source == "SSE_DATABASE_URL" or is_postgres(value):
                dsn = to_dsn(value, source, connect_args)
                if source == "SQLALCHEMY_DATABASE_URI":
                    _warn_of_psycopg2(value)
                break
        else:
            raise DatabaseNotConfigured(_NO_DATABASE)
        listen = dsn
        if self.settings.listen_url is not None:
            listen = to_dsn(self.settings.listen_url, "SSE_LISTEN_URL")
            logger.info("Listening at %s (from SSE_LISTEN_URL).", listen)
        logger.info("Using PostgreSQL at %s (from %s).", dsn, dsn.source)
        return dsn, listen


def _warn_of_psycopg2(url: Any) -> None:
    """Say that an app's own queries are going to stop all its streams, where that can be known."""
    sqlalchemy: Any = sys.modules.get("sqlalchemy")
    if sqlalchemy is None or not wakeup.is_patched() or get_wait_callback() is not None:
        return
    if sqlalchemy.make_url(url).get_driver_name() == "psycopg2":
        logger.warning(
            "SQLALCHEMY_DATABASE_URI is for psycopg2, with which each query stops the whole gevent worker until "
            "PostgreSQL has answered, all streams included. Use psycopg 3 (postgresql+psycopg://), or call "
            "psycogreen.gevent.patch_psycopg()."
        )


# Connections of the package's own. A notify takes about a millisecond, so a few serve a whole worker.
_NOTIFY_CONNECTIONS = 4
# Reading for slow clients must not keep notify() waiting, nor the other way round.
_LOG_CONNECTIONS = 2


class _Database:
    """The connections of the package's own, opened as they are needed. `dsns` says where to notify and to listen."""

    def __init__(self, dsns: tuple[Dsn, Dsn]) -> None:
        dsn, self.listen_dsn = dsns
        self.pools = (
            Pool(dsn, "notify", _NOTIFY_CONNECTIONS),
            Pool(dsn, "log", _LOG_CONNECTIONS, down_for=0.5),
            Pool(dsn, "prune", 1),
        )
        self.publisher = Publisher(self.pools[0])
        self.log = EventLog(self.pools[1])

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


class Process:
    """What runs in one process, each part from its first use: one that only notifies never listens."""

    def __init__(
        self,
        dsns: Callable[[], tuple[Dsn, Dsn]],
        settings: Settings,
        presence: InstallationLookup,
        keys: Callable[[], Sequence[str | bytes]],
    ) -> None:
        self.pid = os.getpid()
        shutdown.watch_here()  # before the room is asked for: it is the worker's
        self.admission = Admission(_places(settings))
        self._dsns = dsns
        self._keys = keys
        self._settings = settings
        self._presence = presence
        self._starting = threading.RLock()
        self._stopped = False
        self._used_database: _Database | None = None
        self._streams: tuple[Hub, Replay] | None = None
        self._threads: tuple[Listener | Ticker | Pruner, ...] = ()

    @property
    def publisher(self) -> Publisher:
        return self._database.publisher

    @property
    def log(self) -> EventLog:
        return self._database.log

    @property
    def _database(self) -> _Database:
        if self._used_database is None:
            with self._starting:
                if self._used_database is None:
                    self._used_database = _Database(self._dsns())
                    if self._stopped:
                        self._used_database.close()  # what is borrowed from now on is closed after its use
        return self._used_database

    @property
    def streams(self) -> tuple[Hub, Replay]:
        """What serves streams, with listener and ticker running. Raises `TryLater` once they have been stopped."""
        if self._streams is None:
            with self._starting:
                if self._streams is None:
                    if self._stopped:
                        raise TryLater("shutdown")
                    self._streams = self._start()
        return self._streams

    def wait_until_decidable(self, *, asks: bool) -> None:
        """Wait until it can be decided whether a stream may begin, at a place that it holds. Raises `TryLater`.

        `asks` says that the app is going to be asked: only where an order to end the stream would be heard. Raises
        `EventLogMissing` where the configuration requires a log and the database answers that it has none.
        """
        admission = self.admission
        log_unknown = self._settings.event_log is True and not admission.log_in_use
        if not (asks or log_unknown):
            return
        _ = self.streams
        if log_unknown:
            admission.wait_for_answer()
            if admission.log_missing:  # so it was when the listener looked
                try:
                    self._presence.look(self.publisher.execute)
                except DatabaseUnavailable:
                    raise TryLater("unavailable") from None
        if asks:
            admission.wait_for_orders()

    def _start(self) -> tuple[Hub, Replay]:
        settings, heartbeat = self._settings, self._settings.heartbeat
        hub = Hub(
            lambda channels: listener.listen(channels),
            lambda channels: listener.unlisten(channels),
            heartbeat=heartbeat,
            retry=settings.retry,
            send_timeout=settings.send_timeout,
            admission=self.admission,
        )
        listener = Listener(
            self._database.listen_dsn,
            hub.deliver,
            hub.gap,
            self._presence,
            pruned=hub.pruned,
            answered=self.admission.answered,
            orders=DisconnectCommands(self._keys, hub.disconnect),
            beat_every=min(BEAT_EVERY, heartbeat),
        )
        shortest = min(heartbeat, settings.send_timeout, settings.max_age or heartbeat)
        threads = (listener, Ticker(hub, shortest), Pruner(self._database.pools[2], self._presence, settings.retention))
        try:
            for thread in threads:
                thread.start()
        except BaseException:  # no thread to be had, or a greenlet that was killed while it waited for one
            for thread in threads:
                thread.stop(0)
            raise
        self._threads = threads
        return hub, Replay(hub, self.log, heartbeat=heartbeat)

    def stop(self, timeout: float) -> None:
        with self._starting:  # a start that is under way comes to its end first
            self._stopped = True
        self.admission.close("shutdown")
        if self._streams is not None:
            self._streams[0].drain("shutdown")
        for thread in reversed(self._threads):
            thread.stop(timeout)
        if self._used_database is not None:
            self._used_database.close()


def _places(settings: Settings) -> StreamLimiter:
    most, each = settings.max_streams, settings.max_streams_per_client
    room, holds = room_for_streams(shutdown.gunicorn_worker())
    if most is None:
        return StreamLimiter(room, each, most_here=room)
    if holds is not None and most >= holds:
        logger.warning(
            "SSE_MAX_STREAMS is %d, and this worker holds %d connections at once: full of streams it would answer "
            "nothing else. Raise --worker-connections (--threads under gthread), or lower SSE_MAX_STREAMS.",
            most,
            holds,
        )
    return StreamLimiter(most, each, most_here=sys.maxsize)
