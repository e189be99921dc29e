"""`flask sse status --all-hosts`: real workers on two hosts, as far as they can tell, and strangers who listen."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from itsdangerous import URLSafeSerializer

from flask_pg_sse import schema_sql
from flask_pg_sse.tokens import Question, read_question, sign_question
from tests.support.client import eventually, open_stream
from tests.support.postgres import connect, execute
from tests.support.processes import children
from tests.support.servers import ROOT, WebServer
from tools import postgres

Start = Callable[..., WebServer]
KEY = "the key of these tests"


class Hosts:
    """Hosts by their names: each has a memory of its own, in which its workers find each other."""

    def __init__(self, directory: Path, start_server: Start, database_url: str) -> None:
        self._directory = directory
        self._start_server = start_server
        self._url = database_url

    def env(self, host: str, key: str | None) -> dict[str, str]:
        directory = self._directory / host
        directory.mkdir(exist_ok=True)
        env = {"TEST_HOST": host, "TEST_RUN_DIRECTORY": str(directory)}
        return env if key is None else {**env, "FLASK_SECRET_KEY": key}

    def start(self, host: str, *options: str, key: str = KEY) -> WebServer:
        return self._start_server(self._url, *options, app="tests.support.apps.host:app", **self.env(host, key))

    def run(self, host: str, *options: str, key: str | None = KEY, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flask", "--app", "tests.support.apps.host", "sse", "status", *options]
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": self._url}
        environ |= self.env(host, key) | env
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    def look(self, host: str, **options: Any) -> dict[str, Any]:
        done = self.run(host, "--all-hosts", "--json", **options)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def streams(self, host: str, **options: Any) -> dict[str, list[int]]:
        """Return the streams of each worker, by host, as somebody on `host` sees them."""
        found: dict[str, list[int]] = {}
        for worker in self.look(host, **options)["workers"]:
            found.setdefault(worker["host"], []).append(worker["streams"])
        return {host: sorted(streams, key=str) for host, streams in found.items()}


@pytest.fixture
def hosts(tmp_path: Path, database_url: str, start_server: Start) -> Hosts:
    return Hosts(tmp_path, start_server, database_url)


@pytest.fixture
def stranger(database_url: str) -> Iterator[Any]:
    """A connection of a role that may do nothing but connect; it hears the control channel, as anybody may."""
    execute(database_url, "CREATE ROLE stranger LOGIN")
    connection = connect(database_url.replace("postgres@", "stranger@"))
    try:
        connection.cursor().execute("LISTEN flask_pg_sse")
        yield connection
    finally:
        connection.close()
        execute(database_url, "DROP ROLE stranger")


def heard(stranger: Any) -> list[tuple[str, str]]:
    """Return what a connection has heard, but for beats."""
    stranger.poll()
    return [(one.channel, one.payload) for one in stranger.notifies if "beat" not in one.payload]


def question_in(stranger: Any) -> str:
    _, payload = eventually(lambda: heard(stranger))[0]
    assert json.loads(payload).keys() == {"ask"}
    return str(json.loads(payload)["ask"])


def say(stranger: Any, payload: str) -> None:
    stranger.cursor().execute("SELECT pg_notify('flask_pg_sse', %s)", (payload,))


def test_workers_of_another_host_are_counted(hosts: Hosts) -> None:
    server = hosts.start("first-host")
    with open_stream(server.port, "orders"):
        eventually(lambda: hosts.streams("elsewhere") == {"first-host": [1]}, 30)


@pytest.mark.slow
def test_two_hosts_count_each_other_and_a_stranger_learns_that_somebody_asks(hosts: Hosts, stranger: Any) -> None:
    one, other = hosts.start("first-host"), hosts.start("second-host", "-w", "2")
    with open_stream(one.port, "orders"), open_stream(other.port, "orders", "secret-stock") as stream:
        other.post("/notify/secret-stock", b'{"data": "x"}')
        assert stream.event().data == "x"
        eventually(lambda: hosts.streams("first-host") == {"first-host": [1], "second-host": [0, 1]}, 30)
        stranger.poll()
        stranger.notifies.clear()
        found: dict[str, Any] = {}

        def of_the_other() -> dict[str, Any] | None:
            found.update(hosts.look("first-host"))
            workers: list[dict[str, Any]] = found["workers"]
            return next((one for one in workers if one["host"] == "second-host" and one["streams"]), None)

        served = eventually(of_the_other, 30)
        assert (served["delivered"], served["channels"], served["listener"]) == (1, 2, "ready")
        assert served.keys() >= {"pid", "version", "state", "behind", "bytes", "lag", "memory"}
        assert found.keys() == {"workers"} and not served.keys() & {"name", "names", "arbiter", "listeners"}
        asked = question_in(stranger)
        question = read_question([KEY], asked)
        assert question is not None and question.channel.startswith("flask_pg_sse_")
        content = URLSafeSerializer("").load_payload(asked.rpartition(".")[0].encode())
        assert content.keys() == {"n", "h"} and content["n"] == question.nonce
        assert question.channel[-32:].encode() not in base64.b64decode(content["h"])

        def text() -> str:
            shown = hosts.run("second-host", "--all-hosts").stdout
            return shown if "3 workers, 2 streams\n" in shown else ""

        assert eventually(text, 30).lstrip().startswith("HOST ")
        assert hosts.streams("first-host", key="another") == {}
    for server in (one, other):
        assert "Traceback" not in server.log() and "Ignored" not in server.log()


@pytest.mark.slow
def test_questions_of_strangers_are_not_answered_nor_is_one_that_is_sent_again(
    hosts: Hosts, stranger: Any, database_url: str
) -> None:
    [(number,)] = execute(database_url, "SELECT txid_current()")
    first = hosts.start("first-host", "-w", "2")
    with open_stream(first.port, "orders"), open_stream(first.port, "orders"), open_stream(first.port, "orders"):
        to_come = number + 100_000
        eventually(lambda: hosts.streams("elsewhere").keys() == {"first-host"}, 30)
        asked = question_in(stranger)
        question = read_question([KEY], asked)
        assert question is not None
        later = hosts.start("second-host")
        with open_stream(later.port, "orders"):
            stranger.cursor().execute(f"LISTEN {question.channel}; LISTEN flask_pg_sse_x")
            forged: list[Any] = [
                asked, asked, asked[:-1], asked + "x", "", None, 7, [], {}, "." * 5000, "é",
                sign_question(["another key"], Question("flask_pg_sse_x", to_come)),
                sign_question([KEY], Question("flask_pg_sse_x", number)),  # of a transaction from before
            ]  # fmt: skip
            for one in forged:
                say(stranger, json.dumps({"ask": one}))
            # An authentic one comes behind them: when it is answered, they have been read by every worker.
            eventually(lambda: hosts.streams("elsewhere").keys() == {"first-host", "second-host"}, 30)
            assert {channel for channel, _ in heard(stranger)} == {"flask_pg_sse"}
            again = Question("flask_pg_sse_x", to_come)
            for _ in range(3):
                say(stranger, json.dumps({"ask": sign_question([KEY], again)}))

            def answers() -> int:
                return sum(channel == "flask_pg_sse_x" for channel, _ in heard(stranger))

            eventually(lambda: answers() >= 2)
            eventually(lambda: hosts.streams("elsewhere").keys() == {"first-host", "second-host"}, 30)
            assert answers() == 2, "one of each host, however many workers it has, and however often it is asked"


@pytest.mark.slow
def test_the_question_does_not_go_into_the_event_log(hosts: Hosts, database_url: str) -> None:
    execute(database_url, schema_sql())
    server = hosts.start("first-host")
    with open_stream(server.port, "orders"):
        eventually(lambda: hosts.streams("elsewhere") == {"first-host": [1]}, 30)
    assert execute(database_url, "SELECT count(*) FROM flask_pg_sse.event") == [(0,)]


@pytest.mark.slow
def test_a_stopped_worker_of_another_host_is_named(hosts: Hosts) -> None:
    server = hosts.start("first-host", "-w", "3", "--timeout", "300")
    stopped = children(server.process.pid)[0]
    streams = [open_stream(server.port, "orders") for _ in range(12)]
    os.kill(stopped, signal.SIGSTOP)
    try:

        def states() -> dict[int, str]:
            return {worker["pid"]: worker["state"] for worker in hosts.look("elsewhere")["workers"]}

        eventually(lambda: len(found := states()) == 3 and found[stopped] == "stopped", 30)
    finally:
        os.kill(stopped, signal.SIGCONT)
    for stream in streams:
        stream.close()


@pytest.mark.slow
def test_while_postgres_is_away_the_workers_of_this_host_are_shown(
    own_postgres: postgres.Server, tmp_path: Path, start_server: Start
) -> None:
    hosts = Hosts(tmp_path, start_server, own_postgres.url())
    server = hosts.start("first-host")
    with open_stream(server.port, "orders"):
        own_postgres.stop()
        began = time.monotonic()
        found = hosts.look("first-host")
        assert time.monotonic() - began < 30
        assert [worker["streams"] for worker in found["workers"]] == [1]
        assert found["other_hosts"].startswith("Other hosts cannot be asked: PostgreSQL cannot be reached")
        lines = hosts.run("first-host", "--all-hosts").stdout.splitlines()
        assert lines[-2] == "1 worker, 1 stream" and lines[-1].startswith("Other hosts cannot be asked: ")


@pytest.mark.slow
def test_what_cannot_ask_other_hosts_says_so(hosts: Hosts) -> None:
    done = hosts.run("first-host", "--all-hosts", key=None)
    assert done.returncode == 1 and "flask sse status --all-hosts needs a secret key" in done.stderr
    done = hosts.run("first-host", "--all-hosts", FLASK_SSE_LISTEN_URL="poll")
    assert done.returncode == 1 and "--all-hosts needs LISTEN" in done.stderr
