"""Decide whether and when a stream may begin: within the limits, before the worker ends, and with its right intact."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator

from ..channels import heard_unquoted
from ..concurrency.forks import reset_in_children
from ..concurrency.locks import Event, Lock
from ..engine.base import Disconnect, Readiness
from ..server import shutdown
from ..server.capacity import TOO_MANY_STREAMS, room_for_streams
from .subscription import Subscription, Terms

logger = logging.getLogger(__name__)

# Seconds that a stream waits for PostgreSQL. After that its client is told to reconnect later.
OPEN_TIMEOUT = 10.0
# How many `disconnect()` commands are remembered. A request may be in the middle of being admitted when one arrives.
_COMMANDS = 10_000

# The places in use by all apps in this process: the length of the list is their number. It is a list because append()
# and pop() are atomic, and += is not.
_taken_here: list[None] = []


def _reset() -> None:
    global _taken_here
    _taken_here = []  # another list: copies of the parent's streams that end here release their places in the old one


reset_in_children(_reset)
_NONE: set[Subscription] = set()
_NO_ANSWER = (
    f"PostgreSQL has not answered within {OPEN_TIMEOUT:g} s, or its answer waits behind more events than this worker "
    "can handle"
)
# The longest time in seconds that a client waits because the log has been missing for as long.
_LONGEST_WAIT = 30.0
# Milliseconds after which a client comes back that only has to be asked again.
_SOON = 200
# The longest retry that grows by itself, in milliseconds. With the random spread of an `sse-end` it is an hour.
_LONGEST_RETRY = 2_400_000


class TryLater(Exception):
    """The stream cannot begin now, and its client should reconnect. `sse-end` carries `reason`.

    `why` is for the log: what the reason is here, and the remedy; "" if that has been logged already. `kind` tells
    causes of one reason apart, in a fixed word. `since` is for how many seconds the reason holds already, if it will
    hold at every further attempt too. `soon` says that the next attempt will succeed, and need not wait.
    """

    def __init__(self, reason: str, why: str = "", *, kind: str = "", since: float = 0.0, soon: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.why = why
        self.kind = kind
        self.since = since
        self.soon = soon

    def retry(self, usual: int) -> int:
        """Return after how many milliseconds the client must come back, on average; `usual` is `SSE_RETRY`.

        If the reason cannot end by itself, the client comes back after about as long again as it holds already. So each
        wait is about twice the one before, and nothing is remembered of the client.
        """
        if self.soon:
            return min(usual, _SOON)
        return max(usual, min(_LONGEST_RETRY, int(self.since * 1000)))


class StreamLimiter:
    """Limits the open streams of an app: `most` in total, and `most_each` for each client (None: no limit).

    `most_here` limits the streams of all apps in this process together, because they share the worker's connections.
    With None, this app's streams are not counted with those of other apps.

    `release()` takes no lock, because the garbage collector may end a stream in the middle of any statement here.
    """

    def __init__(self, most: int, most_each: int | None, *, most_here: int | None = None) -> None:
        self._most = most
        self._most_each = most_each
        self._most_here = most_here
        self._taken_here = _taken_here
        self._taking = Lock()
        self._taken: list[None] = []  # a list for the same reason as `_taken_here`
        self._of: dict[str, set[Subscription]] = {}

    def acquire(self, subscription: Subscription) -> bool:
        """Give a stream a place. Returns False if none is free."""
        with self._taking:
            if len(self._taken) >= self._most or self._is_full_for(subscription):
                return False
            if self._most_here is not None:
                self._taken_here.append(None)  # before the check: other apps have locks of their own
                if len(self._taken_here) > self._most_here:
                    self._taken_here.pop()
                    return False
            self._taken.append(None)
            subscription.place = None
            self._count(subscription)
            return True

    def count_for(self, subscription: Subscription, terms: Terms) -> bool:
        """Count a stream that has a place under the clients in `terms`. Returns False if one has too many streams."""
        with self._taking:
            subscription.agree(terms)
            if self._is_full_for(subscription):
                return False
            self._count(subscription)
            return True

    def _count(self, subscription: Subscription) -> None:
        if self._most_each is not None:
            for client in subscription.terms.clients:
                self._of.setdefault(client, set()).add(subscription)

    def release(self, subscription: Subscription) -> None:
        """Free the place of a stream, if it has one."""
        try:
            del subscription.place  # this is atomic too: a second call finds no place
        except AttributeError:
            return
        self._taken.pop()
        if self._most_here is not None:
            self._taken_here.pop()
        for client in subscription.terms.clients:
            self._of.get(client, _NONE).discard(subscription)

    def _is_full_for(self, subscription: Subscription) -> bool:
        """Tell whether one of a stream's clients has reached its limit."""
        if self._most_each is None:
            return False
        return any(self._has_most(client, self._most_each) for client in subscription.terms.clients)

    def _has_most(self, client: str, most: int) -> bool:
        streams = self._of.get(client, _NONE)
        if len(streams) < most:
            return False
        # The server may notice late that a client has disconnected. Without this check, the old streams of a page that
        # reloads could block the new ones.
        for subscription in list(streams):
            if subscription.connection is not None and subscription.connection.gone():
                subscription.end(b"", drop=True)
                self.release(subscription)
        return len(streams) >= most

    def why_full(self) -> str:
        """Return, for the log, why no place is free."""
        most = self._most if self._most_here is None else min(self._most, self._most_here)
        return (
            f"this worker has room for {most} streams, and all are open. Start more workers, or raise the limit: it is "
            "SSE_MAX_STREAMS if that is set, else gunicorn's --worker-connections or --threads"
        )

    def why_full_for(self, terms: Terms) -> str:
        """Return, for the log, why none of these clients gets another stream."""
        why = (
            f"{' or '.join(terms.clients)} has {self._most_each} streams in this worker, as many as "
            "SSE_MAX_STREAMS_PER_CLIENT allows. A browser that shows many pages needs as many streams"
        )
        if any(client.startswith("address ") for client in terms.clients):
            why += "; behind a proxy, werkzeug's ProxyFix tells its clients apart"
        return why

    def sweep(self) -> None:
        """Forget the clients that have no stream left."""
        with self._taking:
            for client in [client for client, streams in self._of.items() if not streams]:
                del self._of[client]


