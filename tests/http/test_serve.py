"""The server that stands alone, as its users start it: `flask-pg-sse serve` and `gunicorn flask_pg_sse.serve:app`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flask_pg_sse.cli.main import main
from flask_pg_sse.serve import create_app
from flask_pg_sse.settings import Settings
from tests.support.client import Response, eventually, open_stream, request
from tests.support.postgres import execute
from tests.support.processes import children
from tests.support.servers import ROOT, WebServer, gunicorn

# One control socket for all tests would be a file in the home directory.
OPTIONS = ("--", "-c", "python:tests.support.apps.gunicorn_conf")
Serve = Callable[..., WebServer]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flask_pg_sse.cli.main", *arguments]


@pytest.fixture
def serve(start_server: Serve) -> Serve:
    """Start the server on a free port, with options of `flask-pg-sse serve`, and after `--` with gunicorn's."""

    def start(database_url: str, options: str = "", **env: Any) -> WebServer:
        own, _, gunicorns = options.partition(" -- ")

        def line(port: int) -> list[str]:
            return command("serve", "--port", str(port), *own.split(), *OPTIONS, *gunicorns.split())

        return start_server(database_url, command=line, ready="/livez", **env)

    return start


def opened(port: int, path: str = "/orders") -> Response:
    response = request(port, path, timeout=60)  # after SIGHUP it waits for a worker that boots
    assert response.status == 200, response.read()
    return response


# -- from psql to a stream


def test_an_event_from_psql_reaches_a_stream(database_url: str, serve: Serve) -> None:
    server = serve(database_url)
    for path in ("/?channel=orders", "/orders", "/channel=orders"):
        with opened(server.port, path) as stream:
            assert stream.next().event == "sse-open"
            execute(database_url, "NOTIFY Orders, 'hello'")
            assert stream.event().data == "hello"
    assert "All channels are open to everybody" in server.log()


@pytest.mark.slow
def test_gunicorn_serves_the_same_app(database_url: str, start_server: Serve) -> None:
    server = start_server(
        database_url, command=lambda port: gunicorn("flask_pg_sse.serve:app", port), ready="/livez", SSE_RETRY="77"
    )
    with opened(server.port) as stream:
        opening = stream.next()
        assert (opening.event, opening.retry) == ("sse-open", 77)


@pytest.mark.slow
def test_it_is_one_tree_of_processes_that_ends_its_streams(database_url: str, serve: Serve) -> None:
    server = serve(database_url, "--workers 2")
    assert "gunicorn" in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    eventually(lambda: server.log().count("Worker is ready.") == 2)
    workers = children(server.process.pid)
    assert len(workers) == 2
    streams = [open_stream(server.port, "orders", path="/") for _ in range(10)]
    server.terminate()
    for stream in streams:
        assert stream.event().json == {"reason": "shutdown"}
        stream.wait_closed()
        stream.close()
    assert server.process.wait(20) == 0  # gunicorn would wait 30 s for a stream
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_max_requests_ends_streams_as_well(database_url: str, serve: Serve) -> None:
    server = serve(database_url, " -- --max-requests 5")
    with open_stream(server.port, "orders", path="/") as stream:
        for _ in range(6):
            server.get("/livez")
        assert stream.event().json == {"reason": "shutdown"}


# -- the environment


@pytest.mark.slow
def test_the_file_env_is_read_and_read_again_after_sighup(tmp_path: Path, database_url: str, serve: Serve) -> None:
    file = tmp_path / ".env"
    file.write_text("DATABASE_URL=postgresql://none/none\nSSE_RETRY=77\nLOG_LEVEL=trace\nWEB_CONCURRENCY=2\n")
    server = serve(database_url, cwd=tmp_path)  # what the environment itself says beats the file
    with opened(server.port) as stream:
        assert stream.next().retry == 77
        eventually(lambda: len(children(server.process.pid)) == 2)
        file.write_text("SSE_RETRY=78\n")
        server.process.send_signal(signal.SIGHUP)
        assert stream.event().json == {"reason": "shutdown"}
    eventually(lambda: retry_of(server.port) == 78, 60)


def retry_of(port: int) -> int | None:
    with opened(port) as stream:
        return stream.next().retry


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "No database is configured: set DATABASE_URL to postgresql://"),
        ({"DATABASE_URL": "mysql://u:secret@db/x"}, "is not a PostgreSQL URL (mysql://…)"),
        ({"DATABASE_URL": "postgresql://u:secret@db:port/x"}, "DATABASE_URL of the environment is not a connection"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL is 'loud', and must be CRITICAL, ERROR, WARNING, INFO, DEBUG or TRACE."),
        ({"RELAY_SERVER_DEBUG": "maybe"}, "RELAY_SERVER_DEBUG is 'maybe', and must be true or false."),
        ({"ALLOWED_ORIGINS": "https://a.example/path"}, "ALLOWED_ORIGINS is 'https://a.example/path', and must be"),
        ({"SSE_RETRY": "soon"}, "SSE_RETRY is 'soon', and must be a whole number"),
        ({"SSE_SECRET_KEY": ""}, "SSE_SECRET_KEY is empty"),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_what_is_wrong_in_the_environment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if environ and "DATABASE_URL" not in environ:
        monkeypatch.setenv("DATABASE_URL", "postgresql://db/x")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["serve"])
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1
    assert words in line and "secret" not in line


