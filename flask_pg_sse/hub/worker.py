"""The parts of one app that run in one process: engine, hub, ticker. Each starts at its first use.

A suite may make an app for each test, and close none. So nothing that is started refers to its app: once the garbage
collector has freed the app, its connections are freed too, and its threads end with its last stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
import weakref
from typing import Protocol

from ..concurrency.locks import Lock
from ..engine.base import Disconnect, Engine
from ..engine.memory import MemoryEngine
from ..engine.outbox import Outbox
from ..errors import ConfigurationError
from ..server import console, shutdown
from ..server.host import HostPresence
from ..server.siblings import Answer, Question
from ..settings import Settings
from ..stats import Stats
from .admission import Admission, TryLater, stream_limiter
from .figures import figures, listened
from .hub import Hub
from .replay import Replay
from .ticker import Ticker

# Seconds from the start of a worker in which it usually begins to hear the database. Streams of later requests do not
# wait for that before they are answered.
_MOMENT = 1.0
# The same in tests of apps, whose stream() does not come back as a browser does. A busy machine takes longer.
_MOMENT_IN_TESTS = 5.0
# Seconds in which threads must end. After that they end by themselves.
PATIENCE = 5.0
# So many apps that are in use in one process are probably those of a suite, whose tests are done with most of them.
_MANY_APPS = 8
_collect_at = _MANY_APPS


class Owner(Protocol):
    """What a worker needs of the app's runtime."""

    def app_id(self) -> str: ...


class Worker:
    """The parts of one app that run in one process.

    Each part starts at its first use, so a process that only notifies never listens. `owner` is the app's runtime, to
    which nothing here refers strongly. Others on this host can find and ask the worker from its first stream on, and a
    gunicorn worker at once.
    """

    def __init__(self, settings: Settings, engine: Engine, owner: Owner) -> None:
        console.check()
        self.pid = os.getpid()
        self._owner = weakref.ref(owner)
        self.stats = Stats(Lock())
        self.presence: HostPresence | None = None
        shutdown.watch_here()  # before stream_limiter(), which looks up this worker
        self.engine = engine
        self.admission = Admission(stream_limiter(settings.max_streams, settings.max_streams_per_client))
        self._settings = dataclasses.replace(settings, database_url=None, listen_url=None)  # may be the app's functions
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

    def listen_soon(self, *, in_test: bool) -> None:
        """Start to listen, if nothing has yet, and give that a moment.

        A right is best checked when this process hears the commands that take it away. A stream whose right was checked
        before that comes back and is checked again, if such a command may have been missed.
        """
        _ = self.streams
        self.admission.wait_to_hear(self._started_at + (_MOMENT_IN_TESTS if in_test else _MOMENT))

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
        self.engine.stop(PATIENCE)
        if self.presence is not None:
            self.presence.stop(PATIENCE)

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


def collect_abandoned() -> None:
    """Have the garbage collector look for apps, if many are in use. They hold more than memory, of which it is told."""
    global _collect_at
    if sum(worker.is_owned for worker in tuple(_workers)) >= _collect_at:
        gc.collect()
        _collect_at = max(_MANY_APPS, 2 * sum(worker.is_owned for worker in tuple(_workers)))
