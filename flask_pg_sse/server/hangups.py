"""Which clients have closed their connections, of many that are looked at with one system call.

Linux' epoll says it of thousands of sockets at no cost while nothing happens (EPOLLRDHUP:
https://man7.org/linux/man-pages/man2/epoll_ctl.2.html). Elsewhere a client that has left is noticed when a heartbeat
cannot be sent.
"""

from __future__ import annotations

import contextlib
import importlib
import select
import threading
from typing import Any, Generic, Protocol, TypeVar


class Watched(Protocol):
    """A stream: its connection, and the number that its socket is watched under (-1: it is not watched)."""

    watched_as: int

    @property
    def connection(self) -> Any: ...


_Stream = TypeVar("_Stream", bound=Watched)



class Hangups(Generic[_Stream]):
    """The streams that are watched, by the number of their sockets, between `start()` and `stop()`."""

    def __init__(self) -> None:
        self._epoll: Any = None
        self._table = threading.Lock()
        # By number, which is another connection's later. A list: descriptors are the lowest numbers that are free.
        self._streams: list[_Stream | None] = []

    def start(self) -> None:
        epoll = _epoll()
        if epoll is not None:
            self._epoll = epoll()

    def stop(self) -> None:
        if self._epoll is not None:
            self._epoll.close()

    def fileno(self) -> int:
        """Return what is readable when somebody has left; -1 where that is not known."""
        return -1 if self._epoll is None else int(self._epoll.fileno())

    def watch(self, subscription: _Stream) -> None:
        """Begin with a stream, whose connection is known by now."""
        if self._epoll is None or subscription.connection is None:
            return
        number = subscription.connection.fileno()
        if number < 0:
            return
        with self._table:
            self._streams += [None] * (number + 1 - len(self._streams))
            self._streams[number] = subscription
        subscription.watched_as = number
        # Said once: the socket stays readable while the stream takes its time to end.
        events = select.EPOLLRDHUP | select.EPOLLET
        with contextlib.suppress(OSError, ValueError):  # it has left already, or the ticker has
            try:
                self._epoll.register(number, events)
            except FileExistsError:
                self._epoll.modify(number, events)

    def forget(self, subscription: _Stream) -> None:
        """End with a stream, whose connection may have been closed long since."""
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
        # Asked again: with threads the number may be another's by now.
        return [stream for stream in found if stream is not None and stream.connection and stream.connection.gone()]


def _epoll() -> Any:
    if not hasattr(select, "EPOLLRDHUP"):
        return None
    if hasattr(select, "epoll"):
        return select.epoll
    # gevent takes it away, because its wait stops all greenlets; here it never waits.
    return importlib.import_module("gevent.monkey").get_original("select", "epoll")
