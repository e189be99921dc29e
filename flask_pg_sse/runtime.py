"""Hold the running parts of one app: settings, hub and engine. They start at first use in each process.

Creating a `Runtime` opens nothing and creates no lock. Under --preload it is created in gunicorn's arbiter, before the
workers are forked and before gevent patches them. Started parts belong to the process that started them.

Nothing that is started refers to its app, nor to its configuration, which may refer to the app (`hub/worker.py`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import stats
from .channels import check_channel
from .concurrency.locks import Lock
from .engine.base import Disconnect, Engine
from .engine.caller import check_caller
from .engine.last_result import LastResult
from .engine.losses import Losses
from .engine.memory import MemoryEngine
from .engine.postgres.dsn import Dsn, Engines, configured_databases
from .engine.postgres.engine import PostgresEngine
from .errors import ConfigurationError, DatabaseNotConfigured
from .event import make_event
from .hub.worker import PATIENCE, Worker, collect_abandoned
from .server import console
from .server.siblings import app_id
from .settings import Settings, secret_keys, unknown_keys

if TYPE_CHECKING:
    from .engine.broker import Broker

logger = logging.getLogger(__name__)


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

    def close(self, timeout: float = PATIENCE) -> None:
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
            worker.stop(PATIENCE)

    @property
    def worker(self) -> Worker:
        """Return this app's worker in this process, and create it at first use."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            collect_abandoned()
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
            keys=LastResult[Sequence[str | bytes]](weakref.WeakMethod(self.keys), ()),
        )

    @functools.cached_property
    def databases(self) -> Callable[[], tuple[Dsn, Dsn | None]]:
        """A function that returns the database to notify and the one to listen to, None if LISTEN is not used.

        It finds them at its first call, and logs them then. Raises `ConfigurationError`. It does not refer to the app.
        """
        return _FoundOnce(functools.partial(_databases, self.redis, self.settings, self._config, self.engines))

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


class _FoundOnce:
    """Returns what `find` finds at the first call, and lets go of `find` then."""

    def __init__(self, find: Callable[[], tuple[Dsn, Dsn | None]]) -> None:
        self._find: Callable[[], tuple[Dsn, Dsn | None]] | None = find
        self._found: Any = None

    def __call__(self) -> tuple[Dsn, Dsn | None]:
        if (find := self._find) is not None:
            self._found = find()
            self._find = None
        found: tuple[Dsn, Dsn | None] = self._found
        return found


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
