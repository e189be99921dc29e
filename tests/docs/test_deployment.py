"""docs/deploy.md without its proxies: gunicorn's settings, systemd's units, the Dockerfile, connections, limits."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.client import eventually, open_stream, request
from tests.support.documents import ROOT, Document
from tests.support.postgres import connect, execute
from tests.support.proxies import Page
from tests.support.publishers import Counting
from tests.support.servers import WebServer, activated, gunicorn

Start = Callable[..., WebServer]
DEPLOY = Document("docs/deploy.md")
example = DEPLOY.example


def site(folder: Path) -> Path:
    """Make /srv/app: an app, and the page's settings for gunicorn with those that the tests' servers all have."""
    folder.mkdir()
    (folder / "app.py").write_text("from tests.support.apps.basic import app\n")
    own = "from tests.support.apps.gunicorn_conf import control_socket_disable, post_worker_init\n"
    (folder / "gunicorn.conf.py").write_text(own + example("gunicorn.conf.py"))
    return folder


def wait_for_workers(server: WebServer, count: int) -> None:
    """Wait until so many workers were ready. One that gets SIGTERM while it boots loses it (gunicorn 27)."""
    eventually(lambda: server.log().count("Worker is ready.") >= count, 60, "the workers are ready")


def unit(name: str) -> dict[str, str]:
    units = {"service": example("app.service"), "socket": example("app.socket")}
    return dict(re.findall(r"^(\w+)=(.*)$", units[name], re.MULTILINE))


@pytest.mark.slow
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze: apt-get install systemd")
    (tmp_path / "app.socket").write_text(example("app.socket"))
    (tmp_path / "app.service").write_text(example("app.service").replace("/srv/app/venv/bin/gunicorn", "/bin/true"))
    done = subprocess.run([analyze, "verify", *tmp_path.iterdir()], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "app." in line]) == (0, [])


def gunicorn_of_the_unit() -> list[str]:
    program, *words = unit("service")["ExecStart"].split()
    assert program.endswith("/bin/gunicorn")
    return [sys.executable, "-m", "gunicorn", *words]


class Asking(threading.Thread):
    """Asks for a page all the time, as visitors do; `failed` has what was no page."""

    def __init__(self, port: int) -> None:
        super().__init__(name="asking")
        self.answered = 0
        self.failed: list[str] = []
        self._port = port
        self._left = threading.Event()

    def run(self) -> None:
        while not self._left.wait(0.02):
            try:
                with request(self._port, "/ping", timeout=60) as response:
                    assert response.status == 200, response.status
                self.answered += 1
            except (AssertionError, OSError) as error:
                self.failed.append(repr(error))

    def leave(self) -> None:
        self._left.set()
        self.join()


@pytest.mark.slow
def test_a_restart_under_systemd_fails_no_request_and_loses_no_event(logged_url: str, tmp_path: Path) -> None:
    """The units' commands, with what systemd gives them: a socket that is open already, and stays open."""
    folder = site(tmp_path / "app")
    service = unit("service")
    assert (service["Type"], service["KillMode"]) == ("notify", "mixed")
    with socket.create_server(("127.0.0.1", 0), backlog=int(unit("socket")["Backlog"])) as listener:
        port = listener.getsockname()[1]
        env = {"DATABASE_URL": logged_url, "FLASK_SSE_RETRY": "200"}

        def start(number: int) -> WebServer:
            command = activated(listener, gunicorn_of_the_unit())
            log = tmp_path / f"{number}.log"
            return WebServer(command, port, log, env, "/ping", listeners=[listener], cwd=folder)

        servers = [start(0)]
        pages = [Page(servers[0], "orders") for _ in range(6)]
        asking = Asking(port)
        try:
            servers[0].wait_ready()
            for thread in (*pages, asking):
                thread.start()
            with Counting(logged_url, "orders") as counting:

                def all_are_back() -> bool:
                    """Tell whether each page has an event that was sent after this server was ready."""
                    return all(page.heard and int(page.heard[-1]) > ready for page in pages)

                for number in (1, 2):
                    wait_for_workers(servers[-1], 2)
                    ready = len(counting.sent)
                    eventually(all_are_back, 60)
                    servers[-1].process.send_signal(signal.SIGTERM)
                    assert servers[-1].process.wait(30) == 0
                    servers.append(start(number))
                wait_for_workers(servers[-1], 2)
                reload = service["ExecReload"].replace("$MAINPID", str(servers[-1].process.pid))
                subprocess.run(reload.split(), check=True)
                wait_for_workers(servers[-1], 4)
                ready = len(counting.sent)
                eventually(all_are_back, 60)
            eventually(lambda: all(page.heard[-1] == counting.sent[-1] for page in pages), 20)
            assert asking.failed == [] and asking.answered > 10
            assert [page.ended_by for page in pages] == [None] * len(pages)
            assert all(page.heard == counting.sent[-len(page.heard) :] for page in pages)
        finally:
            for page in pages:
                page.leave()
            asking.leave()
            for server in servers:
                server.kill()


