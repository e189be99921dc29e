"""Track the channels that a process's streams want, and those that the bus has confirmed: tables under a lock, no I/O.

LISTEN and UNLISTEN stand for the commands of any bus: with Redis they are SUBSCRIBE and UNSUBSCRIBE.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable

from ..concurrency.locks import Lock
from .base import TooManyChannels
from .turns import TurnQueue, Waiting

# The most channels of one process. PostgreSQL compares each notification with each channel of a session: about 3 µs for
# a thousand. More streams than that many channels can feed need more processes.
MOST_CHANNELS = 65536


class _Listen:
    """One channel that is listened to, or wanted."""

    __slots__ = ("channel", "confirmed", "opened", "sent", "streams", "waiting")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.streams = 0  # how many want it
        self.sent = False  # LISTEN is under way
        self.confirmed = False  # on the current connection, and no UNLISTEN is under way
        self.opened = False  # since then a stream had all its channels
        self.waiting: list[ListenTicket] = []


class ListenTicket(Waiting):
    """Tells one stream when the bus has confirmed LISTEN on all its channels."""

    __slots__ = ("_table", "missing", "names")

    def __init__(self, table: ListenTable, names: Iterable[str], missing: Iterable[str], client: Hashable) -> None:
        super().__init__(client)
        self._table = table
        self.names = tuple(names)
        self.missing = dict.fromkeys(missing)

    def cancel(self) -> None:
        """End the wait. What has not been sent for this stream alone will not be sent."""
        self._table.withdraw(self)
        super().cancel()

    def refuse(self) -> None:
        """End the wait, because the bus cannot listen to one of the channels. The table's lock is held."""
        super().cancel()


class _Heard:
    """The ticket of a stream that need not wait."""

    def wait(self, timeout: float) -> bool:
        return True

    def cancel(self) -> None:
        pass


_HEARD = _Heard()


