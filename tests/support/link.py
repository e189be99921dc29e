"""A TCP connection that can be cut or fall silent: a proxy in a thread between a client and a server on 127.0.0.1."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from urllib.parse import urlsplit


def through(link: Link, url: str) -> str:
    """Return the URL of a database with a link in the way to it."""
    return urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{link.port}").geturl()


class Link:
    """Passes connections on to `target`, until they are cut. `port` is its own; used as a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._turns: Iterator[int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._is_cut = False
        self._is_silent = False
        self._is_slow = False
        self._silent: set[socket.socket] = set()  # those whose packets get lost, both ways
        self._peers: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._orders: list[str] = []
        self._done = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def __enter__(self) -> Link:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._order("stop")
        self._thread.join(5)
        for sock in (*self._peers, self._listener, self._wake, self._woken):
            sock.close()
        self._selector.close()

    def lead_to(self, target: int) -> None:
        """Pass connections that come from now on to another port."""
        self._target = target

    def lead_in_turn(self, targets: list[int]) -> None:
        """Pass each new connection on to the next of these ports, as a load balancer does."""
        self._turns = itertools.cycle(targets)

    def cut(self) -> None:
        """End all connections, and let no new one in."""
        self._order("cut")

    def slow_down(self) -> None:
        """Pass on less than a megabyte a second from now on."""
        self._is_slow = True

    def drop(self) -> None:
        """End all connections; new ones may come."""
        self._order("drop")

    def silence(self) -> None:
        """Lose all that comes from now on, on new connections too, and tell nobody: a dead router, a vanished host."""
        self._order("silence")

    def restore(self) -> None:
        """Let connections in again, and pass on what they say. Those that fell silent stay so until they are cut."""
        self._order("restore")

    def _order(self, word: str) -> None:
        with self._done:
            self._orders.append(word)
            self._wake.send(b"\0")
            self._done.wait_for(lambda: word not in self._orders, 30)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._woken.recv(100)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._peers:
                    self._pass_on(key.fileobj)
            with self._done:
                orders, self._orders = self._orders, []
                for order in orders:
                    self._is_cut = order in ("cut", "stop")
                    self._is_silent = order == "silence"
                    if self._is_silent:
                        self._silent.update(self._peers)
                    if self._is_cut or order == "drop":
                        for sock in list(self._peers):
                            self._end(sock)
                self._done.notify_all()
            if "stop" in orders:
                return

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._is_cut:
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", next(self._turns) if self._turns else self._target))
        except OSError:  # nobody is there
            client.close()
            return
        self._peers[client], self._peers[server] = server, client
        if self._is_silent:
            self._silent.update((client, server))
        self._selector.register(client, selectors.EVENT_READ)
        self._selector.register(server, selectors.EVENT_READ)

    def _pass_on(self, sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            if self._is_slow:
                time.sleep(0.02)
            data = sock.recv(16384 if self._is_slow else 65536)
            if sock not in self._silent:
                self._peers[sock].sendall(data)
        if not data and sock in self._silent:
            self._selector.unregister(sock)  # its peer does not hear of its end either
        elif not data:
            self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        peer = self._peers.pop(sock, None)
        if peer is None:
            return
        del self._peers[peer]
        for one in (sock, peer):
            with contextlib.suppress(KeyError):
                self._selector.unregister(one)
            self._silent.discard(one)
            one.close()
