"""Commands to end streams that are sent later: after a response, or when the database is back."""

from __future__ import annotations

import atexit
import logging
import math
import time
import weakref
from collections.abc import Callable

from ..concurrency.background import BackgroundThread
from ..concurrency.locks import Lock
from ..errors import PgSSEError
from ..repeats import Repeats, times
from .backoff import Backoff
from .base import Disconnect

logger = logging.getLogger(__name__)

# The most commands that are kept. A command that is given again while it waits is the same one.
MOST = 10_000
# Seconds between two attempts.
_FIRST = 0.1
_LONGEST = 5.0
# Seconds after which a command that has not been sent is obeyed here. Sent, it comes back within milliseconds. Obeyed
# twice, it could end streams that have come back since, with their right checked again.
_PATIENCE = 0.5
# Seconds that the end of the process waits for commands that are on their way.
_AT_EXIT = 1.0

_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()


class Outbox:
    """The commands of one worker that have not been sent yet.

    `send` sends one to every process, this one too. If that fails or takes long, `obey` ends the streams of this
    process that it names. A thread runs while there is anything to send.
    """

    def __init__(self, send: Callable[[Disconnect], None], obey: Callable[[Disconnect], None]) -> None:
        self._send = send
        self._obey = obey
        self._lock = Lock()
        self._due: dict[Disconnect, float] = {}  # the monotonic time at which each must be sent
        self._on_its_way: tuple[Disconnect, float] | None = None  # with the monotonic time since when
        self._sender: _Sender | None = None
        self._backoff = Backoff(_FIRST, _LONGEST)
        self._not_before = 0.0  # monotonic time of the next attempt, after one has failed
        self._repeats = Repeats()

    def add(self, command: Disconnect, delay: float = 0.0) -> None:
        """Have a command sent after `delay` seconds, or sooner if it was given with an earlier time before."""
        at = time.monotonic() + delay
        with self._lock:
            if command not in self._due and len(self._due) >= MOST:
                del self._due[next(iter(self._due))]
                text = "A disconnect() was dropped: %d others wait for the database."
                self._repeats.log(logger.error, text, time.monotonic(), text, MOST)
            self._due[command] = min(at, self._due.get(command, at))
            if self._sender is None:
                _outboxes.add(self)
                self._sender = _Sender(self)
                self._sender.start()
            self._sender.look_again()

    def ended(self, sender: _Sender) -> None:
        """Note that a thread has ended."""
        with self._lock:
            if self._sender is sender:
                self._sender = None

    def stop(self, timeout: float) -> None:
        """Try to send what is left, within `timeout` seconds."""
        sender = self._sender
        if sender is not None:
            sender.stop(timeout)

    def __len__(self) -> int:
        return len(self._due)

    def send_next(self, *, stopping: bool) -> float | None:
        """Send one command if one is due. Return the seconds until the next is due, or None if none is left."""
        with self._lock:
            if not self._due:
                self._sender = None
                return None
            now = math.inf if stopping else time.monotonic()
            if now < self._not_before:
                return self._not_before - now
            command = next((one for one, at in self._due.items() if at <= now), None)
            if command is None:
                return min(self._due.values()) - now
            del self._due[command]
        self._on_its_way = command, time.monotonic()
        try:
            self._send(command)
            self._on_its_way = None
        except Exception as error:  # the thread survives, or no further command would be sent
            self._failed(command, error, stopping=stopping)
        else:
            self._backoff.reset()
            self._not_before = 0.0
            if ended := self._repeats.over(time.monotonic()):
                logger.warning("disconnect() reaches the other workers again, after %s.", ended)
        return 0.0

    def obey_overdue(self) -> None:
        """Obey a command here that is on its way for too long. Call this about once a second."""
        if self._on_its_way is not None and time.monotonic() - self._on_its_way[1] >= _PATIENCE:
            self._obey_here()

    def _obey_here(self) -> None:
        command, self._on_its_way = self._on_its_way, None
        if command is not None:
            self._obey(command[0])

    def _failed(self, command: Disconnect, error: Exception, *, stopping: bool) -> None:
        self._obey_here()
        with self._lock:
            self._due.setdefault(command, time.monotonic())
            kept = len(self._due)
            if stopping:
                self._due.clear()
        if stopping:
            logger.error("%d calls of disconnect() reach no other worker, because this process ends: %s", kept, error)
            return
        delay = self._backoff.next()
        self._not_before = time.monotonic() + delay
        if number := self._repeats.count(type(error).__name__, time.monotonic()):
            logger.warning(
                "disconnect() has ended the streams of this worker, and could not reach the others: %s It is kept, and "
                "sent when the database answers (%d wait)%s.",
                error,
                kept,
                times(number),
                exc_info=None if isinstance(error, PgSSEError) else error,
            )


class _Sender(BackgroundThread):
    def __init__(self, outbox: Outbox) -> None:
        super().__init__("pg-sse-outbox")
        self._outbox = outbox

    def look_again(self) -> None:
        self._wakeup.set()

    def _work(self) -> None:
        try:
            while (left := self._outbox.send_next(stopping=self._stopping)) is not None:
                if left > 0:
                    self._wakeup.wait(left)
        finally:  # also if this greenlet was killed: the next command needs another one
            self._outbox.ended(self)


@atexit.register
def _send_at_exit() -> None:
    """A command that was given a moment ago must not be lost, as when a worker ends after its last request."""
    for outbox in list(_outboxes):
        outbox.stop(_AT_EXIT)
