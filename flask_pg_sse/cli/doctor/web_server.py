"""gunicorn, as it runs on this host or as it is configured here: can it serve streams, and how many?"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg2.extensions import get_wait_callback

from ...engine.postgres.dsn import PSYCOPG2, uses_psycopg2
from ...server.capacity import HTTP2, ONE_THREAD, SYNC, TOO_MANY_STREAMS
from ...server.host import children
from .result import Result, fault, in_two, ok, warning
from .setup import Check, NotLookedAt, Setup

_PRINT = "from flask_pg_sse.server.gunicorn import print_settings; print_settings()"
# Seconds to read gunicorn's configuration, which is Python code.
_READ_WITHIN = 10.0
# Descriptors of a worker that are no clients: listening sockets, PostgreSQL, logs, gevent's own, the app's.
_OTHER_FILES = 64
_OPEN_FILES = re.compile(r"^Max open files\s+(\d+|unlimited)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Gunicorn:
    """One gunicorn: its settings, where they come from, and the limit of open files of its workers."""

    source: str
    worker_class: str
    workers: int
    threads: int
    worker_connections: int
    http2: bool
    psycogreen: bool  # whether its configuration makes psycopg2 wait as gevent does
    binds: list[str]
    open_files: int | None

    @property
    def runs(self) -> bool:
        return self.source.startswith("gunicorn ")

    @property
    def is_gevent(self) -> bool:
        return "gevent" in self.worker_class

    @property
    def holds(self) -> int:
        """The connections that one worker holds at once."""
        return min(self.worker_connections, self.threads) if self.worker_class == "gthread" else self.worker_connections


def found(setup: Setup) -> Iterator[Result]:
    """Which gunicorn the next checks look at."""
    servers = _gunicorns(setup)
    for source in setup.unread:
        yield warning(
            f"{source}: gunicorn cannot read this configuration, or not within {_READ_WITHIN:g} s.",
            "Run gunicorn --print-config with the same arguments, which says what is wrong.",
        )
    for source in setup.untold:
        yield ok(
            f"{source} runs here, and its arguments cannot be seen, because setproctitle has replaced them: its worker "
            "class, its connections and its limit of open files were not looked at."
        )
    if servers:
        yield ok("; ".join(f"{one.source}: {one.workers} x {one.worker_class}" for one in servers) + ".")
    elif not (setup.unread or setup.untold):
        yield ok(
            "No gunicorn runs in this directory, and none is configured here (GUNICORN_CMD_ARGS, gunicorn.conf.py): "
            "what serves the streams was not looked at. Run this in the server's directory, as its user."
        )


def worker_class(setup: Setup) -> Iterator[Result]:
    """The workers serve more than one request at a time."""
    for one in _some(setup):
        if one.worker_class == "sync" or one.worker_class.endswith("SyncWorker"):
            text, remedy = in_two(SYNC)
            yield fault(f"{one.source}: {text}", remedy)
        elif one.worker_class == "gthread" and one.threads < 2:
            text, remedy = in_two(ONE_THREAD)
            yield fault(f"{one.source}: {text}", remedy)
        else:
            yield ok(f"{one.source}: the {one.worker_class} worker serves streams.")


def http2(setup: Setup) -> Iterator[Result]:
    """gunicorn does not speak HTTP/2 itself."""
    for one in _some(setup):
        if one.http2:
            text, remedy = in_two(HTTP2)
            yield fault(f"{one.source}: {text}", f"{remedy} Remove h2 from http_protocols.")


def connections(setup: Setup) -> Iterator[Result]:
    """Streams leave room for other requests."""
    for one in _some(setup):
        most = setup.settings.max_streams
        if most is not None and most >= one.holds:
            text, remedy = in_two(TOO_MANY_STREAMS % (most, one.holds))
            yield warning(f"{one.source}: {text}", remedy)
        else:
            yield ok(f"{one.source}: a worker holds {one.holds} connections at once, streams included.")


def open_files(setup: Setup) -> Iterator[Result]:
    """The limit of open files is higher than the number of connections."""
    for one in _some(setup):
        if one.open_files is None:
            continue
        needed = min(one.holds, setup.settings.max_streams or one.holds) + _OTHER_FILES
        if one.open_files < needed:
            yield warning(
                f"{one.source}: a worker may have {one.open_files} files open (ulimit -n), and needs about {needed} "
                f"for {needed - _OTHER_FILES} connections. Beyond that nobody can connect, and PostgreSQL cannot be "
                "reached.",
                f"Raise ulimit -n to {max(needed, 4096)} where gunicorn starts (systemd: LimitNOFILE=), or lower "
                "--worker-connections.",
            )
        else:
            yield ok(f"{one.source}: a worker may have {one.open_files} files open.")


def driver(setup: Setup) -> Result | None:
    """Under gevent, the app's own queries do not stop the worker."""
    uri = setup.app.config.get("SQLALCHEMY_DATABASE_URI")
    if not uri:
        return None
    with contextlib.suppress(ImportError):
        importlib.import_module("sqlalchemy")  # the app may do so at its first request only
    if not uses_psycopg2(uri) or get_wait_callback() is not None:
        return None
    if not any(one.is_gevent and not one.psycogreen for one in _some(setup)):
        return None
    return warning(*in_two(PSYCOPG2))


