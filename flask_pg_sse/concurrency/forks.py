"""What a process has opened and started ceases to exist in each child that it forks.

Otherwise the child would run copies. Under gevent these are copies of all greenlets, which read from the parent's
connections and write to its clients. And what the parent closes would stay open, because the child still has it.

A child may do all that its parent may, with parts of its own. Nothing is closed as usual there: a goodbye would end the
parent's session. https://docs.python.org/3/library/os.html#os.register_at_fork
"""

from __future__ import annotations

import _socket
import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Descriptor(Protocol):
    """A socket, or another object with a descriptor. It raises an error, or returns -1, when it is closed."""

    def fileno(self) -> int: ...


# Sets of weak references, because add() and discard() of a set are atomic. The garbage collector may call discard() at
# any moment.
_descriptors: set[weakref.ref[Descriptor]] = set()
_stops: set[weakref.WeakMethod[Callable[[], None]]] = set()
_resets: list[Callable[[], None]] = []
# What children get in the place of each descriptor. Opened before there is a child, which may have no descriptor left.
_ended: dict[str, int] = {}


def close_in_children(one: Descriptor) -> None:
    """Have the descriptor closed in every child that is forked from now on. Only a weak reference to it is kept."""
    if not _ended:
        made = _ended_socket()
        if _ended.setdefault("socket", made) != made:  # another thread was faster
            os.close(made)
    _descriptors.add(weakref.ref(one, _descriptors.discard))


def call_in_children(method: Callable[[], None]) -> None:
    """Have a method called in every child, behind that. It must not wait. Only a weak reference to its object is kept.

    The child has no other thread, and under gevent no other greenlet has run there yet.
    """
    _stops.add(weakref.WeakMethod(method, _stops.discard))


def reset_in_children(function: Callable[[], None]) -> None:
    """Have a module's function called in every child, to forget what holds for its parent."""
    _resets.append(function)


def _silence(one: Any, ended: int) -> None:
    """Take a descriptor away from an object of the parent's, without a word to the other side."""
    with contextlib.suppress(Exception):  # each library has its own error for one that is closed
        number = one.fileno()
        if number >= 0:
            # Not close(): the object would later close the number again, and somebody else may have it by then. What
            # still uses the number finds the end of a connection, and ends too.
            os.dup2(ended, number, inheritable=False)


def _begin_child() -> None:
    for descriptor in tuple(_descriptors):
        if _ended:
            _silence(descriptor(), _ended["socket"])
    _descriptors.clear()
    for stop in tuple(_stops):
        method = stop()
        if method is not None:
            method()
    _stops.clear()
    for reset in _resets:
        reset()


def _ended_socket() -> int:
    """Return the descriptor of a socket whose other side is closed: it reads as ended, and writing to it fails.

    It stays open until the process ends. Python would then warn of a socket object that nobody has closed.
    """
    this, other = _socket.socketpair()  # not gevent's
    other.close()
    return this.detach()


os.register_at_fork(after_in_child=_begin_child)
