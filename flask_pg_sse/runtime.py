"""What one app has running: settings, hub and engine, started at first use in each process.

Making a `Runtime` opens nothing and makes no lock: under --preload that happens in gunicorn's arbiter, before the
workers are forked and before gevent patches them. What was started belongs to the process that started it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .channels import check_channel, pg_name
from .errors import DatabaseNotConfigured
from .event import Event, make_event, to_payload
from .hub import Hub
from .postgres.dsn import Dsn, is_postgres, to_dsn
from .postgres.listener import Listener
from .postgres.publish import Publisher, check_caller, send_in_transaction
from .settings import Settings, database_sources
from .ticker import Ticker

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
    ) -> None:
        """Send one event for each of `items` in one transaction: the caller's, or one of the package's own."""
        check_channel(channel)
        if connection is not None:
            check_caller(connection)
        events = [make_event(item, **fields, dumps=self._dumps) for item in items]
        payloads = [to_payload(event, channel) for event in events]
        if self.collect is not None:
            for event in events:
                self.collect(channel, event)
        elif not payloads:
            return
        elif connection is not None:
            send_in_transaction(connection, pg_name(channel), payloads)
        else:
            self._running().publisher.send(pg_name(channel), payloads)

    @property
    def hub(self) -> Hub:
        """The hub of this process, with its listener and ticker running."""
        return self._running().hub()

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
                    process = self._process = _Process(self._dsns(), self.settings)
        return process

    def _lock(self) -> threading.Lock:
        # One a process: a lock that was made before a fork may be held there for ever, and be of the wrong kind.
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _dsns(self) -> tuple[Dsn, Dsn]:
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


class _Process:
    """What runs in one process. The hub starts with the first stream: a process that only notifies never listens."""

    def __init__(self, dsns: tuple[Dsn, Dsn], settings: Settings) -> None:
        self.pid = os.getpid()
        dsn, self._listen_dsn = dsns
        self._settings = settings
        self.publisher = Publisher(dsn)
        self._starting = threading.Lock()
        self._stopped = False
        self._hub: Hub | None = None
        self._listener: Listener | None = None
        self._ticker: Ticker | None = None

    def hub(self) -> Hub:
        if self._hub is None:
            with self._starting:
                if self._hub is None:
                    if self._stopped:
                        raise RuntimeError("flask_pg_sse was closed while this stream was about to start.")
                    self._hub = self._start()
        return self._hub

    def _start(self) -> Hub:
        heartbeat = self._settings.heartbeat
        hub = Hub(
            lambda channels: listener.listen(channels),
            lambda channels: listener.unlisten(channels),
            heartbeat=heartbeat,
            retry=self._settings.retry,
        )
        listener = Listener(self._listen_dsn, hub.deliver, lambda: hub.gap("reconnected"))
        ticker = Ticker(hub, heartbeat)
        try:
            listener.start()
            ticker.start()
        except BaseException:  # no thread to be had, or a greenlet that was killed while it waited for one
            listener.stop(0)
            ticker.stop(0)
            raise
        self._listener, self._ticker = listener, ticker
        return hub

    def stop(self, timeout: float) -> None:
        with self._starting:  # a start that is under way comes to its end first
            self._stopped = True
        if self._hub is not None:
            self._hub.drain("shutdown")
        if self._ticker is not None:
            self._ticker.stop(timeout)
        if self._listener is not None:
            self._listener.stop(timeout)
        self.publisher.close()
