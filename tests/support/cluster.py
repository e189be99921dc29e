"""Clusters: a primary, standbys that stream from it, backups, and an address that leads to one of the servers."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import eventually
from tests.support.link import Link, through
from tests.support.postgres import Running, binaries_of, execute, program, scratch
from tools import postgres

MakeCluster = Callable[..., AbstractContextManager["Cluster"]]
VERSIONS = ("14", "15", "16", "17", "18")


class Standby(postgres.Server):
    """A server that streams from another through `line`. What the line cuts off does not arrive, so it lags."""

    def __init__(self, data_dir: Path, line: Link, *, options: dict[str, str], bin_dir: Path | None) -> None:
        super().__init__(data_dir, options=options, bin_dir=bin_dir)
        self.line = line


class Cluster:
    """`primary`, and an `address` (`url` is the URL through it) that leads there until it is moved.

    All servers of a cluster have `wal_level=logical` and archive their WAL, for `restore()`.
    """

    def __init__(self, primary: postgres.Server, bin_dir: Path | None, folder: Path, ends: ExitStack) -> None:
        self.primary = primary
        self.archive = folder / "archive"
        self._bin_dir = bin_dir
        self._folder = folder
        self._ends = ends
        self.address = ends.enter_context(Link(primary.port))

    @property
    def url(self) -> str:
        return through(self.address, self.primary.url())

    def lead_to(self, server: postgres.Server, *, drop: bool = True) -> None:
        """Move the address; `drop`: connections that stand end, as when the old server's machine is gone."""
        self.address.lead_to(server.port)
        if drop:
            self.address.drop()

    def backup(self, name: str, of: postgres.Server | None = None) -> Path:
        """Take a base backup of a running server; return its data directory, on which a `Server` can start."""
        source, data = of or self.primary, self._folder / name
        copy = ["-d", source.url(), "-D", str(data), "-X", "stream", "-c", "fast", "--no-sync"]
        subprocess.run([program("pg_basebackup"), *copy], check=True, capture_output=True)
        _give_to_the_servers_user(data)
        return data

    def server(self, data: Path, bin_dir: Path | None = None, **options: str) -> postgres.Server:
        """Return a server on such data, not started; it is stopped with the cluster."""
        options = {**self.primary.options, **options}
        server = postgres.Server(data, options=options, bin_dir=bin_dir or self._bin_dir)
        self._ends.callback(server.stop, "immediate")
        return server

    def standby(self, name: str = "standby", of: postgres.Server | None = None, **options: str) -> Standby:
        """Start a hot standby, and wait until it streams. Options are settings, as `recovery_min_apply_delay`."""
        source = of or self.primary
        line = self._ends.enter_context(Link(source.port))
        own = {**self.primary.options, "primary_conninfo": _conninfo(name, line), **options}
        standby = Standby(self.backup(name, source), line, options=own, bin_dir=self._bin_dir)
        self._ends.callback(standby.stop, "immediate")
        _signal(standby, "standby")
        standby.start()
        self._streams(name, source)
        return standby

    def follow(self, old: postgres.Server, new: postgres.Server) -> None:
        """Start a primary that was stopped cleanly as a standby of another."""
        old.options["primary_conninfo"] = f"host={postgres.HOST} port={new.port} user=postgres application_name=old"
        _signal(old, "standby")
        old.start()
        self._streams("old", new)

    def upgrade(self, version: str = "18") -> postgres.Server:
        """Carry the data of the primary, which was stopped, over to a newer PostgreSQL; return its server, not started.

        (https://www.postgresql.org/docs/current/pgupgrade.html)
        """
        bin_dir, data = binaries_of(version), self._folder / "upgraded"
        data.mkdir()
        _give_to_the_servers_user(data)
        options = ["-U", postgres.USER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        _as_the_servers_user(data, bin_dir / "initdb", "-D", data, "--no-data-checksums", *options)
        old: list[str | Path] = ["-b", program("postgres", self._bin_dir).parent, "-d", self.primary.data_dir]
        new: list[str | Path] = ["-B", bin_dir, "-D", data, "-s", data, "-U", postgres.USER, "--link"]
        _as_the_servers_user(data, bin_dir / "pg_upgrade", *old, *new)
        return self.server(data, bin_dir=bin_dir)

    def _streams(self, name: str, source: postgres.Server) -> None:
        query = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
        eventually(lambda: execute(source.url(), query, (name,)), 30, f"{name} streams")

    def restore(self, data: Path, target: str) -> postgres.Server:
        """Start a server on a backup, recovered from the archive up to a restore point, on a timeline of its own.

        (https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-PITR-RECOVERY)
        """
        server = self.server(
            data,
            restore_command=f"cp {self.archive}/%f %p",
            recovery_target_name=target,
            recovery_target_action="promote",
        )
        _signal(server, "recovery")
        server.start()
        eventually(lambda: execute(server.url(), "SELECT NOT pg_is_in_recovery()") == [(True,)], 30)
        return server


def promote(standby: postgres.Server) -> None:
    """Make a standby a primary, and wait for it."""
    assert execute(standby.url(), "SELECT pg_promote()") == [(True,)]


def caught_up(standby: postgres.Server, source: postgres.Server) -> None:
    """Wait until a standby has replayed all that its primary has."""
    ((lsn,),) = execute(source.url(), "SELECT pg_current_wal_lsn()::text")
    query = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
    eventually(lambda: execute(standby.url(), query, (lsn,)) == [(True,)], 30, f"the standby has {lsn}")


def _conninfo(name: str, line: Link) -> str:
    return f"host={postgres.HOST} port={line.port} user=postgres application_name={name}"


def _signal(server: postgres.Server, kind: str) -> None:
    """Leave the file that tells a server how to start; it is removed by the server itself."""
    path = server.data_dir / f"{kind}.signal"
    path.touch(mode=0o600)
    _give_to_the_servers_user(path)


def _give_to_the_servers_user(path: Path) -> None:
    if os.geteuid() == 0:  # root's servers run as nobody
        nobody = pwd.getpwnam("nobody")
        subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", path], check=True)


def _as_the_servers_user(cwd: Path, *command: str | Path) -> None:
    as_nobody: dict[str, Any] = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
    user = as_nobody if os.geteuid() == 0 else {}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **user)
    logs = "".join(path.read_text() for path in cwd.glob("pg_upgrade_output.d/*/log/*_dump_*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs


@pytest.fixture(scope="session")
def make_cluster(running_postgres: Running, pytestconfig: pytest.Config) -> MakeCluster:
    """Makes clusters, with settings of one's own (`version="15"`: of another PostgreSQL than the wheel's)."""

    @contextmanager
    def make(*, version: str | None = None, **options: str) -> Iterator[Cluster]:
        version = version or pytestconfig.getoption("postgres")
        bin_dir = binaries_of(version) if version else None
        with ExitStack() as ends:
            folder = ends.enter_context(scratch())
            archive = folder / "archive"
            archive.mkdir(mode=0o700)
            _give_to_the_servers_user(archive)
            settings = {
                "wal_level": "logical",
                "archive_mode": "on",
                "archive_command": f"cp %p {archive}/%f",
                # A primary that stops recycles what its standbys have not received yet, where nothing keeps it.
                "wal_keep_size": "256MB",
                **options,
            }
            primary = ends.enter_context(running_postgres(bin_dir=bin_dir, **settings))
            yield Cluster(primary, bin_dir, folder, ends)

    return make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Iterator[Cluster]:
    """A cluster of one server, of the newest PostgreSQL."""
    with make_cluster() as made:
        yield made


@pytest.fixture(params=[pytest.param(version, marks=pytest.mark.slow) for version in VERSIONS])
def any_cluster(request: pytest.FixtureRequest, make_cluster: MakeCluster) -> Iterator[Cluster]:
    """One of each PostgreSQL that is here."""
    with make_cluster(version=request.param) as made:
        yield made
