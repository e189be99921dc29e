"""The compared servers: this package in two ways, and the floor."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Variant:
    """One of the servers. `log`: its events go through the event log. `settings`: those of the app."""

    name: str
    title: str
    log: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


PACKAGE = Variant("package", "this package")
GENERATORS = Variant("generators", "`SSE_DIRECT_WRITE = False`", settings={"SSE_DIRECT_WRITE": "false"})
FLOOR = Variant("floor", "the floor", log=False)
VARIANTS = (PACKAGE, GENERATORS, FLOOR)


class ServerError(RuntimeError):
    """A server did not start; the message contains its output."""


class Server:
    """One server on its own port and on the given cores. It and its child processes end with the context.

    `room` is the number of connections for which a worker needs room.
    """

    def __init__(
        self,
        variant: Variant,
        url: str,
        *,
        room: int,
        cores: Collection[int] = (),
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.variant = variant
        self._workers = workers
        self.port = _free_port()
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "FLASK_", "SSE_"))}
        given = {"SSE_EVENT_LOG": "true", **variant.settings, **(settings or {})}
        environ.update({f"FLASK_{key}": value for key, value in given.items()}, DATABASE_URL=url, PYTHONPATH=str(ROOT))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        with machine.on(cores):
            self._process = subprocess.Popen(
                self._command(url, room),
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,
            )

    def _command(self, url: str, room: int) -> list[str]:
        if self.variant is FLOOR:
            return [sys.executable, "-m", "benchmarks.floor", str(self.port), url]
        return [
            sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", str(self._workers), "-b", f"127.0.0.1:{self.port}",
            "--worker-connections", str(room), "--backlog", "4096", "--log-level", "warning", "--timeout", "120",
            "-c", "python:benchmarks.gunicorn_conf", "benchmarks.app:app",
        ]  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # SIGKILL: nothing needs a clean end here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def wait(self) -> None:
        """Wait until every worker is ready."""
        assert self._process.stdout is not None
        for _ in range(self._workers):
            if self._process.stdout.readline() != b"ready\n":
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")
                raise ServerError(f"The server ({self.variant.title}) did not start. It said: {said}")

    def _pids(self) -> list[int]:
        return [self._process.pid, *machine.children(self._process.pid)]

    def cpu(self) -> float:
        """Return the seconds of CPU of all its processes together."""
        return sum(machine.cpu(self._pids()).values())

    def resident(self) -> int:
        """Return its resident memory in bytes."""
        return machine.resident(self._pids())


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