def stream_limiter(most: int | None, most_each: int | None) -> StreamLimiter:
    """Return a limiter for `SSE_MAX_STREAMS` and `SSE_MAX_STREAMS_PER_CLIENT` in this process."""
    room, holds = room_for_streams(shutdown.gunicorn_worker())
    if most is None:
        return StreamLimiter(room, most_each, most_here=room)
    if holds is not None and most >= holds:
        logger.warning(TOO_MANY_STREAMS, most, holds)
    return StreamLimiter(most, most_each, most_here=sys.maxsize)


class Admission:
    """Admits new streams. A stream that waits for admission holds a place, because it already occupies the server."""

    def __init__(self, limiter: StreamLimiter) -> None:
        self.limiter = limiter
        self._answered = Event()  # set while there is nothing to wait for
        self._closed: str | None = None
        self._log_missing = ""  # why streams cannot begin, while the configuration requires a log and there is none
        self._log_missing_since = 0.0
        self._heard_at = math.inf  # monotonic time from which this process hears commands
        self._earlier: Collection[Disconnect] | None = None  # the commands from before that time, if all are known
        self._lock = Lock()
        self._missed_at = -math.inf  # monotonic time until which commands may have been missed
        self._commands: deque[tuple[float, Disconnect]] = deque(maxlen=_COMMANDS)  # each with its monotonic time

    @contextlib.contextmanager
    def place(self, subscription: Subscription) -> Iterator[None]:
        """Hold a place for a stream while its request is checked. Raises `TryLater`.

        The place is released at the end of the block, because the stream may never begin. If it begins, it acquires a
        place again.
        """
        if self._closed is not None:
            raise TryLater(self._closed)
        if not self.limiter.acquire(subscription):
            raise TryLater("capacity", self.limiter.why_full())
        try:
            yield
        finally:
            self.limiter.release(subscription)

    def count_for(self, subscription: Subscription, terms: Terms) -> None:
        """Give a stream that holds a place its terms, and count it under its clients. Raises `TryLater`."""
        if not self.limiter.count_for(subscription, terms):
            raise TryLater("capacity", self.limiter.why_full_for(terms), kind="client")

    def engine_is(self, readiness: Readiness, why: str, earlier: Collection[Disconnect] | None) -> bool:
        """Record the engine's state (see `Sink.ready()`). After the first `READY` no command is missed.

        Returns whether it is ready again, having been so before.
        """
        now = time.monotonic()
        again = self._heard_at < math.inf and readiness is Readiness.READY
        missing = why if readiness is Readiness.LOG_MISSING else ""
        if missing and not self._log_missing:
            self._log_missing_since = now
        self._log_missing = missing
        if readiness is Readiness.READY and self._heard_at == math.inf:
            self._earlier, self._heard_at = earlier, now
        if self._heard_at < math.inf or missing:
            self._answered.set()
            return again
        self._answered.clear()
        if self._closed is not None:  # another thread may have called close() just before clear()
            self._answered.set()
        return again

    @property
    def closed(self) -> bool:
        """Whether all further streams are refused, because the worker ends."""
        return self._closed is not None

    def wait_for_answer(self, timeout: float | None = None) -> None:
        """Wait until PostgreSQL has answered, at most `timeout` seconds (`OPEN_TIMEOUT`). Raises `TryLater`."""
        answered = self._closed is None and self._answered.wait(OPEN_TIMEOUT if timeout is None else timeout)
        if self._closed is not None or not answered:
            raise TryLater(self._closed or "unavailable", "" if self._closed else _NO_ANSWER)

    def wait_to_hear(self, until: float) -> None:
        """Wait until this process hears commands, or the log is missing, but not beyond a monotonic time."""
        if (left := until - time.monotonic()) > 0:
            self._answered.wait(left)

    def close(self, reason: str) -> None:
        """Refuse all further streams, and wake those that wait for admission."""
        self._closed = reason
        self._answered.set()

    def revoke(self, command: Disconnect) -> None:
        """Remember a command. It then also refuses streams whose permission check began before it arrived."""
        with self._lock:
            self._commands.append((time.monotonic(), command))

    def missed_commands(self) -> None:
        """Note that commands may have been missed. Streams whose permission check began before are refused."""
        self._missed_at = time.monotonic()

    def why_not(self, subscription: Subscription, *, heard: bool = True) -> TryLater | None:
        """Return why a stream may not begin; None if nothing known here prevents it.

        `heard` says whether the engine receives all events on its channels.
        """
        if self._closed is not None:
            return TryLater(self._closed)
        if self._log_missing:
            since = min(_LONGEST_WAIT, time.monotonic() - self._log_missing_since)
            return TryLater("unavailable", self._log_missing, kind="log", since=since)
        if self._commands:
            with self._lock:
                for at, command in reversed(self._commands):
                    if at < subscription.terms.asked_at:
                        break
                    if concerns(subscription, command):
                        return TryLater("revoked")
        if not heard:
            return TryLater("unavailable", _NO_ANSWER)
        if subscription.terms.revocable and self._may_have_missed_a_command(subscription):
            return TryLater("unavailable", soon=True)  # it is asked again, and the answer then counts
        return None

    def _may_have_missed_a_command(self, subscription: Subscription) -> bool:
        """Tell whether a command may have come after a stream's permission check, and before this process heard any."""
        asked_at = subscription.terms.asked_at
        if asked_at < self._missed_at:
            return True
        if asked_at >= self._heard_at:
            return False
        return self._earlier is None or any(concerns(subscription, command) for command in self._earlier)


def concerns(subscription: Subscription, command: Disconnect) -> bool:
    """Tell whether a disconnect command applies to this stream."""
    return (command.subject is None or command.subject in subscription.terms.subjects) and (
        command.channel is None
        or not subscription.channels.isdisjoint((command.channel, heard_unquoted(command.channel)))
    )
