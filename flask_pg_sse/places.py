"""How many streams there may be in one process, and how many of one client."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection

from .subscription import Subscription

# The places of all apps in this process that are taken, counted by its length: append() and pop() are atomic, as += is
# not.
_taken_here: list[None] = []
os.register_at_fork(after_in_child=_taken_here.clear)


class Places:
    """The streams of an app that are open, bounded: `most` in all, `most_each` a client (None: any number).

    `most_here` bounds those of all apps in this process together, which have the worker's connections in common. None:
    they are not counted with the others.

    `give_back()` takes no lock, because the garbage collector may end a stream in the midst of any statement here.
    """

    def __init__(self, most: int, most_each: int | None, *, most_here: int | None = None) -> None:
        self._most = most
        self._most_each = most_each
        self._most_here = most_here
        self._taking = threading.Lock()
        self._taken: list[None] = []  # as `_taken_here`
        self._of: dict[str, set[Subscription]] = {}

    def take(self, subscription: Subscription) -> bool:
        """Give a stream its place; False if there is none."""
        with self._taking:
            if self._full(subscription.terms.clients):
                return False
            if self._most_here is not None:
                _taken_here.append(None)  # before the look: other apps have locks of their own
                if len(_taken_here) > self._most_here:
                    _taken_here.pop()
                    return False
            self._taken.append(None)
            subscription.place = None
            if self._most_each is not None:
                for client in subscription.terms.clients:
                    self._of.setdefault(client, set()).add(subscription)
            return True

    def give_back(self, subscription: Subscription) -> None:
        """Free the place of a stream, if it has one."""
        try:
            del subscription.place  # atomic too: who comes second finds none
        except AttributeError:
            return
        self._taken.pop()
        if self._most_here is not None:
            _taken_here.pop()
        for client in subscription.terms.clients:
            self._of.get(client, _NONE).discard(subscription)

    def _full(self, clients: Collection[str]) -> bool:
        """Tell whether one more stream of a client would be too many.

        That a client has vanished may be noticed late. Its other streams are looked at here, so that a page which is
        loaded anew does not stand in its own way.
        """
        if len(self._taken) >= self._most:
            return True
        if self._most_each is None:
            return False
        return any(self._has_most(client) for client in clients)

    def _has_most(self, client: str) -> bool:
        streams = self._of.get(client, _NONE)
        if len(streams) < (self._most_each or 0):
            return False
        for subscription in list(streams):
            if subscription.connection is not None and subscription.connection.gone():
                subscription.end(b"", drop=True)
                self.give_back(subscription)
        return len(streams) >= (self._most_each or 0)

    def sweep(self) -> None:
        """Forget the clients that have no stream any more."""
        with self._taking:
            for client in [client for client, streams in self._of.items() if not streams]:
                del self._of[client]


_NONE: set[Subscription] = set()
