"""The one connection of a process that listens, and the one background thread that waits for it.

Others only change what is wanted, under a lock, and wake the thread through a socketpair; no statement runs outside it.
It LISTENs in batches, hands over what arrives turn by turn, and reconnects when PostgreSQL goes away.
https://www.postgresql.org/docs/current/sql-listen.html
"""

from __future__ import annotations

import itertools
import logging
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg2
from psycopg2.extensions import quote_ident

from .. import event
from ..backoff import Backoff
from ..channels import pg_name
from ..errors import DatabaseUnavailable, InvalidEvent
from ..wakeup import Wakeup, is_patched
from .connect import connect, execute
from .dsn import Dsn

logger = logging.getLogger(__name__)

# Channels in one round-trip. Statements of one query are one transaction, and its length delays what has arrived.
_BATCH = 500
# One turn at the most, so that a flood still leaves in pieces and the others get their time between them.
_TURN_EVENTS = 1000
_TURN_BYTES = 65536
# Seconds a channel stays listened to after its last stream: a page that reloads costs no round-trip.
LINGER = 10.0
# Seconds of silence after which the server is asked for a sign of life, and within which it must give one. A peer that
# vanished without a word (a dropped NAT entry, a host that lost power) is noticed by nothing else.
_PING_EVERY = 10.0
_ANSWER_WITHIN = 5.0
_BACKOFF_FIRST = 0.1
_BACKOFF_MOST = 5.0

# A server's limits on idle sessions or long statements are meant for others; which exist depends on its version.
_SETUP = """
SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings
WHERE name IN ('idle_session_timeout', 'statement_timeout', 'lock_timeout', 'transaction_timeout')
"""


