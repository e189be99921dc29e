"""`flask sse status`, as somebody on call uses it: real workers, also stopped, killed, and without PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flask_pg_sse.server import siblings
from tests.support.client import eventually, open_stream
from tests.support.processes import children, state_of
from tests.support.servers import ROOT, WebServer
from tools import postgres

Start = Callable[..., WebServer]


@pytest.fixture
def nobody_there() -> str:
    """The URL of a database that does not answer, and that no other test names: its workers are those of this test."""
    return f"postgresql://127.0.0.1:1/{uuid.uuid4().hex}"


def run(database_url: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flask", "--app", "tests.support.apps.quiet", "sse", *arguments]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, **env}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


def workers(database_url: str) -> list[dict[str, Any]]:
    done = run(database_url, "status", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
    return found


def answering(database_url: str) -> list[dict[str, Any]]:
    """Return the workers at a look that each of them answers: on a busy machine one may take longer than 0.7 s."""
    found: list[dict[str, Any]] = []

    def all_answer() -> bool:
        found[:] = workers(database_url)
        return all(one["streams"] is not None for one in found)

    eventually(all_answer, 30)
    return found


@pytest.mark.parametrize(
    "options",
    [("-w", "2"), pytest.param(("-w", "2", "-k", "gthread", "--threads", "8"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)
def test_the_workers_of_this_host_and_what_they_do(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    server = start_server(database_url, *options)
    pids = set(children(server.process.pid))
    eventually(lambda: {one["pid"] for one in workers(database_url)} == pids, 30)  # also those that served nothing
    assert [one["streams"] for one in answering(database_url)] == [0, 0]
    streams = [open_stream(server.port, "orders", "stock") for _ in range(5)]
    server.post("/notify/orders", b'{"data": "x"}')
    for stream in streams:
        assert stream.event().data == "x"
    found = answering(database_url)
    assert sum(one["streams"] for one in found) == 5
    assert sum(one["delivered"] for one in found) == 5
    assert sum(one["bytes"] for one in found) == 5 * len("data: x\n\n")
    served = next(one for one in found if one["streams"])
    assert (served["channels"], served["behind"], served["listener"], served["state"]) == (2, 0, "ready", "serving")
    assert 0 < served["lag"] < 5 and served["memory"] > 10**7 and served["version"] == "0.1.0"

    def shown() -> str:
        text = run(database_url, "status").stdout
        return text if "2 workers, 5 streams\n" in text else ""

    text = eventually(shown, 30)
    assert str(served["pid"]) in text and "\x1b" not in text
    for stream in streams:
        stream.close()


@pytest.mark.slow
def test_a_stopped_worker_is_named_and_a_killed_one_is_gone_while_postgres_is_away(
    nobody_there: str, start_server: Start
) -> None:
    server = start_server(nobody_there, "-w", "2")
    pids = set(children(server.process.pid))
    eventually(lambda: {one["pid"] for one in workers(nobody_there)} == pids, 30)
    stopped = min(pids)
    os.kill(stopped, signal.SIGSTOP)
    try:
        eventually(lambda: state_of(stopped) == "T")
        by_pid = {one["pid"]: one for one in workers(nobody_there)}
        assert (by_pid[stopped]["state"], by_pid[stopped]["streams"]) == ("stopped", None)
        assert by_pid[max(pids)]["state"] == "serving"
        text = run(nobody_there, "status").stdout
        assert f"{stopped} " in text and "1 without an answer" in text
    finally:
        os.kill(stopped, signal.SIGKILL)
    eventually(lambda: stopped not in {one["pid"] for one in workers(nobody_there)}, 30)


def test_a_look_takes_less_than_a_second_also_if_a_worker_is_stopped(
    nobody_there: str, make_app: Callable[..., Any], start_server: Start
) -> None:
    server = start_server(nobody_there, "-w", "2")
    app_id = make_app(nobody_there).extensions["pg_sse"].runtime.app_id()
    eventually(lambda: len(siblings.ask_all(app_id, {}).answers) == 2)
    [stopped, _] = children(server.process.pid)
    os.kill(stopped, signal.SIGSTOP)
    try:
        eventually(lambda: state_of(stopped) == "T")

        def a_quick_look() -> siblings.Asked | None:
            began = time.monotonic()
            asked = siblings.ask_all(app_id, {})
            return asked if time.monotonic() - began < 1 and asked.answers else None

        asked = eventually(a_quick_look)  # on a busy machine not each time
        assert [len(asked.answers), len(asked.silent)] == [1, 1]
        assert siblings.is_stopped(asked.silent[0])
    finally:
        os.kill(stopped, signal.SIGCONT)


@pytest.mark.slow
def test_workers_are_there_after_an_outage_began(own_postgres: postgres.Server, start_server: Start) -> None:
    server = start_server(own_postgres.url())
    with open_stream(server.port, "orders"):
        own_postgres.stop()
        eventually(lambda: [one["listener"] for one in workers(own_postgres.url())] == ["away"], 30)
        [worker] = answering(own_postgres.url())
        assert worker["streams"] == 1


@pytest.mark.slow
def test_another_key_or_another_database_is_another_app(
    nobody_there: str, database_url: str, start_server: Start
) -> None:
    server = start_server(database_url, FLASK_SECRET_KEY="one")
    eventually(lambda: run(database_url, "status", SECRET_KEY="one").stdout.count(" serving\n") == 1, 30)
    assert str(server.process.pid) not in run(database_url, "status", SECRET_KEY="two").stdout
    for done in (run(database_url, "status", SECRET_KEY="two"), run(nobody_there, "status", SECRET_KEY="one")):
        assert done.returncode == 0 and "No worker of this app has been found on this host." in done.stdout


def test_without_a_database_it_says_so() -> None:
    done = run("sqlite:///x", "status")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: It is not known which workers to look for: DATABASE_URL")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_watch_looks_again_until_ctrl_c(nobody_there: str, start_server: Start) -> None:
    server = start_server(nobody_there)
    command = [sys.executable, "-m", "flask", "--app", "tests.support.apps.quiet", "sse", "status", "--watch", "--json"]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": nobody_there}
    watching = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with watching:
        assert watching.stdout is not None and watching.stderr is not None
        looks = [json.loads(watching.stdout.readline()) for _ in range(2)]
        assert all(worker["pid"] in children(server.process.pid) for look in looks for worker in look["workers"])
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130
        assert watching.stderr.read() == ""


@pytest.mark.slow
def test_sixty_four_workers_are_asked_at_once(nobody_there: str, tmp_path: Path) -> None:
    """Real processes, each with an app; each is asked once, and none asks others."""
    code = (
        "import sys; from flask import Flask; from flask_pg_sse import sse_bp\n"
        "app = Flask('a'); app.config['SSE_DATABASE_URL'] = sys.argv[1]; app.register_blueprint(sse_bp)\n"
        "worker = app.extensions['pg_sse'].runtime.worker; asked = [0]\n"
        "real = worker.answer\n"
        "from flask_pg_sse.hub.worker import Worker\n"
        "def answer(self, question, real=Worker.answer):\n"
        "    asked[0] += 1\n"
        "    return {**real(self, question), 'asked': asked[0]}\n"
        "Worker.answer = answer; worker._appear()\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, nobody_there],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(64)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "there\n"
        looks: list[list[dict[str, Any]]] = []

        def all_answer() -> bool:
            looks.append(workers(nobody_there))
            return all(one["streams"] is not None for one in looks[-1])

        eventually(all_answer, 30)
        assert {one["pid"] for one in looks[-1]} == {process.pid for process in processes}
        assert [one["asked"] for one in looks[-1]] == [len(looks)] * 64
        eventually(lambda: "64 workers, 0 streams\n" in run(nobody_there, "status").stdout, 30)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
    assert workers(nobody_there) == []
