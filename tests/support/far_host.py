"""Clients whose host can vanish: a network of the test's own, which is switched off."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

_CLONE_NEWNET = 0x40000000  # https://man7.org/linux/man-pages/man2/unshare.2.html
_T = TypeVar("_T")


class FarHost:
    """A network namespace with nothing but its own 127.0.0.1, entered by one thread.

    `listener` is a socket there that a server here may accept from. What is connected to it is cut off by `vanish()`:
    no FIN and no RST comes any more, and nothing is acknowledged.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.listener = self.there(self._make)

    def there(self, call: Callable[[], _T]) -> _T:
        """Call a function in the network."""
        return self._thread.submit(call).result()

    def _make(self) -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        self._switch("up")
        return socket.create_server(("127.0.0.1", 0), backlog=4096)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def vanish(self) -> None:
        self.there(lambda: self._switch("down"))

    def _switch(self, state: str) -> None:
        subprocess.run(["ip", "link", "set", "lo", state], check=True)

    def close(self) -> None:
        self.listener.close()
        self._thread.shutdown()


@contextmanager
def far_host() -> Iterator[FarHost]:
    if os.geteuid() != 0 or not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("networks of a test's own need root, and Linux")
    host = FarHost()
    try:
        yield host
    finally:
        host.close()
