"""Find the clients that have closed their connections, with one system call for all of them.

Linux' epoll reports this for thousands of sockets, at no cost while nothing happens (EPOLLRDHUP:
https://man7.org/linux/man-pages/man2/epoll_ctl.2.html). On other systems it is noticed when a heartbeat cannot be sent.
"""

from __future__ import annotations

import contextlib
import importlib
import select
from typing import Any, Generic, Protocol, TypeVar

from ..concurrency.forks import close_in_children
from ..concurrency.locks import Lock


class Watched(Protocol):
    """A stream: its connection, and the number under which its socket is watched (-1: it is not watched)."""

    watched_as: int

    @property
    def connection(self) -> Any: ...


_Stream = TypeVar("_Stream", bound=Watched)


class Hangups(Generic[_Stream]):
    """Watches the sockets of streams between `start()` and `stop()`."""

    def __init__(self) -> None:
        self._epoll: Any = None
        self._table = Lock()
        # By the socket's number, which another connection gets later. A list suffices, because the system always gives
        # out the lowest free number.
        self._streams: list[_Stream | None] = []

    def start(self) -> None:
        epoll = _epoll()
        if epoll is not None:
            self._epoll = epoll()
            close_in_children(self)  # an epoll object is shared: what a child finds, its parent does not

    def stop(self) -> None:
        if self._epoll is not None:
            self._epoll.close()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a client leaves; -1 if the system has none."""
        return -1 if self._epoll is None else int(self._epoll.fileno())

    def watch(self, subscription: _Stream) -> None:
        """Begin to watch a stream. Its connection must be set."""
        if self._epoll is None or subscription.connection is None:
            return
        number = subscription.connection.fileno()
        if number < 0:
            return
        with self._table:
            self._streams += [None] * (number + 1 - len(self._streams))
            self._streams[number] = subscription
        subscription.watched_as = number
        # Edge-triggered, and so reported once: the event would otherwise persist until the stream has ended.
        events = select.EPOLLRDHUP | select.EPOLLET
        with contextlib.suppress(OSError, ValueError):  # the socket is closed already, or the epoll object is
            try:
                self._epoll.register(number, events)
            except FileExistsError:
                self._epoll.modify(number, events)

    def forget(self, subscription: _Stream) -> None:
        """Stop watching a stream. Its connection may have been closed long ago."""
        number = subscription.watched_as
        with self._table:
            if number >= 0 and self._streams[number] is subscription:
                self._streams[number] = None

    def take(self) -> list[_Stream]:
        """Return the streams whose clients have left since the last call."""
        try:
            numbers = [number for number, _ in self._epoll.poll(0)] if self._epoll is not None else []
        except (OSError, ValueError):
            return []
        found = [self._streams[number] for number in numbers]
        # gone() checks again: with threads, the number may be another connection's by now.
        return [stream for stream in found if stream is not None and stream.connection and stream.connection.gone()]


def _epoll() -> Any:
    if not hasattr(select, "EPOLLRDHUP"):
        return None
    if hasattr(select, "epoll"):
        return select.epoll
    # gevent removes it, because waiting in it would stop all greenlets. Here it never waits.
    return importlib.import_module("gevent.monkey").get_original("select", "epoll")