class ListenTable:
    """The channels of one listener, at most `most`.

    UNLISTEN follows `linger` seconds after a channel's last stream has left, and at once if no stream on it has ever
    been open. Streams that wait for LISTEN are served in turn by their clients, all channels of a stream together.
    `name_of` returns the bus's name for a channel.
    """

    def __init__(self, linger: float, name_of: Callable[[str], str], *, most: int = MOST_CHANNELS) -> None:
        self._linger = linger
        self._name_of = name_of
        self._most = most
        self._lock = Lock()  # guards the tables; their keys are the bus's names for channels
        self._listens: dict[str, _Listen] = {}
        self._queue = TurnQueue[ListenTicket]()
        self._again: list[str] = []  # wanted since an earlier connection
        self._ending: dict[str, None] = {}  # UNLISTEN is due now
        self._idle_since: dict[str, float] = {}  # confirmed, but no stream wants it; oldest first

    def add(self, channels: Iterable[str], client: Hashable = ()) -> tuple[ListenTicket | _Heard, bool]:
        """Count one more stream on each of `channels`. Return its ticket, and whether a LISTEN is needed.

        Raises `TooManyChannels`, and counts nothing then.
        """
        names = {self._name_of(channel): channel for channel in channels}
        with self._lock:
            new = [name for name in names if name not in self._listens]  # not `-`, which looks at every channel
            if new and len(self._listens) - len(self._idle_since) - len(self._ending) + len(new) > self._most:
                raise TooManyChannels
            for name in new:
                self._listens[name] = _Listen(names[name])
            missing = []
            for name in names:
                listen = self._listens[name]
                listen.streams += 1
                self._idle_since.pop(name, None)
                self._ending.pop(name, None)
                if not listen.confirmed:
                    missing.append(name)
            if not missing:
                self._open(names)
                return _HEARD, False
            ticket = ListenTicket(self, names, missing, client)
            for name in missing:
                self._listens[name].waiting.append(ticket)
            self._queue.add(client, ticket)
            return ticket, True

    def _open(self, names: Iterable[str]) -> None:
        for name in names:
            self._listens[name].opened = True

    def withdraw(self, ticket: ListenTicket) -> None:
        """Take a stream out of those that wait."""
        with self._lock:
            self._queue.discard(ticket.client, ticket)

    def remove(self, channels: Iterable[str]) -> bool:
        """Count one stream fewer on each of `channels`.

        Returns True if an UNLISTEN is now scheduled that comes before those that were.
        """
        now = time.monotonic()
        with self._lock:
            sooner = False
            for name in dict.fromkeys(map(self._name_of, channels)):
                listen = self._listens[name]
                listen.streams -= 1
                if listen.streams or listen.sent:  # what is under way is decided when it is confirmed
                    continue
                if listen.confirmed:
                    sooner = self._end(name, now) or sooner
                else:  # otherwise the tables grow while the bus is away
                    del self._listens[name]
                    for ticket in listen.waiting:  # of streams that have left
                        self._queue.discard(ticket.client, ticket)
            return sooner

    def _end(self, name: str, now: float) -> bool:
        """Schedule UNLISTEN for a channel without streams. Returns whether it comes before those that were."""
        if self._listens[name].opened:
            self._idle_since[name] = now
            return len(self._idle_since) == 1
        self._ending[name] = None
        return True

    def cancel(self) -> None:
        """End the wait of every stream that waits for a LISTEN."""
        with self._lock:
            waiting = {ticket for listen in self._listens.values() for ticket in listen.waiting}
        for ticket in waiting:
            ticket.cancel()

    def restart(self) -> int:
        """Request LISTEN for all wanted channels again, on another connection, before any new ones. Return how many."""
        with self._lock:
            self._again = list(self._listens)
            return len(self._again)

    def lost(self) -> None:
        """Note that no LISTEN is active any more. From now on new streams wait for the next connection."""
        with self._lock:
            self._idle_since.clear()
            self._ending.clear()
            for name, listen in list(self._listens.items()):
                listen.sent = listen.confirmed = listen.opened = False
                if not listen.streams:
                    del self._listens[name]

    def due(self, most: int) -> tuple[list[str], list[str]]:
        """Return the names to UNLISTEN and the names to LISTEN now: about `most` of each."""
        # A fast path, because this is called after every turn.
        if not (self._idle_since or self._ending or self._queue or self._again):
            return [], []
        with self._lock:
            ended = list(itertools.islice(self._ending, most))
            due = time.monotonic() - self._linger
            if len(self._listens) > self._most:
                due = float("inf")
            idle = itertools.islice(self._idle_since.items(), most - len(ended))
            ended += [name for name, since in idle if since <= due]
            for name in ended:
                # From here on a new stream waits for a new LISTEN, which comes after this UNLISTEN.
                self._idle_since.pop(name, None)
                self._ending.pop(name, None)
                del self._listens[name]
            begun: list[str] = []
            if self._again:
                begun, self._again = self._begin(self._again[:most]), self._again[most:]
            while len(begun) < most and (ticket := self._queue.pop()) is not None:
                begun += self._begin(ticket.missing)
            return ended, begun

    def _begin(self, names: Iterable[str]) -> list[str]:
        begun = []
        for name in names:
            listen = self._listens.get(name)
            if listen is not None and not (listen.sent or listen.confirmed):
                listen.sent = True
                begun.append(name)
        return begun

    def next_due_in(self) -> float:
        """Return the seconds until the next UNLISTEN is due; infinity if there is none."""
        if self._ending:
            return 0.0
        if not self._idle_since:
            return float("inf")
        with self._lock:
            oldest = next(iter(self._idle_since.values()), None)
        return float("inf") if oldest is None else max(0.0, oldest + self._linger - time.monotonic())

    def confirm(self, begun: Iterable[str], heard: set[str]) -> None:
        """Note that LISTEN was sent for the names `begun`, and is confirmed for the names `heard`."""
        with self._lock:
            now = time.monotonic()
            for name in begun:
                listen = self._listens[name]
                listen.sent, listen.confirmed = False, name in heard
                waiting, listen.waiting = listen.waiting, []
                for ticket in waiting:
                    self._answer(ticket, name, listen.confirmed)
                if listen.streams:
                    continue
                if listen.confirmed:  # its last stream left while the LISTEN was under way
                    self._end(name, now)
                else:
                    del self._listens[name]

    def _answer(self, ticket: ListenTicket, name: str, confirmed: bool) -> None:
        if ticket.cancelled:
            return
        ticket.missing.pop(name, None)
        if not confirmed:
            self._queue.discard(ticket.client, ticket)
            ticket.refuse()
        elif not ticket.missing:
            self._open(ticket.names)
            ticket.names = ()  # a stream keeps its ticket for hours
            ticket.give()

    def channel_of(self, name: str) -> str | None:
        """Return the channel that the bus calls `name`; None if the name is not in the tables."""
        listen = self._listens.get(name)
        return None if listen is None else listen.channel

    def channels(self) -> list[str]:
        """Return the names, as streams know them, of all channels that are wanted or were until a moment ago."""
        with self._lock:
            return [listen.channel for listen in self._listens.values()]

    def count(self) -> int:
        """Return the number of channels with a confirmed LISTEN."""
        return len(self.listened())

    def listened(self) -> list[str]:
        """Return the channels with a confirmed LISTEN."""
        with self._lock:
            return [listen.channel for listen in self._listens.values() if listen.confirmed]
