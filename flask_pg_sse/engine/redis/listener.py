"""The listener on Redis: it subscribes in batches, and hands over arriving events turn by turn."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import redis

from ...concurrency.greenlets import checkpoint
from ...repeats import Repeats, times
from ..base import Disconnect, Item, Readiness, Sink
from ..broker import ANSWER_WITHIN, Broker
from ..listener import BATCH, LINGER, PAUSE, TURN_BYTES, TURN_EVENTS, Listener
from ..listens import ListenTable
from ..outage import Outage
from .codec import Decoder
from .subscriber import Answer, Subscriber

logger = logging.getLogger(__name__)

# Seconds without a word from Redis before it is asked for one. Only an answer that stays away tells of a server that
# hangs, or that vanished silently.
BEAT_EVERY = 3.0


class RedisListener(Listener):
    """Listens to Redis. `linger` and `beat_every` are in seconds."""

    def __init__(self, broker: Broker, sink: Sink, *, linger: float = LINGER, beat_every: float = BEAT_EVERY) -> None:
        super().__init__(sink, ListenTable(linger, str), Outage(f"Redis at {broker}", redis.RedisError))
        self._broker = broker
        self._beat_every = beat_every
        self._decoder = Decoder()
        self._lost_one = False  # a connection was lost that may have been subscribed
        self._recovered = False  # whether all is subscribed again that was wanted when this connection began
        self._batches = 0  # left until then
        self._begun: list[str] = []  # subscribed until then
        self._refusals = Repeats()

    def _connect(self) -> Subscriber:
        return Subscriber(self._broker)

    def _lost(self) -> None:
        self._lost_one = True

    def _serve(self, connection: Subscriber) -> None:
        self._begun, self._recovered = [], False
        self._batches = math.ceil(self._listens.restart() / BATCH)
        self._ready(Readiness.READY, earlier=())  # Redis carries no commands
        self._wakeup.watch(connection.fileno())
        while not self._stopping:
            while self._hand_over(connection) and not self._stopping:
                pass
            self._change_channels(connection)
            self._wakeup.wait(self._next_chore_in(connection))

    def _next_chore_in(self, connection: Subscriber) -> float:
        """Return the seconds until something is due, and ask a connection that has been silent whether it is there."""
        idle = connection.idle()
        if connection.is_asked:
            return ANSWER_WITHIN - idle
        if not self._recovered:
            return 0
        if idle >= self._beat_every:
            connection.ping()
            return ANSWER_WITHIN
        return min(self._beat_every - idle, self._listens.next_due_in())

    def _change_channels(self, connection: Subscriber) -> None:
        """Ask for the next batch of channels, once all questions are answered.

        So an UNSUBSCRIBE never overtakes the answer to a SUBSCRIBE of the same channel.
        """
        if connection.is_asked:
            return
        if not (self._recovered or self._batches):
            self._recover()
        self._batches -= 1
        ended, begun = self._listens.due(BATCH)
        if ended:
            connection.unsubscribe(ended)
        if begun:
            connection.subscribe(begun)

    def _recover(self) -> None:
        """Say what may be lost, once every channel is subscribed again: what is loaded from here on misses nothing."""
        lost_one, self._lost_one = self._lost_one, False
        self._recovered = True
        self._outage.over()
        if lost_one:
            logger.warning("Events since the connection to Redis at %s broke are lost.", self._broker)
            self._sink.gap("reconnected", 0)
        else:
            logger.info("Listening to Redis at %s.", self._broker)
        self._sink.caught_up()
        self._listens.confirm(self._begun, set(self._begun))
        self._begun = []

    def _hand_over(self, connection: Subscriber) -> bool:
        """Deliver one turn of arrived events. Return True if it was a full turn, after which there may be more."""
        turn: list[Item] = []
        size = 0
        try:
            while len(turn) < TURN_EVENTS and size < TURN_BYTES:
                found = connection.receive()
                if found is None:
                    return False
                if isinstance(found, Answer):
                    self._answered(connection, found)
                    continue
                name, payload = found
                channel = self._listens.channel_of(name)
                block = self._decoder.decode(payload) if channel is not None else None
                if channel is not None and block is not None:
                    turn.append((channel, block, 0))
                    size += len(block)
        finally:  # deliver the events that arrived before the connection broke
            if turn:
                self._sink.deliver(turn, 0)
        checkpoint(PAUSE)
        return True

    def _answered(self, connection: Subscriber, answer: Answer) -> None:
        if answer.refusal is None:
            if self._recovered:
                self._listens.confirm(answer.names, set(answer.names))
            else:
                self._begun += answer.names
            return
        self._refused(connection, answer.names, answer.refusal)

    def _refused(self, connection: Subscriber, names: Sequence[str], refusal: redis.ResponseError) -> None:
        """Find out which channel is refused: Redis refuses a whole command because of one."""
        if len(names) > 1:
            half = len(names) // 2
            connection.subscribe(names[:half])
            connection.subscribe(names[half:])
            return
        self._listens.confirm(names, set())
        if not self._recovered:  # streams that heard it until now must not stay open, and hear nothing
            self._sink.control(Disconnect(None, names[0]))
        if number := self._refusals.count(str(refusal), time.monotonic()):
            logger.warning("Redis refuses SUBSCRIBE on channel %r: %s%s", names[0], refusal, times(number))