class _Pending:
    """A LISTEN that is asked for: shared by all streams that wait for it."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.confirmed = False


class ListenTicket:
    """Tells when PostgreSQL has confirmed LISTEN on all channels of one stream."""

    def __init__(self, pending: Sequence[_Pending]) -> None:
        self._pending = pending

    def wait(self, timeout: float) -> bool:
        """Wait `timeout` seconds at the most; tell whether LISTEN stands."""
        deadline = time.monotonic() + timeout
        for listen in self._pending:
            listen.answered.wait(max(0.0, deadline - time.monotonic()))
        return all(listen.confirmed for listen in self._pending)

    def cancel(self) -> None:
        """End the wait of all streams that wait for the same."""
        for listen in self._pending:
            listen.answered.set()


class Listener:
    """Listens to the channels that are wanted, from `start()` to `stop()`.

    `deliver(turn)` gets each turn as (channel, encoded event) in the order of arrival; `gap()` is called when the
    connection was lost and stands again: events between may have been missed. Both run in the listener's thread.
    """

    def __init__(
        self,
        dsn: Dsn,
        deliver: Callable[[Sequence[tuple[str, bytes]]], None],
        gap: Callable[[], None],
        *,
        linger: float = LINGER,
    ) -> None:
        self._dsn = dsn
        self._deliver = deliver
        self._gap = gap
        self._linger = linger
        self._lock = threading.Lock()  # guards the tables, whose names are all PostgreSQL's
        self._wanted: dict[str, int] = {}  # how many streams want it
        self._channel_of: dict[str, str] = {}
        self._listening: set[str] = set()  # confirmed on the connection that stands, and no UNLISTEN under way
        self._to_listen: set[str] = set()
        self._pending: dict[str, _Pending] = {}  # wanted, and not confirmed yet
        self._idle_since: dict[str, float] = {}  # listened to and wanted by none any more; oldest first
        self._malformed = _Malformed()
        self._heard_at = 0.0  # when the connection gave its last sign of life
        self._left: list[Any] = []  # arrived, and not handed over yet; the first one last
        self._lost_one = False  # a connection on which a LISTEN may have stood
        self._stopping = False
        self._wakeup = Wakeup()
        self._backoff = Backoff(_BACKOFF_FIRST, _BACKOFF_MOST)
        self._thread = threading.Thread(target=self._run, name="pg-sse-listener", daemon=True)

    # -- called by others

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread and its connection, within `timeout` seconds; streams that wait for LISTEN are let go."""
        self._stopping = True
        with self._lock:
            ListenTicket(list(self._pending.values())).cancel()
        self._wakeup.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        else:  # it may never have started
            self._wakeup.close()

    def listen(self, channels: Iterable[str]) -> ListenTicket:
        """Want each of `channels` once more. The ticket tells when LISTEN stands; often it does already."""
        names = {pg_name(channel): channel for channel in channels}
        with self._lock:
            for name in names:
                self._wanted[name] = self._wanted.get(name, 0) + 1
                self._idle_since.pop(name, None)
            self._channel_of.update(names)
            missing = names.keys() - self._listening
            self._to_listen.update(missing)
            pending = [self._pending.setdefault(name, _Pending()) for name in missing]
        if missing:
            self._wakeup.set()
        return ListenTicket(pending)

    def unlisten(self, channels: Iterable[str]) -> None:
        """Want each of `channels` once less. UNLISTEN follows later, if nobody wants it again until then."""
        now = time.monotonic()
        with self._lock:
            none_idle = not self._idle_since
            for channel in channels:
                name = pg_name(channel)
                self._wanted[name] -= 1
                if self._wanted[name]:
                    continue
                del self._wanted[name]
                if name in self._listening:
                    self._idle_since[name] = now
                else:  # while PostgreSQL is away nothing may pile up
                    self._to_listen.discard(name)
                    self._pending.pop(name, None)
                    del self._channel_of[name]
            wake = none_idle and bool(self._idle_since)
        if wake:  # the thread knows of no UNLISTEN to come yet
            self._wakeup.set()

    def listened(self) -> list[str]:
        """Return the channels on which LISTEN stands."""
        with self._lock:
            return [self._channel_of[name] for name in self._listening]

    # -- the thread

    def _run(self) -> None:
        try:
            self._connect_and_serve()
        finally:  # not in stop(), which may give up before this thread does
            self._wakeup.close()

    def _connect_and_serve(self) -> None:
        while not self._stopping:
            try:
                connection = connect(self._dsn, "flask_pg_sse listener")
            except (OSError, DatabaseUnavailable) as error:
                self._pause("Cannot listen", error)
                continue
            failure: Exception | None = None
            try:
                self._serve(connection)
            except (psycopg2.Error, OSError) as error:
                failure = error
            except Exception as error:  # a listener that died would leave every stream deaf
                logger.exception("The listener failed; it begins anew.")
                failure = error
            finally:
                self._forget_connection()
                connection.close()
            if failure is not None:
                self._pause("Lost the connection that listens", failure)

    def _forget_connection(self) -> None:
        """Take note that no LISTEN stands any more: whoever comes now has to wait for the next connection."""
        self._lost_one = True
        with self._lock:
            self._listening.clear()
            for name in self._idle_since:
                del self._channel_of[name]
            self._idle_since.clear()

    def _pause(self, what: str, error: Exception) -> None:
        delay = self._backoff.next()
        reason = " ".join(str(error).split()).rstrip(".?") or type(error).__name__
        logger.warning("%s: %s. Next attempt in %.1f s; open streams stay open.", what, reason, delay)
        self._wakeup.clear()
        deadline = time.monotonic() + delay
        # New streams wake the thread too, and must not shorten the pause.
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            self._wakeup.wait(left)

    def _serve(self, connection: Any) -> None:
        """Keep LISTENing on a connection that stands, until it breaks."""
        if self._stopping:
            return
        self._left = []
        self._execute(connection, _SETUP)
        with self._lock:
            self._to_listen = set(self._wanted)
        while self._change_listens(connection):
            pass
        self._backoff.reset()
        if self._lost_one:
            logger.warning("Listening again to %s; events since the connection broke may be lost.", self._dsn)
            # Told when every LISTEN stands, so that a page which now loads its state misses nothing more, and before
            # any event that came meanwhile, which would look like the next one.
            self._gap()
        else:
            logger.info("Listening to PostgreSQL at %s.", self._dsn)

        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        poller.register(self._wakeup.fileno(), select.POLLIN)
        while not self._stopping:
            # One batch between two hand-overs: subscribers that keep coming do not hold up events.
            busy = self._change_listens(connection)
            while self._hand_over(connection) and not self._stopping:
                pass
            ready = poller.poll(0 if busy else self._next_chore_in() * 1000)
            self._wakeup.clear()
            if any(descriptor == connection.fileno() for descriptor, _ in ready):
                self._heard_at = time.monotonic()
            elif time.monotonic() >= self._heard_at + _PING_EVERY:
                self._execute(connection, "SELECT 1")  # a sign of life

    def _next_chore_in(self) -> float:
        """Return the seconds until an UNLISTEN is due or the server is to be asked for a sign of life."""
        with self._lock:
            oldest = next(iter(self._idle_since.values()), None)
        due = self._heard_at + _PING_EVERY
        if oldest is not None:
            due = min(due, oldest + self._linger)
        return max(0.0, due - time.monotonic())

    def _change_listens(self, connection: Any) -> bool:
        """Bring the LISTENs of the connection to what is wanted, one batch; tell whether to call again.

        What arrives meanwhile waits for `_hand_over()`.
        """
        with self._lock:
            due = time.monotonic() - self._linger
            ended = [name for name, since in itertools.islice(self._idle_since.items(), _BATCH) if since <= due]
            for name in ended:
                # From here on a new stream waits for a LISTEN of its own, which comes after the UNLISTEN.
                del self._idle_since[name]
                del self._channel_of[name]
                self._listening.discard(name)
            begun = list(itertools.islice(self._to_listen, _BATCH))
        if self._stopping or not (ended or begun):
            return False
        if ended:
            self._execute(connection, ";".join(f"UNLISTEN {quote_ident(name, connection)}" for name in ended))
        heard = self._listen(connection, begun)
        with self._lock:
            self._to_listen.difference_update(begun)
            self._listening.update(heard)
            now = time.monotonic()
            for name in begun:
                if name not in self._wanted:  # its last stream left while the LISTEN was under way
                    if name in heard:
                        self._channel_of.setdefault(name, name)
                        self._idle_since[name] = now
                elif name in self._pending:
                    listen = self._pending.pop(name)
                    listen.confirmed = name in heard
                    listen.answered.set()
        return True

    def _listen(self, connection: Any, names: Sequence[str]) -> set[str]:
        """LISTEN to `names`; return those that stand: not those that the database's encoding cannot write."""
        if not names:
            return set()
        try:
            self._execute(connection, ";".join(f"LISTEN {quote_ident(name, connection)}" for name in names))
            return set(names)
        except psycopg2.errors.UntranslatableCharacter:
            if len(names) == 1:
                return set()
            half = len(names) // 2
            return self._listen(connection, names[:half]) | self._listen(connection, names[half:])

    def _execute(self, connection: Any, query: str) -> None:
        execute(connection, query, timeout=_ANSWER_WITHIN)
        self._heard_at = time.monotonic()

    def _hand_over(self, connection: Any) -> bool:
        """Deliver one turn of what has arrived; tell whether it was a full one, so that there may be more.

        One poll() reads one buffer. The first after the server has gone succeeds; the next, when the descriptor is
        readable again, raises.
        """
        turn: list[tuple[str, bytes]] = []
        size = 0
        try:
            while len(turn) < _TURN_EVENTS and size < _TURN_BYTES:
                if not self._left:
                    connection.poll()
                    self._left, connection.notifies = connection.notifies[::-1], []
                    if not self._left:
                        return False
                notification = self._left.pop()
                channel = self._channel_of.get(notification.channel)
                block = channel and self._malformed.encode(notification.payload)
                if channel and block:
                    turn.append((channel, block))
                    size += len(block)
        finally:  # what came before the connection broke has come
            if turn:
                self._deliver(turn)
        # A flood comes faster than one stream's buffer takes it: let the streams send what they have. Threads need
        # more than a chance for that, greenlets do not.
        time.sleep(0 if is_patched() else 0.001)
        return True


class _Malformed:
    """Encodes payloads, and counts those that are no legal event; said in the log once a minute at the most."""

    def __init__(self) -> None:
        self.count = 0
        self._said_at = float("-inf")

    def encode(self, payload: str) -> bytes | None:
        try:
            return event.encode(event.from_payload(payload))
        except Exception as error:  # whatever anybody may have sent, it ends neither the listener nor a stream
            self.count += 1
            now = time.monotonic()
            if now - self._said_at >= 60:
                self._said_at = now
                reason = error if isinstance(error, InvalidEvent) else type(error).__name__
                logger.warning("Dropped a NOTIFY payload, number %d so far: %s", self.count, reason)
            return None
