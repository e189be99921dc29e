"""The engine on Redis: PUBLISH and SUBSCRIBE, as sse_relay_server and flask-sse have them.

Redis keeps nothing. An event reaches the processes that are subscribed at that moment, and no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import redis

from ...errors import ConfigurationError, EventLogMissing
from ...event import Event
from ..base import Asked, Disconnect, Look, Page, Sink, Tail
from ..broker import Broker
from ..listener import Listening
from .codec import to_payload
from .listener import BEAT_EVERY, RedisListener

# Connections for sending. A PUBLISH takes less than 1 ms, so a few serve a whole worker.
_PUBLISH_CONNECTIONS = 4
_NO_LOG = "Redis keeps no events: the event log is PostgreSQL's."


class RedisEngine(Listening):
    """One app's Redis in one process; see `base.Engine`.

    A lost connection must be noticed within `longest_silence` seconds, and the time in which Redis may answer.
    """

    def __init__(self, broker: Broker, *, longest_silence: float = BEAT_EVERY) -> None:
        self._broker = broker
        self._beat_every = min(BEAT_EVERY, longest_silence)
        self._client: Any = redis.Redis(connection_pool=broker.pool(_PUBLISH_CONNECTIONS))
        self._listener: RedisListener | None = None

    # -- receiving

    def start(self, sink: Sink, asked: Asked | None = None) -> None:
        self._listener = RedisListener(self._broker, sink, beat_every=self._beat_every)
        self._listener.start()

    def stop(self, timeout: float) -> None:
        if self._listener is not None:
            self._listener.stop(timeout)
        self._client.connection_pool.disconnect()

    # -- sending

    def publish(
        self, channel: str, events: Sequence[Event], *, durable: bool = True, connection: Any = None
    ) -> int | None:
        if connection is not None:
            raise TypeError(
                "notify(connection=…) sends within a transaction of PostgreSQL, and here Redis carries the events: "
                "call it without connection, after the commit."
            )
        payloads = [to_payload(event) for event in events]
        with self._asking():
            if len(payloads) == 1:
                self._client.publish(channel, payloads[0])
            else:
                with self._client.pipeline() as transaction:
                    for payload in payloads:
                        transaction.publish(channel, payload)
                    transaction.execute()
        return None

    def control(self, message: Disconnect) -> None:
        raise ConfigurationError(
            "disconnect() needs PostgreSQL: over Redis' pub/sub a worker could miss the command, and anybody could "
            f"repeat it. Set DATABASE_URL and no {self._broker.source}, or end streams by SSE_MAX_AGE."
        )

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Raise `DatabaseUnavailable` for the errors of redis-py."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise self._broker.unavailable(error) from error

    # -- reading

    def head(self, connection: Any = None) -> int:
        return 0

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        raise EventLogMissing(_NO_LOG)

    def look(self, ids: Collection[int]) -> Look:
        raise EventLogMissing(_NO_LOG)

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        raise EventLogMissing(_NO_LOG)

    def now(self) -> float:
        with self._asking():
            seconds, microseconds = self._client.time()
        return float(seconds) + float(microseconds) / 1_000_000
