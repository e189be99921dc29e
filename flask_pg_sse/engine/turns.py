"""Turns: what is scarce goes round among the clients that wait for it. No I/O.

A client is one subject or, if it has none, one address (`web/authorize.counted_under()`). There is no quota: a client
that waits alone gets everything.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from ..concurrency.parking import new_parking_spot

_T = TypeVar("_T", bound=Hashable)


class TurnQueue(Generic[_T]):
    """What waits, each for one client. The clients take turns, and what waits for the same client keeps its order."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, OrderedDict[_T, None]] = OrderedDict()  # the next client is the first

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, client: Hashable, one: _T) -> None:
        self._waiting.setdefault(client, OrderedDict())[one] = None

    def discard(self, client: Hashable, one: _T) -> None:
        own = self._waiting.get(client)
        if own is not None:
            own.pop(one, None)
            if not own:
                del self._waiting[client]

    def pop(self) -> _T | None:
        """Take out the first of the client whose turn it is; None if nothing waits."""
        client = next(iter(self._waiting), None)
        if client is None:
            return None
        own = self._waiting[client]
        one, _ = own.popitem(last=False)
        if own:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return one


class Waiting:
    """One caller that waits to be given something. The thread or greenlet that creates it is the one that waits."""

    __slots__ = ("_spot", "cancelled", "client", "given")

    def __init__(self, client: Hashable = ()) -> None:
        self.client = client
        self.given = False
        self.cancelled = False
        self._spot = new_parking_spot()

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds, and return whether it was given. It may wait again."""
        deadline = time.monotonic() + timeout
        while not (self.given or self.cancelled) and (left := deadline - time.monotonic()) > 0:
            self._spot.park(left)
        return self.given

    def give(self) -> None:
        self.given = True
        self._spot.wake()

    def cancel(self) -> None:
        """End the wait."""
        self.cancelled = True
        self._spot.wake()


class Turns:
    """Lets `most` callers go on at a time. The others wait, and one that leaves hands over to the next (`TurnQueue`).

    A semaphore of the standard library has no order, and gevent's goes back to the greenlet that has released it. This
    one works between threads too, also between threads of the system under gevent. It takes no lock: what callers want
    is put in a list, and one of them at a time decides. So the garbage collector may end a caller anywhere, even in the
    middle of a decision.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting = TurnQueue[Turn]()
        self._wanted: deque[tuple[bool, Turn]] = deque()  # whether it comes or leaves
        self._decides = [None]  # empty while a caller decides; pop() and append() are atomic

    def ask(self, client: Hashable = ()) -> Turn:
        """Ask for a turn. The caller must `wait()` for it, and `leave()` in any case."""
        turn = Turn(self, client)
        self._want(True, turn)
        return turn

    def _want(self, comes: bool, turn: Turn) -> None:
        self._wanted.append((comes, turn))
        while self._wanted:
            try:
                self._decides.pop()
            except IndexError:  # the caller that decides sees what was just added
                return
            try:
                while self._wanted:
                    self._decide(*self._wanted.popleft())
            finally:
                self._decides.append(None)

    def _decide(self, comes: bool, turn: Turn) -> None:
        if comes:
            self._waiting.add(turn.client, turn)
        elif turn.given:
            self._free += 1
        else:
            self._waiting.discard(turn.client, turn)
        while self._free and (following := self._waiting.pop()) is not None:
            self._free -= 1
            following.give()


class Turn(Waiting):
    """A place in the order of `Turns`."""

    __slots__ = ("_turns",)

    def __init__(self, turns: Turns, client: Hashable) -> None:
        super().__init__(client)
        self._turns = turns

    def leave(self) -> None:
        """Give up the turn, or the place among those that wait. Called once."""
        self._turns._want(False, self)
