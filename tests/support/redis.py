"""Debian's Redis: one server for the run, and servers of a test's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from tests.support.client import eventually
from tests.support.servers import free_port


class RedisServer:
    """A server on 127.0.0.1 and on a Unix socket, without data. `options` are those of its configuration."""

    def __init__(self, folder: Path, **options: str) -> None:
        found = shutil.which("redis-server")
        if found is None:
            pytest.skip("redis-server is not installed: apt-get install redis-server")
        self.program = found
        self.folder = folder
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "save": "",
            "dir": str(self.folder),
            "logfile": str(self.folder / "redis.log"),
            **self.options,
        }
        line = [part for name, value in options.items() for part in (f"--{name}", *(value.split() or [""]))]
        self._process = subprocess.Popen([self.program, *line])
        eventually(self.socket.exists, 60, "Redis listens")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def ask(self, *command: Any, **options: Any) -> Any:
        """Run one command on a connection of its own, as redis-cli would."""
        client = redis.Redis.from_url(f"unix://{self.socket}", **options)
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def publish(self, channel: str, payload: str | bytes) -> int:
        """Send a payload; return how many subscribers there are."""
        return int(self.ask("PUBLISH", channel, payload))

    def channels(self) -> set[str]:
        """Return the channels that have subscribers."""
        return {name.decode() for name in self.ask("PUBSUB", "CHANNELS")}


RunRedis = Callable[..., RedisServer]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server of the run. A test that stops servers, or gives them options, takes `run_redis`."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def run_redis() -> Iterator[RunRedis]:
    """Runs servers of this test's own."""
    with ExitStack() as ends:

        def run(*, started: bool = True, **options: str) -> RedisServer:
            server = RedisServer(Path(ends.enter_context(tempfile.TemporaryDirectory())), **options)
            ends.callback(server.stop)
            if started:
                server.start()
            return server

        yield run


def certificates(folder: Path) -> dict[str, str]:
    """Return the options of a server with TLS; `ca.pem` in the folder is who has signed its certificate."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    pem = str(folder / "server.pem")
    return {"tls-port": str(free_port()), "tls-cert-file": pem, "tls-key-file": pem, "tls-auth-clients": "no"}
