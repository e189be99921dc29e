"""Track the channels that a process's streams want, and those that the bus has confirmed: tables under a lock, no I/O.

LISTEN and UNLISTEN stand for the commands of any bus: with Redis they are SUBSCRIBE and UNSUBSCRIBE.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence


class _Pending:
    """A LISTEN that is not confirmed yet. All streams that wait for it share this object."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.confirmed = False


class ListenTicket:
    """Tells when the bus has confirmed LISTEN on all channels of one stream."""

    def __init__(self, pending: Sequence[_Pending]) -> None:
        self._pending = pending

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; return True if LISTEN is confirmed on all channels."""
        deadline = time.monotonic() + timeout
        for listen in self._pending:
            listen.answered.wait(max(0.0, deadline - time.monotonic()))
        confirmed = all(listen.confirmed for listen in self._pending)
        if confirmed:  # saves memory: a stream keeps its ticket for hours
            self._pending = ()
        return confirmed

    def cancel(self) -> None:
        """End the wait of every stream that waits for the same channels."""
        for listen in self._pending:
            listen.answered.set()


_HEARD = ListenTicket(())


class ListenTable:
    """The channels of one listener. UNLISTEN follows `linger` seconds after a channel's last stream has left.

    `name_of` returns the bus's name for a channel.
    """

    def __init__(self, linger: float, name_of: Callable[[str], str]) -> None:
        self._linger = linger
        self._name_of = name_of
        self._lock = threading.Lock()  # guards the tables; their keys are the bus's names for channels
        self._streams: dict[str, int] = {}  # how many streams want each
        self._channel_of: dict[str, str] = {}
        self._listening: set[str] = set()  # confirmed on the current connection, and no UNLISTEN is under way
        self._to_listen: set[str] = set()
        self._pending: dict[str, _Pending] = {}  # wanted, but not confirmed yet
        self._idle_since: dict[str, float] = {}  # confirmed, but no stream wants it; oldest first

    def add(self, channels: Iterable[str]) -> tuple[ListenTicket, bool]:
        """Count one more stream on each of `channels`. Return its ticket, and whether a LISTEN is needed."""
        names = {self._name_of(channel): channel for channel in channels}
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
        """Count one stream fewer on each of `channels`.

        Returns True if an UNLISTEN is now scheduled and none was before.
        """
        now = time.monotonic()
        with self._lock:
            none_idle = not self._idle_since
            for channel in channels:
                name = self._name_of(channel)
                self._streams[name] -= 1
                if self._streams[name]:
                    continue
                del self._streams[name]
                if name in self._listening:
                    self._idle_since[name] = now
                else:  # otherwise the tables grow while the bus is away
                    self._to_listen.discard(name)
                    self._pending.pop(name, None)
                    del self._channel_of[name]
            return none_idle and bool(self._idle_since)

    def cancel(self) -> None:
        """End the wait of every stream that waits for a LISTEN."""
        with self._lock:
            ListenTicket(list(self._pending.values())).cancel()

    def restart(self) -> None:
        """Request LISTEN for all wanted channels again, on another connection."""
        with self._lock:
            self._to_listen = set(self._streams)

    def lost(self) -> None:
        """Note that no LISTEN is active any more. From now on new streams wait for the next connection."""
        with self._lock:
            self._listening.clear()
            for name in self._idle_since:
                del self._channel_of[name]
            self._idle_since.clear()

    def due(self, most: int) -> tuple[list[str], list[str]]:
        """Return the names to UNLISTEN and the names to LISTEN now, at most `most` of each."""
        if not self._idle_since and not self._to_listen:  # a fast path, because this is called after every turn
            return [], []
        with self._lock:
            due = time.monotonic() - self._linger
            ended = [name for name, since in itertools.islice(self._idle_since.items(), most) if since <= due]
            for name in ended:
                # From here on a new stream waits for a new LISTEN, which comes after this UNLISTEN.
                del self._idle_since[name]
                del self._channel_of[name]
                self._listening.discard(name)
            begun = list(itertools.islice(self._to_listen, most))
            self._to_listen.difference_update(begun)
            return ended, begun

    def next_due_in(self) -> float:
        """Return the seconds until the next UNLISTEN is due; infinity if there is none."""
        if not self._idle_since:
            return float("inf")
        with self._lock:
            oldest = next(iter(self._idle_since.values()), None)
        return float("inf") if oldest is None else max(0.0, oldest + self._linger - time.monotonic())

    def confirm(self, begun: Iterable[str], heard: set[str]) -> None:
        """Note that LISTEN was sent for the names `begun`, and is confirmed for the names `heard`."""
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
        """Return the channel that the bus calls `name`; None if the name is not in the tables."""
        return self._channel_of.get(name)

    def channels(self) -> list[str]:
        """Return the names, as streams know them, of all channels that are wanted or were until a moment ago."""
        with self._lock:
            return list(self._channel_of.values())

    def count(self) -> int:
        """Return the number of channels with a confirmed LISTEN."""
        return len(self._listening)

    def listened(self) -> list[str]:
        """Return the channels with a confirmed LISTEN."""
        with self._lock:
            return [self._channel_of[name] for name in self._listening]
