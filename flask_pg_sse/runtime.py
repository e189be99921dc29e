"""Hold the running parts of one app: settings, hub and engine. They start at first use in each process.

Creating a `Runtime` opens nothing and creates no lock. Under --preload it is created in gunicorn's arbiter, before the
workers are forked and before gevent patches them. Started parts belong to the process that started them.

A suite may make an app for each test, and close none. So nothing that is started refers to its app: once the garbage
collector has freed the app, its connections are freed too, and its threads end with its last stream.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import stats
from .channels import check_channel
from .concurrency.locks import Lock
from .engine.base import Disconnect, Engine
from .engine.caller import check_caller
from .engine.losses import Losses
from .engine.memory import MemoryEngine
from .engine.outbox import Outbox
from .engine.postgres.dsn import Dsn, Engines, configured_databases
from .engine.postgres.engine import PostgresEngine
from .errors import ConfigurationError, DatabaseNotConfigured
from .event import make_event
from .hub.admission import Admission, TryLater, stream_limiter
from .hub.figures import figures, listened
from .hub.hub import Hub
from .hub.replay import Replay
from .hub.ticker import Ticker
from .server import console, shutdown
from .server.host import HostPresence
from .server.siblings import Answer, Question, app_id
from .settings import Settings, secret_keys, unknown_keys
from .stats import Stats

if TYPE_CHECKING:
    from .engine.broker import Broker

logger = logging.getLogger(__name__)

# Seconds from the start of a worker in which it usually begins to hear the database. Streams of later requests do not
# wait for that before they are answered.
_MOMENT = 1.0
# Seconds in which threads must end. After that they end by themselves.
_PATIENCE = 5.0
# So many apps that are in use in one process are probably those of a suite, whose tests are done with most of them.
_MANY_APPS = 8
_collect_at = _MANY_APPS


class Runtime:
    """One app's streams and notifications.

    `config` is read and checked once, at first use. `dumps` turns data into JSON.
    """

    def __init__(self, config: Mapping[str, Any], dumps: Callable[[Any], str]) -> None:
        console.install()
        self._config = config
        self._dumps = dumps
        self._settings: Settings | None = None
        self._locks: dict[int, Lock] = {}
        self._worker: Worker | None = None
        self.redis: Broker | None = None  # where the events are, if not in PostgreSQL
        self.losses = Losses()
        self.engines: Engines = tuple  # returns the app's SQLAlchemy engines for its database
        self._warned_of: set[str] = set()

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self.warn_of_unknown_keys()
            self._settings = Settings.from_config(self._config)
        return self._settings

    def warn_of_unknown_keys(self) -> None:
        """Log a warning for each `SSE_` key of the config that is no setting, once."""
        for key, text in unknown_keys(self._config).items():
            if key not in self._warned_of:
                self._warned_of.add(key)
                logger.warning("%s", text)

    def use_redis(self, url: str, source: str) -> None:
        """Carry the events over Redis' pub/sub. `source` is the setting that has the URL.

        Raises `ConfigurationError` if the URL cannot be used, if redis-py is not installed, or if the configuration
        requires an event log, which Redis does not have.
        """
        from .engine.broker import to_broker

        if self.settings.event_log is True:
            raise ConfigurationError(
                f"SSE_EVENT_LOG is true, and {source} is set: Redis keeps no events. Remove one of the two."
            )
        self.redis = to_broker(url, source)

    def notify(
        self,
        channel: str,
        items: Sequence[object],
        fields: Mapping[str, Any],
        connection: Any = None,
        *,
        durable: bool = True,
    ) -> int | None:
        """Send one event for each of `items`, all in one transaction.

        It is the transaction of the caller's `connection`, or of a connection of the package if none is given. Returns
        the last event's id in the log if it is already known, otherwise None.
        """
        try:
            id = self._notify(channel, items, fields, connection, durable)
        except Exception as error:
            self.count(stats.NOTIFY_ERRORS, stats.notify_error_kind(error))
            raise
        self.count(stats.NOTIFIED)
        return id

    def _notify(
        self, channel: str, items: Sequence[object], fields: Mapping[str, Any], connection: Any, durable: bool
    ) -> int | None:
        check_channel(channel)
        if connection is not None:
            check_caller(connection, "notify")
        events = [make_event(item, **fields, dumps=self._dumps) for item in items]
        if not events:
            return None
        engine = self.worker.engine
        id = engine.publish(channel, events, durable=durable, connection=connection)
        if connection is not None:
            self.losses.follow(connection, channel, len(events), used=not isinstance(engine, MemoryEngine))
        return id

    def count(self, counter: stats.Counter, of: str = "") -> None:
        """Add one to a counter of this process, if it has been used."""
        worker = self._worker
        if worker is not None and worker.pid == os.getpid():
            worker.stats.count(counter, of=of)

    def cursor(self, connection: Any = None) -> int | None:
        """Return the head of the event log, as a caller's `connection` sees it if given; None without a log."""
        if connection is not None:
            check_caller(connection, "sse_cursor")
        return self.worker.engine.head(connection) or None

    def disconnect(self, command: Disconnect) -> None:
        """Send a command to every process to end streams."""
        self.signing_keys("disconnect()")
        self.worker.engine.control(command)

    def sender_for_later(self) -> Callable[[Disconnect, float], None] | None:
        """Return what sends a command in some seconds; None if there is no database. Raises `ConfigurationError`."""
        self.signing_keys("disconnect()")
        to_database = isinstance(self.worker.engine, PostgresEngine) and self.databases()
        return self.worker.outbox.add if to_database else None

    def keys(self) -> Sequence[str | bytes]:
        """Return the keys for signatures, oldest first; no keys if none is set. Raises `ConfigurationError`."""
        return secret_keys(self.settings, self._config)

    def signing_keys(self, what: str) -> Sequence[str | bytes]:
        """Return the keys for signatures. Raises `ConfigurationError`, which names `what`, if there is no key."""
        keys = self.keys()
        if not keys:
            raise ConfigurationError(
                f"{what} needs a secret key: set SECRET_KEY, or SSE_SECRET_KEY, to a random text. Without an app, give "
                "the web app's key: PgSSE(secret_key=…), or SSE_SECRET_KEY in the environment."
            )
        return keys

    def close(self, timeout: float = _PATIENCE) -> None:
        """End all streams, threads and connections of this process. The next use starts them again."""
        with self._lock():
            worker, self._worker = self._worker, None
        if worker is not None and worker.pid == os.getpid():
            worker.stop(timeout)

    @contextlib.contextmanager
    def running_on(self, engine: Engine) -> Iterator[None]:
        """Run the app on another engine, for a test. The streams that begin meanwhile end with it."""
        worker = Worker(self.settings, engine, self)
        before, self._worker = self._worker, worker
        try:
            yield
        finally:
            self._worker = before
            worker.stop(_PATIENCE)

    @property
    def worker(self) -> Worker:
        """Return this app's worker in this process, and create it at first use."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            _collect_abandoned()
            with self._lock():
                worker = self._worker
                if worker is None or worker.pid != os.getpid():
                    worker = self._worker = Worker(self.settings, self._new_engine(), self)
        return worker

    def _new_engine(self) -> Engine:
        settings = self.settings
        if self.redis is not None:
            from .engine.redis.engine import RedisEngine

            return RedisEngine(self.redis, longest_silence=settings.heartbeat)
        if settings.broker_url is not None:
            return MemoryEngine(log=settings.event_log is not False, retention=settings.retention)
        return PostgresEngine(
            self.databases,
            event_log=settings.event_log,
            retention=settings.retention,
            log_owner=settings.log_owner,
            longest_silence=settings.heartbeat,
            keys=functools.partial(secret_keys, settings, self._config),
        )

    @functools.cached_property
    def databases(self) -> Callable[[], tuple[Dsn, Dsn | None]]:
        """A function that returns the database to notify and the one to listen to, None if LISTEN is not used.

        It finds them at its first call, and logs them then. Raises `ConfigurationError`. It does not refer to the app.
        """
        return functools.cache(functools.partial(_databases, self.redis, self.settings, self._config, self.engines))

    def appear(self) -> None:
        """Have a gunicorn worker listed among those of its host, although it is not used yet."""
        with contextlib.suppress(ConfigurationError):  # said at first use
            _ = self.worker

    def app_id(self) -> str:
        """Return the name under which the workers of this app find each other: same bus, same key, same name.

        Neither can be told from it. Raises `ConfigurationError`.
        """
        bus: object = self.redis or self.settings.broker_url
        if bus is None:
            params = self.databases()[0].params
            bus = [params.get(name, "") for name in ("host", "hostaddr", "port", "dbname")]
        return app_id(str(bus), (self.keys() or [""])[-1])

    def _lock(self) -> Lock:
        # One lock for each process. A lock from before a fork may stay locked forever in the child, and may be of the
        # wrong kind (created before gevent patched the process).
        return self._locks.setdefault(os.getpid(), Lock())


def _databases(redis: Broker | None, *configured: Any) -> tuple[Dsn, Dsn | None]:
    try:
        return configured_databases(*configured)
    except DatabaseNotConfigured:
        if redis is None:
            raise
        raise DatabaseNotConfigured(
            f"The events come from Redis ({redis.source}), which keeps none: the event log needs PostgreSQL. "
            f"Set DATABASE_URL to postgresql://user:password@host/database, and no {redis.source}."
        ) from None


def _collect_abandoned() -> None:
    """Have the garbage collector look for apps, if many are in use. They hold more than memory, of which it is told."""
    global _collect_at
    if sum(worker.is_owned for worker in tuple(_workers)) >= _collect_at:
        gc.collect()
        _collect_at = max(_MANY_APPS, 2 * sum(worker.is_owned for worker in tuple(_workers)))


class Worker:
    """The parts of one app that run in one process.

    Each part starts at its first use, so a process that only notifies never listens. `owner` is the app's runtime, to
    which nothing here refers strongly. Others on this host can find and ask the worker from its first stream on, and a
    gunicorn worker at once.
    """

    def __init__(self, settings: Settings, engine: Engine, owner: Runtime) -> None:
        console.check()
        self.pid = os.getpid()
        self._owner = weakref.ref(owner)
        self.stats = Stats(Lock())
        self.presence: HostPresence | None = None
        shutdown.watch_here()  # before stream_limiter(), which looks up this worker
        self.engine = engine
        self.admission = Admission(stream_limiter(settings.max_streams, settings.max_streams_per_client))
        self._settings = settings
        self.outbox = Outbox(self.engine.control, self._obey)
        self._starting = Lock()
        self._stopped = False
        self._started_at = 0.0
        self._streams: tuple[Hub, Replay] | None = None
        self._ticker: Ticker | None = None
        _workers.add(self)
        if shutdown.gunicorn_worker() is not None:
            self._appear()

    @property
    def is_owned(self) -> bool:
        """Whether the app is in use in this process."""
        return not self._stopped and self._owner() is not None

    @property
    def streams(self) -> tuple[Hub, Replay]:
        """Return the hub and the replay, and start engine and ticker at first use. Raises `TryLater` after `stop()`."""
        if self._streams is None:
            with self._starting:
                if self._streams is None:
                    if self._stopped:
                        raise TryLater("shutdown")
                    self._streams = self._start()
        return self._streams

    def _obey(self, command: Disconnect) -> None:
        """End the streams of this process that a command names."""
        if self._streams is not None:
            self._streams[0].disconnect(command)

    def listen_soon(self) -> None:
        """Start to listen, if nothing has yet, and give that a moment.

        A right is best checked when this process hears the commands that take it away. A stream whose right was checked
        before that comes back and is checked again, if such a command may have been missed.
        """
        _ = self.streams
        self.admission.wait_to_hear(self._started_at + _MOMENT)

    def _start(self) -> tuple[Hub, Replay]:
        self._started_at = time.monotonic()
        settings, heartbeat = self._settings, self._settings.heartbeat
        hub = Hub(
            self.engine,
            heartbeat=heartbeat,
            retry=settings.retry,
            send_timeout=settings.send_timeout,
            admission=self.admission,
            stats=self.stats,
        )
        every = min(heartbeat, settings.send_timeout, settings.max_age or heartbeat)
        self._appear()
        ticker = Ticker(hub, every, self._owner(), self._end_abandoned, self.outbox.obey_overdue)
        try:
            ticker.start()
            self.engine.start(hub, None if self.presence is None else self.presence.asked)
        except BaseException:  # no thread can be started, or this greenlet was killed while it waited for one
            ticker.stop(0)
            raise
        self._ticker = ticker
        return hub, Replay(hub, self.engine, heartbeat=heartbeat)

    def _end_abandoned(self) -> None:
        """End what is left of an app that is gone, after its last stream. The ticker calls it, and ends then too."""
        self._stopped = True
        self.admission.close("shutdown")
        self.engine.stop(_PATIENCE)
        if self.presence is not None:
            self.presence.stop(_PATIENCE)

    def _appear(self) -> None:
        """Let others on this host find this worker. Not one that has its events in its own memory."""
        owner = self._owner()
        if self.presence is not None or owner is None or isinstance(self.engine, MemoryEngine):
            return
        with contextlib.suppress(ConfigurationError):  # raised again by a stream or a notification
            self.presence = HostPresence(owner.app_id(), self.stats, self.answer)
            self.presence.start()

    def answer(self, question: Question) -> Answer:
        """Answer a question of this host: the figures of this worker."""
        hub = self._streams[0] if self._streams is not None else None
        return figures(self.engine, hub, self.stats, draining=self.draining) | listened(hub, question)

    @property
    def draining(self) -> bool:
        """Whether this worker is about to stop."""
        return self.admission.closed or shutdown.requested()

    def stop(self, timeout: float) -> None:
        with self._starting:  # wait for a start that is under way
            self._stopped = True
        self.admission.close("shutdown")
        if self._streams is not None:
            self._streams[0].drain("shutdown")
        if self._ticker is not None:
            self._ticker.stop(timeout)
        self.outbox.stop(timeout)
        self.engine.stop(timeout)
        if self.presence is not None:
            self.presence.stop(timeout)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