def addresses(setup: Setup) -> Sequence[str]:
    """Return the URLs at which the gunicorns that run here can be reached directly."""
    found = []
    for one in _gunicorns(setup):
        for bind in one.binds if one.runs else ():
            host, _, port = bind.rpartition(":")
            if port.isdigit() and not bind.startswith(("unix:", "fd:")):
                host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
                found.append(f"http://{host}:{port}")
    return found


def _some(setup: Setup) -> Sequence[Gunicorn]:
    servers = _gunicorns(setup)
    if not servers:
        raise NotLookedAt
    return servers


def _gunicorns(setup: Setup) -> Sequence[Gunicorn]:
    if setup.servers is None:
        setup.servers = [*_running(setup)]
        if not setup.servers and not setup.untold:  # arguments that cannot be seen may overrule what is configured
            setup.servers = [*_configured(setup)]
    return setup.servers


def _running(setup: Setup) -> Iterator[Gunicorn]:
    """Yield the gunicorns that serve this app or run in this directory, with their own arguments and environment."""
    here, arbiters = os.getcwd(), {str(one.get("arbiter")) for one in setup.workers}
    for process in sorted(Path("/proc").glob("[0-9]*")):
        try:
            arguments = process.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            untold = arguments[:1] and arguments[0].startswith("gunicorn: master ")
            at = next((number for number, word in enumerate(arguments[:4]) if Path(word).name == "gunicorn"), None)
            if not untold and (at is None or _parent_is_gunicorn(process)):
                continue
            if process.name not in arbiters and os.readlink(process / "cwd") != here:
                continue
            if at is None:
                setup.untold.append(f"gunicorn {process.name}")
                continue
            environ = _environ(process)
            worker = next(iter(children(int(process.name))), process.name)
            limits = _OPEN_FILES.search(Path("/proc", str(worker), "limits").read_text())
        except OSError:  # it has ended, or is another user's
            continue
        limit = int(limits[1]) if limits and limits[1] != "unlimited" else None
        cwd = os.readlink(process / "cwd")
        yield from _read(setup, f"gunicorn {process.name}", arguments[at + 1 :], environ, limit, cwd)


def _configured(setup: Setup) -> Iterator[Gunicorn]:
    """Yield the gunicorn that is configured for this directory, if any is."""
    if os.environ.get("GUNICORN_CMD_ARGS"):
        source = "GUNICORN_CMD_ARGS"
    elif Path("gunicorn.conf.py").exists():
        source = "gunicorn.conf.py"
    else:
        return
    yield from _read(setup, source, [], os.environ, resource.getrlimit(resource.RLIMIT_NOFILE)[0], ".")


def _read(
    setup: Setup, source: str, arguments: Sequence[str], environ: Mapping[str, str], open_files: int | None, cwd: str
) -> Iterator[Gunicorn]:
    """Have gunicorn itself read its configuration, in a process of its own."""
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        said = subprocess.run(
            [sys.executable, "-c", _PRINT, *arguments],
            env={**environ, "PYTHONPATH": paths},
            cwd=cwd,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_READ_WITHIN,
        )
        values = json.loads(said.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        setup.unread.append(source)
    else:
        yield Gunicorn(source, **values, open_files=open_files)


def _environ(process: Path) -> dict[str, str]:
    pairs = process.joinpath("environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _parent(process: Path) -> str:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


def _parent_is_gunicorn(process: Path) -> bool:
    """Tell whether this is a worker: its parent has the same command line."""
    parent = Path("/proc", _parent(process), "cmdline")
    return parent.read_bytes() == process.joinpath("cmdline").read_bytes()


CHECKS: dict[str, Check] = {
    "web server": found,
    "worker class": worker_class,
    "http/2": http2,
    "connections": connections,
    "open files": open_files,
    "database driver": driver,
}