def test_a_file_env_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SSE_CHANNELS=news\n")
    monkeypatch.setitem(sys.modules, "dotenv", None)  # as where it is not installed
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1 and "flask-pg-sse[dotenv]" in result.stderr and result.stderr.count("\n") == 1
    monkeypatch.setenv("FLASK_SKIP_DOTENV", "1")
    assert "No database is configured" in CliRunner().invoke(main, ["serve"]).stderr


def test_a_port_in_use_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: The server did not start: it cannot listen on 127.0.0.1, port {port}: Address already in use. Stop "
        "what listens there, or choose another address with --host and --port.\n",
    )


@pytest.mark.slow
def test_under_gunicorn_too_it_is_one_line(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | {"PYTHONPATH": str(ROOT)}
    line = gunicorn("flask_pg_sse.serve:app", 0)
    done = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, None)
    assert "\nNo database is configured: set DATABASE_URL to postgresql://" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_variables_of_the_older_project() -> None:
    app = create_app({"ALLOWED_ORIGINS": " https://a.example, ,https://b.example,", "RELAY_SERVER_DEBUG": "True"})
    settings = app.extensions["pg_sse"].runtime.settings
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert app.debug
    app = create_app({"ALLOWED_ORIGINS": "https://a.example", "SSE_ALLOWED_ORIGINS": "https://c.example"})
    assert app.extensions["pg_sse"].runtime.settings.allowed_origins == ("https://c.example",)
    assert not app.debug
    app = create_app({"SSE_RETRY": "", "SSE_SERVER_URL": "", "ALLOWED_ORIGINS": "", "RELAY_SERVER_DEBUG": ""})
    assert app.extensions["pg_sse"].runtime.settings == Settings()


# -- the commands without an app


def test_init_prune_and_sign_need_no_app(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    monkeypatch.setenv("DATABASE_URL", database_url)
    result = run(main, ["prune"])
    assert result.exit_code == 1
    assert 'It is not installed there: run "flask-pg-sse init".' in result.stderr
    assert run(main, ["init"]).stdout.startswith("Installed version 1 of the event log (127.0.0.1:")
    assert run(main, ["prune", "--max-age", "5"]).stdout.startswith("Deleted 0 events older than 5 s")
    assert "needs a secret key" in run(main, ["sign", "orders"]).stderr
    monkeypatch.setenv("SSE_SECRET_KEY", "k")
    assert run(main, ["sign", "orders", "--expires", "60"]).stdout.startswith("/?channel=orders&token=")
    monkeypatch.setenv("SSE_SERVER_URL", "https://live.example.com")
    assert run(main, ["sign", "orders"]).stdout.startswith("https://live.example.com/?channel=orders&token=")
    monkeypatch.delenv("DATABASE_URL")
    assert run(main, ["init", "--sql"]).stdout.startswith("DO $do$")


# -- under systemd


@pytest.mark.slow
def test_with_an_inherited_socket_no_request_fails_while_the_server_restarts(
    database_url: str, start_server: Serve, tmp_path: Path
) -> None:
    """systemd holds the socket, and hands it to each server that it starts."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listening:
        port = listening.getsockname()[1]
        line = command("serve", "--port", str(port), *OPTIONS)
        activated = ["bash", "-c", f'LISTEN_PID=$$ exec "$@" 3<&{listening.fileno()}', "bash", *line]

        def start() -> WebServer:
            log = tmp_path / f"activated-{len(list(tmp_path.iterdir()))}.log"
            env = {"DATABASE_URL": database_url, "LISTEN_FDS": "1"}
            return WebServer(activated, port, log, env, "/livez", listeners=[listening])

        answers: list[int] = []
        done = threading.Event()
        server = start()
        try:
            server.wait_ready()

            def ask() -> None:
                while not done.is_set():
                    with request(port, "/livez", timeout=30) as response:
                        answers.append(response.status)

            threads = [threading.Thread(target=ask) for _ in range(4)]
            with open_stream(port, "orders", path="/") as stream:
                for thread in threads:
                    thread.start()
                eventually(lambda: len(answers) > 20)
                server.terminate()
                assert stream.event().json == {"reason": "shutdown"}
            server.process.wait(10)
            before = len(answers)
            waiting = request_in_thread(port)  # nothing listens but the socket
            server = start()
            assert waiting() == 200
            eventually(lambda: len(answers) > before + 20)
            done.set()
            for thread in threads:
                thread.join()
            assert set(answers) == {200}
        finally:
            done.set()
            server.kill()


def request_in_thread(port: int) -> Callable[[], int]:
    found: list[int] = []

    def ask() -> None:
        with request(port, "/livez", timeout=30) as response:
            found.append(response.status)

    thread = threading.Thread(target=ask)
    thread.start()

    def wait() -> int:
        thread.join()
        return found[0]

    return wait
