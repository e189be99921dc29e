"""What one app has running: settings, hub and engine, started at first use in each process.

Making a `Runtime` opens nothing and makes no lock: under --preload that happens in gunicorn's arbiter, before the
workers are forked and before gevent patches them. What was started belongs to the process that started it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import shutdown
from .admission import NotNow
from .channels import RESERVED_PREFIX as CONTROL
from .channels import check_channel, pg_name
from .errors import ConfigurationError, DatabaseNotConfigured, DatabaseUnavailable
from .event import Event, make_event
from .hub import Hub
from .orders import Orders
from .places import Places
from .postgres.dsn import Dsn, is_postgres, to_dsn
from .postgres.listener import BEAT_EVERY, CLOCK, Listener
from .postgres.log import EventLog
from .postgres.pool import Pool
from .postgres.presence import Presence
from .postgres.prune import Pruner
from .postgres.publish import Publisher, check_caller, execute_on, log_in_transaction, send_in_transaction
from .replay import Replay
from .server import room_for_streams
from .settings import Settings, database_sources, secret_keys
from .subscription import Subscription
from .ticker import Ticker
from .tokens import sign_disconnect
from .wire import to_payload, to_row

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
        self._log_presence: Presence | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._process: _Process | None = None
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
            publisher = self._running().publisher
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
        process = self._running()
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
        publisher = self._running().publisher
        [(now,)] = publisher.execute(CLOCK)
        order = sign_disconnect(keys, subject, channel, now)
        if self._presence().look(publisher.execute) is None:
            publisher.send(CONTROL, [json.dumps({"disconnect": order})])
        else:
            publisher.log(CONTROL, [to_row(make_event(order))])

    @contextlib.contextmanager
    def admission(self, subscription: Subscription, *, asks: bool) -> Iterator[None]:
        """Hold a place for a stream while it is decided on, and wait until that can be done.

        `asks` says that the app is going to be asked: only where an order to end the stream would be heard. Raises
        `NotNow`, and `EventLogMissing` where the configuration requires a log and the database answers that it has
        none.
        """
        log_unknown = self.settings.event_log is True and not self._presence().found
        if not (asks or log_unknown or self._serves_streams()):  # HEAD alone starts nothing
            yield
            return
        admission = self.streams[0].admission
        with admission.place(subscription):
            if log_unknown:
                admission.wait_for_answer()
                try:
                    self._presence().look(self._running().publisher.execute)
                except DatabaseUnavailable:
                    raise NotNow("unavailable") from None
            if asks:
                admission.wait_for_orders()
            yield

    def _serves_streams(self) -> bool:
        process = self._process
        return process is not None and process.pid == os.getpid() and process.serves_streams

    @property
    def streams(self) -> tuple[Hub, Replay]:
        """What serves the streams of this process, with listener and ticker running."""
        return self._running().streams()

    def _presence(self) -> Presence:
        if self._log_presence is None:
            self._log_presence = Presence(self.settings.event_log)
        return self._log_presence

    def close(self, timeout: float = 5.0) -> None:
        """End all streams, threads and connections of this process; the next use starts anew."""
        with self._lock():
            process, self._process = self._process, None
        if process is not None and process.pid == os.getpid():
            process.stop(timeout)

    def _running(self) -> _Process:
        process = self._process
        if process is None or process.pid != os.getpid():
            with self._lock():
                process = self._process
                if process is None or process.pid != os.getpid():
                    process = _Process(self.dsns(), self.settings, self._presence(), self.keys)
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
                break
        else:
            raise DatabaseNotConfigured(_NO_DATABASE)
        listen = dsn
        if self.settings.listen_url is not None:
            listen = to_dsn(self.settings.listen_url, "SSE_LISTEN_URL")
            logger.info("Listening at %s (from SSE_LISTEN_URL).", listen)
        logger.info("Using PostgreSQL at %s (from %s).", dsn, dsn.source)
        return dsn, listen


# Connections of the package's own. A notify takes about a millisecond, so a few serve a whole worker.
_NOTIFY_CONNECTIONS = 4
# Reading for slow clients must not keep notify() waiting, nor the other way round.
_LOG_CONNECTIONS = 2


class _Process:
    """What runs in one process. The hub starts with the first stream: a process that only notifies never listens."""

    def __init__(
        self,
        dsns: tuple[Dsn, Dsn],
        settings: Settings,
        presence: Presence,
        keys: Callable[[], Sequence[str | bytes]],
    ) -> None:
        self.pid = os.getpid()
        self._keys = keys
        dsn, self._listen_dsn = dsns
        self._settings = settings
        self._presence = presence
        self._pools = (
            Pool(dsn, "notify", _NOTIFY_CONNECTIONS),
            Pool(dsn, "log", _LOG_CONNECTIONS, down_for=0.5),
            Pool(dsn, "prune", 1),
        )
        self.publisher = Publisher(self._pools[0])
        self.log = EventLog(self._pools[1])
        self._starting = threading.Lock()
        self._stopped = False
        self._streams: tuple[Hub, Replay] | None = None
        self._threads: tuple[Listener | Ticker | Pruner, ...] = ()

    @property
    def serves_streams(self) -> bool:
        return self._streams is not None

    def streams(self) -> tuple[Hub, Replay]:
        if self._streams is None:
            with self._starting:
                if self._streams is None:
                    if self._stopped:
                        raise RuntimeError("flask_pg_sse was closed while this stream was about to start.")
                    self._streams = self._start()
        return self._streams

    def _start(self) -> tuple[Hub, Replay]:
        settings, heartbeat = self._settings, self._settings.heartbeat
        hub = Hub(
            lambda channels: listener.listen(channels),
            lambda channels: listener.unlisten(channels),
            heartbeat=heartbeat,
            retry=settings.retry,
            send_timeout=settings.send_timeout,
            places=_places(settings),
        )
        listener = Listener(
            self._listen_dsn,
            hub.deliver,
            hub.gap,
            self._presence,
            pruned=hub.pruned,
            answered=hub.admission.answered,
            orders=Orders(self._keys, hub.disconnect),
            beat_every=min(BEAT_EVERY, heartbeat),
        )
        shortest = min(heartbeat, settings.send_timeout, settings.max_age or heartbeat)
        threads = (listener, Ticker(hub, shortest), Pruner(self._pools[2], self._presence, settings.retention))
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
        if self._streams is not None:
            self._streams[0].drain("shutdown")
        for thread in reversed(self._threads):
            thread.stop(timeout)
        for pool in self._pools:
            pool.close()


def _places(settings: Settings) -> Places:
    most, each = settings.max_streams, settings.max_streams_per_client
    room, holds = room_for_streams(shutdown.gunicorn_worker())
    if most is None:
        return Places(room, each, most_here=room)
    if holds is not None and most >= holds:
        logger.warning(
            "SSE_MAX_STREAMS is %d, and this worker holds %d connections at once: full of streams it would answer "
            "nothing else. Raise --worker-connections (--threads under gthread), or lower SSE_MAX_STREAMS.",
            most,
            holds,
        )
    return Places(most, each, most_here=sys.maxsize)