def test_gunicorn_reads_its_settings(database_url: str, start_server: Start, tmp_path: Path) -> None:
    folder = site(tmp_path / "app")
    line = [sys.executable, "-m", "gunicorn", "app:app"]

    def command(port: int) -> list[str]:
        return [*line, "--bind", f"127.0.0.1:{port}", "--workers", "1"]

    said = subprocess.run([*line, "--print-config"], cwd=folder, capture_output=True, text=True).stdout
    settings = dict(re.findall(r"^(\w+) += (.*)$", said, re.MULTILINE))
    assert settings["bind"] == "['127.0.0.1:8000']" and settings["workers"] == "2"
    server = start_server(database_url, command=command, cwd=folder)
    with open_stream(server.port, "orders") as stream:
        server.terminate()
        assert stream.event().json == {"reason": "shutdown"}
    assert "Using worker: gevent" in server.log()


# -- Docker


@pytest.mark.slow
def test_the_images_steps_bring_an_app(database_url: str, start_server: Start, tmp_path: Path) -> None:
    """Each instruction of the Dockerfile that does something, as a command, in an environment of its own."""
    text = example("Dockerfile")
    found = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    own = site(tmp_path / "checkout")
    (own / "requirements.txt").write_text("flask-pg-sse\n")
    # What the package needs comes from the environment of the tests, so that this needs no network.
    others = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PYTHONPATH": others}
    [wheel] = re.findall(r"^    pip (wheel .*)$", DEPLOY.text, re.MULTILINE)
    source = tmp_path / "flask_pg_sse"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "node_modules"))
    words = shlex.split(wheel.replace("path/to/flask_pg_sse", str(source)))
    subprocess.run([sys.executable, "-m", "pip", *words, "--no-build-isolation"], cwd=own, env=offline, check=True)

    srv = tmp_path / "srv"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    [packages] = (tmp_path / "venv").glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text(others)
    for word, rest in found:
        if word == "WORKDIR":
            assert rest == "/srv/app"
            srv.mkdir()
        elif word == "COPY":
            *what, target = rest.split()
            for name in what:
                if (own / name).is_dir():
                    shutil.copytree(own / name, srv / target, dirs_exist_ok=True)
                else:
                    shutil.copy(own / name, srv / target)
        elif word == "RUN" and "pip install" in rest:
            python, *words = shlex.split(rest)
            assert python == "python"
            subprocess.run([tmp_path / "venv" / "bin" / "python", *words], cwd=srv, env=offline, check=True)
    steps = dict(found)
    assert steps["USER"] == "10001" and "--uid 10001" in next(rest for word, rest in found if word == "RUN")
    program, *words = json.loads(steps["CMD"])

    def command(port: int) -> list[str]:
        line = [word.replace("0.0.0.0:8000", f"127.0.0.1:{port}") for word in words]
        return [str(tmp_path / "venv" / "bin" / "python"), "-m", program, *line]

    assert (packages / "flask_pg_sse" / "__init__.py").exists()
    server = start_server(database_url, command=command, cwd=srv)
    with open_stream(server.port, "orders") as stream:
        server.process.send_signal(signal.SIGTERM)  # to the process that was started, as Docker does
        assert stream.event().json == {"reason": "shutdown"}
    assert server.process.wait(20) == 0


