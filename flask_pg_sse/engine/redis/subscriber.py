"""A connection that is subscribed to channels of Redis: what it has been asked, and what it says.

Nothing here waits, except in the middle of a message or of a command. https://redis.io/docs/latest/develop/pubsub/
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from ...concurrency.forks import close_in_children
from ..broker import ANSWER_WITHIN, Broker


@dataclass(slots=True)
class _Question:
    """A command whose answers have not all come: one for each of `names`, or one error for all."""

    subscribes: bool
    names: set[bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """Redis has subscribed this connection to channels; or it has refused to, because of `refusal`."""

    names: Sequence[str]
    refusal: redis.ResponseError | None = None


class Subscriber:
    """One connection. It asks one question after another, and Redis answers in their order."""

    def __init__(self, broker: Broker) -> None:
        self._connection = broker.connect()
        # redis-py closes its socket by itself when a read fails. A descriptor of our own can be watched until close().
        self._number = os.dup(self._connection._sock.fileno())
        close_in_children(self)
        self._questions: deque[_Question] = deque()
        self._alive_at = time.monotonic()  # when something came last, or when the oldest question was asked

    def fileno(self) -> int:
        """Return a descriptor that is readable when something has come."""
        return self._number

    @property
    def is_asked(self) -> bool:
        """Whether a question has not been answered yet."""
        return bool(self._questions)

    def subscribe(self, names: Sequence[str]) -> None:
        self._ask("SUBSCRIBE", names, subscribes=True)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._ask("UNSUBSCRIBE", names)

    def ping(self) -> None:
        self._ask("PING", ())

    def _ask(self, command: str, names: Sequence[str], *, subscribes: bool = False) -> None:
        if not self._questions:
            self._alive_at = time.monotonic()
        encoded = [name.encode() for name in names]
        self._questions.append(_Question(subscribes, set(encoded)))
        self._connection.send_command(command, *encoded, check_health=False)

    def idle(self) -> float:
        """Return for how many seconds nothing has come, and no question has been asked.

        Raises TimeoutError if a question has been waiting for its answer, and nothing has come, for 5 seconds.
        """
        idle = time.monotonic() - self._alive_at
        if self._questions and idle >= ANSWER_WITHIN:
            raise TimeoutError(f"Redis has said nothing for {idle:.0f} s, and was asked")
        return idle

    def receive(self) -> tuple[str, bytes] | Answer | None:
        """Return a message with its channel, or an answer; None if nothing more has come."""
        while self._connection.can_read(0):
            try:
                said = self._connection.read_response(disable_decoding=True, push_request=True)
            except redis.ResponseError as error:
                said = error
            self._alive_at = time.monotonic()
            if (found := self._read(said)) is not None:
                return found
        return None

    def _read(self, said: Any) -> tuple[str, bytes] | Answer | None:
        if isinstance(said, list) and said[0] == b"message":
            return said[1].decode(), said[2]
        if not self._questions:
            return None
        question = self._questions[0]
        if isinstance(said, list) and said[0] in (b"subscribe", b"unsubscribe"):
            question.names.discard(said[1])
            if not question.names:
                self._questions.popleft()
            return Answer([said[1].decode()]) if question.subscribes else None
        self._questions.popleft()
        if question.subscribes and isinstance(said, redis.ResponseError):
            return Answer([name.decode() for name in question.names], said)
        return None

    def close(self) -> None:
        self._connection.disconnect()
        os.close(self._number)
