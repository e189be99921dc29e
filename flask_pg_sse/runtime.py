"""What one app has running: settings, hub and engine, started at first use in each process.

Making a `Runtime` opens nothing and makes no lock: under --preload that happens in gunicorn's arbiter, before the
workers are forked and before gevent patches them. What was started belongs to the process that started it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .channels import check_channel
from .engine.base import Disconnect, Engine
from .engine.caller import check_caller
from .engine.memory import MemoryEngine
from .engine.postgres.dsn import Dsn, configured_databases
from .engine.postgres.engine import PostgresEngine
from .errors import ConfigurationError, DatabaseUnavailable
from .event import make_event
from .hub.admission import Admission, StreamLimiter, TryLater
from .hub.hub import Hub
from .hub.replay import Replay
from .hub.ticker import Ticker
from .server import shutdown
from .server.capacity import room_for_streams
from .settings import Settings, secret_keys

logger = logging.getLogger(__name__)


class Runtime:
    """One app's streams and notifications.

    `config` is read, and checked, at first use, and then fixed. `dumps` turns data into JSON.
    """

    def __init__(self, config: Mapping[str, Any], dumps: Callable[[Any], str]) -> None:
        self._config = config
        self._dumps = dumps
        self._settings: Settings | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._worker: Worker | None = None
        self.captured_by: Engine | None = None  # gets in tests what the app sends, instead of its own engine

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
        if not events:
            return None
        return self._engine.publish(channel, events, durable=durable, connection=connection)

    def cursor(self) -> int | None:
        """Return the head of the event log, None without a log."""
        return self._engine.head() or None

    def disconnect(self, subject: str | None, channel: str | None) -> None:
        """Have every process end streams. Through the event log, where there is one: it is then also obeyed late."""
        self.signing_keys("disconnect()")
        self._engine.control(Disconnect(subject, channel))

    @property
    def _engine(self) -> Engine:
        return self.captured_by or self.worker.engine

    def keys(self) -> Sequence[str | bytes]:
        """Return the keys of signatures, oldest first; none if the app has none. Raises `ConfigurationError`."""
        return secret_keys(self.settings, self._config)

    def signing_keys(self, what: str) -> Sequence[str | bytes]:
        """Return the keys; `ConfigurationError` if there is none with which to do `what`."""
        keys = self.keys()
        if not keys:
            raise ConfigurationError(f"{what} needs a secret key: set SECRET_KEY, or SSE_SECRET_KEY, to a random text.")
        return keys

    def close(self, timeout: float = 5.0) -> None:
        """End all streams, threads and connections of this process; the next use starts anew."""
        with self._lock():
            worker, self._worker = self._worker, None
        if worker is not None and worker.pid == os.getpid():
            worker.stop(timeout)

    @property
    def worker(self) -> Worker:
        """What this app has in this process."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            with self._lock():
                worker = self._worker
                if worker is None or worker.pid != os.getpid():
                    worker = self._worker = Worker(self.settings, self._new_engine())
        return worker

    def _new_engine(self) -> Engine:
        settings = self.settings
        if settings.broker_url is not None:
            return MemoryEngine(log=settings.event_log is not False, retention=settings.retention)
        return PostgresEngine(
            self.databases,
            event_log=settings.event_log,
            retention=settings.retention,
            longest_silence=settings.heartbeat,
            keys=self.keys,
        )

    def databases(self) -> tuple[Dsn, Dsn]:
        """Return where to notify and where to listen. Raises `ConfigurationError`."""
        return configured_databases(self.settings, self._config)

    def _lock(self) -> threading.Lock:
        # One a process: a lock that was made before a fork may be held there for ever, and be of the wrong kind.
        return self._locks.setdefault(os.getpid(), threading.Lock())


class Worker:
    """What runs in one process, each part from its first use: one that only notifies never listens."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.pid = os.getpid()
        shutdown.watch_here()  # before the room is asked for: it is the worker's
        self.engine = engine
        self.admission = Admission(_stream_limiter(settings))
        self._settings = settings
        self._starting = threading.Lock()
        self._stopped = False
        self._streams: tuple[Hub, Replay] | None = None
        self._ticker: Ticker | None = None

    @property
    def streams(self) -> tuple[Hub, Replay]:
        """What serves streams, with engine and ticker running. Raises `TryLater` once they have been stopped."""
        if self._streams is None:
            with self._starting:
                if self._streams is None:
                    if self._stopped:
                        raise TryLater("shutdown")
                    self._streams = self._start()
        return self._streams

    def wait_until_decidable(self, *, asks: bool) -> None:
        """Wait until it can be decided whether a stream may begin, at a place that it holds. Raises `TryLater`.

        `asks` says that the app is going to be asked: only where a command to end the stream would be heard. Raises
        `EventLogMissing` where the configuration requires a log and the database answers that it has none.
        """
        admission = self.admission
        log_unknown = self._settings.event_log is True and not admission.log_in_use
        if not (asks or log_unknown):
            return
        _ = self.streams
        if log_unknown:
            admission.wait_for_answer()
            if admission.log_missing:  # so it was when the engine looked
                try:
                    self.engine.head()
                except DatabaseUnavailable:
                    raise TryLater("unavailable") from None
        if asks:
            admission.wait_for_commands()

    def _start(self) -> tuple[Hub, Replay]:
        settings, heartbeat = self._settings, self._settings.heartbeat
        hub = Hub(
            self.engine,
            heartbeat=heartbeat,
            retry=settings.retry,
            send_timeout=settings.send_timeout,
            admission=self.admission,
        )
        ticker = Ticker(hub, min(heartbeat, settings.send_timeout, settings.max_age or heartbeat))
        try:
            ticker.start()
            self.engine.start(hub)
        except BaseException:  # no thread to be had, or a greenlet that was killed while it waited for one
            ticker.stop(0)
            raise
        self._ticker = ticker
        return hub, Replay(hub, self.engine, heartbeat=heartbeat)

    def stop(self, timeout: float) -> None:
        with self._starting:  # a start that is under way comes to its end first
            self._stopped = True
        self.admission.close("shutdown")
        if self._streams is not None:
            self._streams[0].drain("shutdown")
        if self._ticker is not None:
            self._ticker.stop(timeout)
        self.engine.stop(timeout)


def _stream_limiter(settings: Settings) -> StreamLimiter:
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