# -- connections


@pytest.mark.slow
def test_a_worker_has_no_more_connections_than_the_table_says(
    logged_url: str, start_server: Start, tmp_path: Path
) -> None:
    """Publishers and pages wait for a lock, so that their pools are full; then many streams resume at once."""
    rows = re.findall(r"^\| (?:LISTEN|`notify|the event log).*\| (?:up to )?(\d) \|", DEPLOY.text, re.MULTILINE)
    assert [int(row) for row in rows] == [1, 4, 2, 2] and "**at most 9**" in DEPLOY.text
    workers = 2
    server = start_server(logged_url, "-w", str(workers))

    def counted() -> dict[str, int]:
        found = dict(execute(logged_url, example("connections")))
        return {name: count for name, count in found.items() if name.startswith("flask_pg_sse")}

    with ExitStack() as opened:
        for number in range(30):
            opened.enter_context(open_stream(server.port, f"channel-{number}"))
        server.post("/notify/channel-1", b'{"data": "x"}')
        quiet = counted()
        assert quiet["flask_pg_sse listener"] == workers
        assert sum(quiet.values()) <= 4 * workers, quiet

        def ask(path: str) -> None:
            method, body = ("POST", b'{"data": "x"}') if path.startswith("/notify") else ("GET", b"")
            headers = {"Content-Type": "application/json"}
            with request(server.port, path, method=method, headers=headers, body=body, timeout=60) as response:
                if path.startswith("/sse"):
                    while response.next().event != "message":
                        pass

        def ask_at_once(*paths: str) -> list[threading.Thread]:
            askers = [threading.Thread(target=ask, args=[path]) for path in paths]
            for asker in askers:
                asker.start()
            return askers

        most: Counter[str] = Counter()

        def reached(*names: str) -> bool:
            most.update({name: max(0, count - most[name]) for name, count in counted().items()})
            return all(most[f"flask_pg_sse {name}"] >= full[name] * workers for name in names)

        full = {"listener": 1, "notify": 4, "log": 2, "head": 2}
        with closing(connect(logged_url)) as locker, locker.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE flask_pg_sse.event, flask_pg_sse.retention IN ACCESS EXCLUSIVE MODE")
            waiting = ask_at_once(*["/notify/channel-1", "/cursor"] * 25)
            eventually(lambda: reached("listener", "notify", "head"), 30, "publishers and pages wait for the lock")
        for number in range(30):
            execute(logged_url, "SELECT flask_pg_sse.notify(%s, %s)", (f"channel-{number}", "x" * 100_000))
        resuming = [f"/sse?channel=channel-{number}&last_event_id=0" for number in range(30)]

        def resume() -> bool:
            for asker in ask_at_once(*resuming):
                asker.join()
            return reached("log")

        eventually(resume, 60, "as many read the log as may")
        for asker in waiting:
            asker.join()
        assert dict(most) == {f"flask_pg_sse {name}": count * workers for name, count in full.items()}


# -- Flask-Limiter


LIMITED = """
from flask import Flask

app = Flask(__name__)
app.config["SSE_CHANNELS"] = ["*"]

"""


@pytest.mark.parametrize("exempt", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flask_limiter_counts_no_stream(database_url: str, start_server: Start, tmp_path: Path, exempt: bool) -> None:
    code = example("limiter").replace("50 per hour", "3 per hour")
    if not exempt:
        code = code.replace("limiter.exempt(sse_bp)\n", "")
    (tmp_path / "limited.py").write_text(LIMITED + code + '\n@app.get("/ping")\ndef ping():\n    return "pong"\n')
    server = start_server(
        database_url,
        command=lambda port: gunicorn("limited:app", port, "--pythonpath", str(tmp_path)),
    )

    def status(path: str) -> int:
        with request(server.port, path) as response:
            return response.status

    streams = [status("/sse?channel=orders") for _ in range(6)] + [status("/sse/orders") for _ in range(6)]
    assert (429 in streams) is not exempt, streams
    assert [status("/ping") for _ in range(4)][-1] == 429, "the app's own pages are limited"
