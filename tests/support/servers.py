"""Real web servers in subprocesses, for tests."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import resource
import signal
import socket
import ssl
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.client import eventually, request

ROOT = Path(__file__).resolve().parents[2]


def need_open_files(count: int) -> None:
    """Raise the limit of open files of this process, and so of the servers that it starts, to at least `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= count, "ulimit -Hn"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def _ports() -> Iterator[int]:
    # A worker of pytest-xdist has ports of its own. They are not those of tools/postgres.py, nor any that a browser
    # refuses (10080), nor those that the system may give to any process before the server binds (32768 and above).
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    own = [*range(11_000 + 900 * worker, 11_900 + 900 * worker)]
    random.SystemRandom().shuffle(own)  # other runs on this machine begin elsewhere
    return itertools.cycle(own)


_OWN_PORTS = _ports()
_reserved: deque[socket.socket] = deque()


@atexit.register
def _release() -> None:
    for probe in _reserved:
        probe.close()


def free_port() -> int:
    """Return a TCP port that nothing listens on. No other test is given it, nor, for a while, one of another run."""
    while len(_reserved) >= 100:
        _reserved.popleft().close()
    for port in itertools.islice(_OWN_PORTS, 900):
        _reserved.append(probe := socket.socket())
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            # Servers set this too, and then bind the port nevertheless, since nothing listens on it.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return port
    raise AssertionError("no port is free")


class WebServer:
    """One server process on 127.0.0.1, with its log in a file; `stop()` and `kill()` end it and all it started."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        env: Mapping[str, str],
        ready: str,
        tls: ssl.SSLContext | None = None,
        listeners: Sequence[socket.socket] = (),
        cwd: Path = ROOT,
    ) -> None:
        self.port = port
        self.tls = tls  # with which clients trust it, if it speaks TLS
        self.log_path = log
        self._workers = [int(command[at + 1]) for at, word in enumerate(command) if word == "-w"][-1:]
        self._ready = ready
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "FLASK_", "SSE_"))}
        environ.pop("DATABASE_URL", None)
        environ |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default", **env}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[listener.fileno() for listener in listeners],
            )

    def wait_ready(self) -> None:
        try:
            eventually(self._answers, 60, "the server answers")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log()}"
        try:
            with request(self.port, self._ready, timeout=5, tls=self.tls) as response:
                if response.status != 200:
                    return False
        except OSError:
            return False
        return all(self.log().count("Worker is ready.") >= workers for workers in self._workers)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> str:
        with request(self.port, path, tls=self.tls) as response:
            body = response.read().decode()
            assert response.status == 200, (response.status, body, self.log())
            return body

    def post(self, path: str, body: bytes = b"") -> str:
        headers = {"Content-Type": "application/json"}
        with request(self.port, path, method="POST", headers=headers, body=body or b"{}", tls=self.tls) as response:
            text = response.read().decode()
            assert response.status < 300, (response.status, text, self.log())
            return text

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End the process, gently at first, and all that is left of its session."""
        if self.process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def kill(self) -> None:
        """End all of its session at once: a worker of gevent takes up to a second to notice that it is to stop."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def gunicorn(app: str, port: int, *options: str) -> list[str]:
    """Return the command line of gunicorn with gevent workers; later options beat earlier ones."""
    return [
        sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1", "-b", f"127.0.0.1:{port}",
        "-c", "python:tests.support.apps.gunicorn_conf", *options, app,
    ]  # fmt: skip


def activated(listener: socket.socket, command: Sequence[str]) -> list[str]:
    """Return the command line that starts a server as systemd does, with its socket open already (LISTEN_FDS=1)."""
    return ["bash", "-c", f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listener.fileno()}', "bash", *command]


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Callable[..., WebServer]]:
    """Start web servers (by default gunicorn -k gevent with tests.support.apps.basic) that end with the context."""
    servers: list[WebServer] = []

    def start(
        database_url: str,
        *options: str,
        app: str = "tests.support.apps.basic:app",
        command: Callable[[int], list[str]] | None = None,
        port: int | None = None,
        ready: str = "/ping",
        tls: ssl.SSLContext | None = None,
        listeners: Sequence[socket.socket] = (),
        cwd: Path = ROOT,
        **env: str,
    ) -> WebServer:
        port = port or free_port()
        own: list[socket.socket] = []
        if listeners:  # gunicorn takes sockets that are open already, or opens its own
            own = [socket.create_server(("127.0.0.1", port))]
            listeners = [*own, *listeners]
            binds = [("-b", f"fd://{listener.fileno()}") for listener in listeners]
            options = (*options, *itertools.chain.from_iterable(binds))
        line = command(port) if command else gunicorn(app, port, *options)
        log = folder / f"server-{len(servers)}.log"
        server = WebServer(line, port, log, {"DATABASE_URL": database_url, **env}, ready, tls, listeners, cwd)
        for listener in own:
            listener.close()
        servers.append(server)
        server.wait_ready()
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    """Start web servers that end with the test."""
    with starting(tmp_path) as start:
        yield start
