"""Which channels the streams of a process want, and on which LISTEN stands: tables under a lock, no I/O."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Sequence

from .codec import pg_name


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
        confirmed = all(listen.confirmed for listen in self._pending)
        if confirmed:  # a stream keeps its ticket for hours
            self._pending = ()
        return confirmed

    def cancel(self) -> None:
        """End the wait of all streams that wait for the same."""
        for listen in self._pending:
            listen.answered.set()


_HEARD = ListenTicket(())


class ListenTable:
    """The channels of one listener. `linger` is how many seconds one stays listened to after its last stream."""

    def __init__(self, linger: float) -> None:
        self._linger = linger
        self._lock = threading.Lock()  # guards the tables, whose names are all PostgreSQL's
        self._streams: dict[str, int] = {}  # how many streams want it
        self._channel_of: dict[str, str] = {}
        self._listening: set[str] = set()  # confirmed on the connection that stands, and no UNLISTEN under way
        self._to_listen: set[str] = set()
        self._pending: dict[str, _Pending] = {}  # wanted, and not confirmed yet
        self._idle_since: dict[str, float] = {}  # listened to and wanted by none any more; oldest first

    def add(self, channels: Iterable[str]) -> tuple[ListenTicket, bool]:
        """Want each of `channels` once more; return the ticket, and whether there is something to LISTEN to."""
        names = {pg_name(channel): channel for channel in channels}
        with self._lock:
            for name in names:
                self._streams[name] = self._streams.get(name, 0) + 1
                self._idle_since.pop(name, None)
            self._channel_of.update(names)
            missing = names.keys() - self._listening
            if not missing:
                return _HEARD, False
            self._to_listen.update(missing)
            return ListenTicket([self._pending.setdefault(name, _Pending()) for name in missing]), True

    def remove(self, channels: Iterable[str]) -> bool:
        """Want each of `channels` once less; tell whether an UNLISTEN is to come where none was before."""
        now = time.monotonic()
        with self._lock:
            none_idle = not self._idle_since
            for channel in channels:
                name = pg_name(channel)
                self._streams[name] -= 1
                if self._streams[name]:
                    continue
                del self._streams[name]
                if name in self._listening:
                    self._idle_since[name] = now
                else:  # while PostgreSQL is away nothing may pile up
                    self._to_listen.discard(name)
                    self._pending.pop(name, None)
                    del self._channel_of[name]
            return none_idle and bool(self._idle_since)

    def cancel(self) -> None:
        """Let all streams go that wait for LISTEN."""
        with self._lock:
            ListenTicket(list(self._pending.values())).cancel()

    def restart(self) -> None:
        """Begin anew on another connection."""
        with self._lock:
            self._to_listen = set(self._streams)

    def lost(self) -> None:
        """Take note that no LISTEN stands any more: whoever comes now has to wait for the next connection."""
        with self._lock:
            self._listening.clear()
            for name in self._idle_since:
                del self._channel_of[name]
            self._idle_since.clear()

    def due(self, most: int) -> tuple[list[str], list[str]]:
        """Return the names to UNLISTEN and to LISTEN now, `most` of each."""
        if not self._idle_since and not self._to_listen:  # asked after every turn
            return [], []
        with self._lock:
            due = time.monotonic() - self._linger
            ended = [name for name, since in itertools.islice(self._idle_since.items(), most) if since <= due]
            for name in ended:
                # From here on a new stream waits for a LISTEN of its own, which comes after the UNLISTEN.
                del self._idle_since[name]
                del self._channel_of[name]
                self._listening.discard(name)
            begun = list(itertools.islice(self._to_listen, most))
            self._to_listen.difference_update(begun)
            return ended, begun

    def next_due_in(self) -> float:
        """Return the seconds until the next UNLISTEN."""
        if not self._idle_since:
            return float("inf")
        with self._lock:
            oldest = next(iter(self._idle_since.values()), None)
        return float("inf") if oldest is None else max(0.0, oldest + self._linger - time.monotonic())

    def confirm(self, begun: Iterable[str], heard: set[str]) -> None:
        """Take note that LISTEN was tried on the names `begun`, and stands on those `heard`."""
        with self._lock:
            self._listening.update(heard)
            self._to_listen.difference_update(heard)
            now = time.monotonic()
            for name in begun:
                if name not in self._streams:  # its last stream left while the LISTEN was under way
                    if name in heard:
                        self._channel_of.setdefault(name, name)
                        self._idle_since[name] = now
                elif name in self._pending:
                    listen = self._pending.pop(name)
                    listen.confirmed = name in heard
                    listen.answered.set()

    def channel_of(self, name: str) -> str | None:
        """Return the channel that PostgreSQL calls `name`, if anybody wants it."""
        return self._channel_of.get(name)

    def channels(self) -> list[str]:
        """Return the channels that are wanted or were until a moment ago, as streams call them."""
        with self._lock:
            return list(self._channel_of.values())

    def count(self) -> int:
        """Return on how many channels LISTEN stands."""
        return len(self._listening)

    def listened(self) -> list[str]:
        """Return the channels on which LISTEN stands."""
        with self._lock:
            return [self._channel_of[name] for name in self._listening]
