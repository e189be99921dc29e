"""How many streams there may be in one process, and how many of one client."""

from __future__ import annotations

import contextlib
import os
import threading

from .subscription import Subscription, Terms

# The places of all apps in this process that are taken, counted by its length: append() and pop() are atomic, as += is
# not.
_taken_here: list[None] = []
os.register_at_fork(after_in_child=_taken_here.clear)


class StreamLimiter:
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
            if len(self._taken) >= self._most or self._have_most(subscription):
                return False
            if self._most_here is not None:
                _taken_here.append(None)  # before the look: other apps have locks of their own
                if len(_taken_here) > self._most_here:
                    _taken_here.pop()
                    return False
            self._taken.append(None)
            subscription.place = None
            self._count(subscription)
            return True

    def take_as(self, subscription: Subscription, terms: Terms) -> bool:
        """Let a stream that has its place be that of the clients in `terms`; False if these have too many."""
        with self._taking:
            subscription.agree(terms)
            if self._have_most(subscription):
                return False
            self._count(subscription)
            return True

    def _count(self, subscription: Subscription) -> None:
        if self._most_each is not None:
            for client in subscription.terms.clients:
                self._of.setdefault(client, set()).add(subscription)

    def give_back(self, subscription: Subscription) -> None:
        """Free the place of a stream, if it has one."""
        try:
            del subscription.place  # atomic too: who comes second finds none
        except AttributeError:
            return
        with contextlib.suppress(IndexError):  # in a process that was forked with streams, they do not count
            self._taken.pop()
            if self._most_here is not None:
                _taken_here.pop()
        for client in subscription.terms.clients:
            self._of.get(client, _NONE).discard(subscription)

    def _have_most(self, subscription: Subscription) -> bool:
        """Tell whether a client whose stream this is has as many as it may.

        That a client has vanished may be noticed late. Its other streams are looked at here, so that a page which is
        loaded anew does not stand in its own way.
        """
        if self._most_each is None:
            return False
        return any(self._has_most(client) for client in subscription.terms.clients)

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
