"""The Dockerfile, the compose file and the units of systemd, as far as they can be tried without Docker and systemd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.client import eventually, open_stream
from tests.support.servers import WebServer, activated

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--", "-c", "python:tests.support.apps.gunicorn_conf"]
Start = Callable[..., WebServer]


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, of both its stages."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_runs_as_nobody_in_particular_and_gets_signals_itself() -> None:
    found = dict(instructions())
    assert found["USER"] == "10001" and "--uid 10001" in found["RUN"]
    assert json.loads(found["CMD"]) == ["flask-pg-sse", "serve", "--host", "0.0.0.0"]  # as a list: without a shell
    ignored = (ROOT / ".dockerignore").read_text()
    for what in copied():
        assert (ROOT / what).exists()
        assert f"!{what}\n" in ignored


def copied() -> list[str]:
    """Return what the first stage copies out of the checkout."""
    return [
        what for word, rest in instructions() if word == "COPY" and "--from" not in rest for what in rest.split()[:-1]
    ]


@pytest.mark.slow
def test_the_images_steps_bring_a_server(database_url: str, start_server: Start, tmp_path: Path) -> None:
    source, home = tmp_path / "source", tmp_path / "opt"
    source.mkdir()
    for what in copied():
        copy = shutil.copytree if (ROOT / what).is_dir() else shutil.copy
        copy(ROOT / what, source / what)
    build = next(rest for word, rest in instructions() if word == "RUN")
    make, install = build.replace("/opt/flask-pg-sse", str(home)).split(" && ")
    subprocess.run([sys.executable, *make.split()[1:]], check=True)
    # What the package needs comes from the environment of the tests, so that this needs no network.
    [site] = home.glob("lib/python3*/site-packages")
    others = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    (site / "others.pth").write_text(others)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": others}
    subprocess.run(shlex.split(install), cwd=source, env={**os.environ, **offline}, check=True)

    found = dict(instructions())
    program, *words = json.loads(found["CMD"])

    def command(port: int) -> list[str]:
        return [str(home / "bin" / program), *words[:-1], "127.0.0.1", "--port", str(port), "--", "--no-control-socket"]

    server = start_server(database_url, command=command, ready="/livez", cwd=tmp_path, PYTHONPATH="")
    test = json.loads(found["HEALTHCHECK"].partition("CMD ")[2].replace("8001", str(server.port)))
    healthy = [str(home / "bin" / test[0]), *test[1:]]
    assert subprocess.run(healthy).returncode == 0
    with open_stream(server.port, "orders", path="/") as stream:
        server.process.send_signal(signal.SIGTERM)  # to the process that was started, as Docker does
        assert stream.event().json == {"reason": "shutdown"}
    assert server.process.wait(20) == 0
    assert subprocess.run(healthy, stderr=subprocess.DEVNULL).returncode != 0


def test_the_compose_file_fits_the_image() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    server, database = services["sse"], services["db"]
    assert server["ports"] == [f"127.0.0.1:8001:{dict(instructions())['EXPOSE']}"]
    assert re.search(r"@(\w+)/", server["environment"]["DATABASE_URL"]) is not None
    assert "@db/" in server["environment"]["DATABASE_URL"]
    assert server["depends_on"] == {"db": {"condition": "service_healthy"}}
    assert "pg_isready" in database["healthcheck"]["test"][1]
    password = database["environment"]["POSTGRES_PASSWORD"]
    assert f":{password}@" in server["environment"]["DATABASE_URL"]


# -- systemd

UNITS = ROOT / "deploy" / "systemd"


def unit(name: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE))


@pytest.mark.slow
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze: apt-get install systemd")
    for path in UNITS.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/flask-pg-sse/bin/flask-pg-sse", "/bin/true"))
    done = subprocess.run([analyze, "verify", *tmp_path.iterdir()], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "flask-pg-sse" in line]) == (0, [])


@pytest.mark.slow
def test_the_unit_is_ready_reloaded_and_stopped(database_url: str, tmp_path: Path) -> None:
    """The unit's commands, with what systemd gives them: its socket, and where to say that the server is ready."""
    service = unit("flask-pg-sse.service")
    assert (service["Type"], service["KillMode"], service["LimitNOFILE"]) == ("notify", "mixed", "65536")
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    [program, *words] = service["ExecStart"].split()
    assert program.endswith("/bin/flask-pg-sse")
    (tmp_path / ".env").write_text(f"DATABASE_URL={database_url}\nSSE_RETRY=77\n")
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(30)
        line = [sys.executable, "-m", "flask_pg_sse.cli.main", *words, *OPTIONS]
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        port, command = listening.getsockname()[1], activated(listening, line)
        server = WebServer(command, port, tmp_path / "log", env, "/livez", listeners=[listening], cwd=tmp_path)
        try:
            assert b"READY=1" in told.recv(1000)
            server.wait_ready()
            with open_stream(port, "orders", path="/") as stream:
                (tmp_path / ".env").write_text(f"DATABASE_URL={database_url}\nSSE_RETRY=78\n")
                subprocess.run(service["ExecReload"].replace("$MAINPID", str(server.process.pid)).split(), check=True)
                assert stream.event().json == {"reason": "shutdown"}
            eventually(lambda: server.log().count("Worker is ready.") > 1, 60)  # before that it misses a SIGTERM

            def reloaded() -> bool:
                with contextlib.suppress(EOFError, ConnectionError):  # of the old worker, which ends
                    return b"retry: 78\n" in first_block(port)
                return False

            eventually(reloaded, 60)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        finally:
            server.kill()


def first_block(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"GET /orders HTTP/1.1\r\nHost: x\r\n\r\n")
        found = b""
        while b"retry: " not in found or not found.endswith(b"\n\r\n"):
            if not (more := client.recv(1000)):
                raise EOFError(f"the connection ended within {found!r}")
            found += more
        return found
