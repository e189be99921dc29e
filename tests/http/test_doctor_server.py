"""`flask sse doctor` and gunicorn: what is wrong with the one that runs, or that is configured, is found and cured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.test_readme import example
from tests.support.client import eventually, open_stream
from tests.support.doctor import Answer, doctor_command, found
from tests.support.postgres import execute
from tests.support.processes import children
from tests.support.redis import RedisServer
from tests.support.servers import ROOT, WebServer, free_port

StartServer = Callable[..., WebServer]
APP = """
import os
from flask import Flask
from flask_pg_sse import sse_bp

app = Flask(__name__)
app.config.update(SECRET_KEY="s3cret-key", SSE_CHANNELS=["orders"], SSE_DATABASE_URL=os.environ["DATABASE_URL"])
app.config.from_prefixed_env()
app.register_blueprint(sse_bp)


@app.get("/ping")
def ping():
    return "pong"
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The directory of an app."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "app.py").write_text(APP)
    return folder


def ask(site: Path, url: str, **environ: str) -> Answer:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GUNICORN")}
    return doctor_command(site, {**kept, "DATABASE_URL": url, **environ})


def run(start: StartServer, site: Path, url: str, *options: str, shell: str = "", **environ: str) -> WebServer:
    """Run gunicorn in the app's directory, as the README has it."""

    def command(port: int) -> list[str]:
        line = [sys.executable, "-m", "gunicorn", "--no-control-socket", "-b", f"127.0.0.1:{port}", *options, "app:app"]
        return ["sh", "-c", f'{shell}; exec "$@"', "sh", *line] if shell else line

    return start(url, command=command, cwd=site, **environ)


def test_the_readmes_own_setup_with_the_log_and_a_key_gives_no_warning(
    logged_url: str, start_server: StartServer, site: Path
) -> None:
    source = example("app.py").replace("postgresql://postgres@localhost/postgres", logged_url)
    (site / "app.py").write_text(
        f'{source}\napp.config["SECRET_KEY"] = "s3cret-key"\napp.get("/ping")(lambda: "pong")\n'
    )
    server = run(start_server, site, logged_url, "-k", "gevent", "--workers", "2", "--worker-connections", "2000")
    with open_stream(server.port, "orders"):
        answer = ask(site, logged_url)
        assert answer.status == 0, answer.output
        found(answer, "web server", "ok", f"gunicorn {server.process.pid}: 2 x gevent")
        found(answer, "connections", "ok", "2000 connections")
        found(answer, "listeners", "ok", "Listeners, of all hosts: 1.")


@pytest.mark.slow
def test_a_sync_worker_that_runs(logged_url: str, start_server: StartServer, site: Path) -> None:
    server = run(start_server, site, logged_url)
    line = found(ask(site, logged_url), "worker class", "fault", f"gunicorn {server.process.pid}", "sync worker")
    assert "gunicorn -k gevent" in line["remedy"]
    server.stop()
    run(start_server, site, logged_url, "-k", "gevent")
    assert ask(site, logged_url).status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "conf", "name", "words"),
    [
        ("-k sync", "", "worker class", "GUNICORN_CMD_ARGS: Streams cannot be served by gunicorn's sync worker"),
        ("", "workers = 2", "worker class", "gunicorn.conf.py: Streams cannot be served by gunicorn's sync worker"),
        ("-k gthread --threads 1", "", "worker class", "gthread worker with one thread"),
        ("-k gevent", "http_protocols = 'h2,h1'", "http/2", "gunicorn's own HTTP/2"),
    ],
)
def test_a_gunicorn_that_is_configured(
    site: Path, logged_url: str, arguments: str, conf: str, name: str, words: str
) -> None:
    if conf:
        (site / "gunicorn.conf.py").write_text(conf)
    assert found(ask(site, logged_url, GUNICORN_CMD_ARGS=arguments), name, "fault", words)["remedy"]
    (site / "gunicorn.conf.py").write_text("worker_class = 'gevent'")
    assert ask(site, logged_url).status == 0


@pytest.mark.slow
def test_a_configuration_that_gunicorn_cannot_read(site: Path, logged_url: str) -> None:
    (site / "gunicorn.conf.py").write_text("worker_class =")
    line = found(ask(site, logged_url), "web server", "warning", "gunicorn.conf.py: gunicorn cannot read")
    assert "gunicorn --print-config" in line["remedy"]
    (site / "gunicorn.conf.py").write_text("worker_class = 'gevent'")
    assert ask(site, logged_url).status == 0


@pytest.mark.slow
def test_a_gunicorn_that_hides_its_arguments(site: Path, logged_url: str) -> None:
    """As with setproctitle, which gunicorn uses where it is installed. They may overrule the file that is there."""
    (site / "gunicorn.conf.py").write_text("worker_class = 'sync'")
    command = ["bash", "-c", "exec -a 'gunicorn: master [app:app]' sleep 60"]
    with subprocess.Popen(command, cwd=site) as arbiter:
        try:
            title = Path(f"/proc/{arbiter.pid}/cmdline")
            eventually(lambda: title.read_text().startswith("gunicorn: "))
            answer = ask(site, logged_url)
        finally:
            arbiter.kill()
    found(answer, "web server", "ok", f"gunicorn {arbiter.pid} runs here", "setproctitle")
    assert answer.status == 0 and len(answer.of("web server")) == 1


@pytest.mark.slow
def test_few_open_files(logged_url: str, start_server: StartServer, site: Path) -> None:
    options = ("-k", "gevent", "--worker-connections", "1000")
    server = run(start_server, site, logged_url, *options, shell="ulimit -n 400")
    line = found(ask(site, logged_url), "open files", "warning", "400 files open", "needs about 1064")
    assert "ulimit -n to 4096" in line["remedy"] and "LimitNOFILE=" in line["remedy"]
    server.stop()
    run(start_server, site, logged_url, *options, shell="ulimit -n 4096")
    assert ask(site, logged_url).status == 0


@pytest.mark.slow
def test_more_streams_than_connections(site: Path, logged_url: str) -> None:
    environ = {"FLASK_SSE_MAX_STREAMS": "900"}
    answer = ask(site, logged_url, GUNICORN_CMD_ARGS="-k gevent --worker-connections 800", **environ)
    line = found(answer, "connections", "warning", "SSE_MAX_STREAMS is 900", "holds 800 connections")
    assert line["remedy"].startswith("Raise --worker-connections")
    assert ask(site, logged_url, GUNICORN_CMD_ARGS="-k gevent --worker-connections 1000", **environ).status == 0


@pytest.mark.slow
def test_psycopg2_under_gevent(site: Path, logged_url: str) -> None:
    environ = {
        "GUNICORN_CMD_ARGS": "-k gevent",
        "FLASK_SQLALCHEMY_DATABASE_URI": logged_url.replace("://", "+psycopg2://"),
    }
    for imported in (APP, f"import sqlalchemy{APP}"):  # also by an app that imports it at its first request
        (site / "app.py").write_text(imported)
        line = found(ask(site, logged_url, **environ), "database driver", "warning", "uses psycopg2")
        assert "postgresql+psycopg://" in line["remedy"] and "psycogreen" in line["remedy"]
    patch = "def post_fork(server, worker):\n    from psycogreen.gevent import patch_psycopg\n    patch_psycopg()\n"
    (site / "gunicorn.conf.py").write_text(patch)
    assert ask(site, logged_url, **environ).status == 0
    (site / "gunicorn.conf.py").unlink()
    environ["FLASK_SQLALCHEMY_DATABASE_URI"] = logged_url.replace("://", "+psycopg://")
    assert ask(site, logged_url, **environ).status == 0


@pytest.mark.slow
def test_a_worker_and_listener_that_are_deaf(logged_url: str, start_server: StartServer, site: Path) -> None:
    """The worker is stopped."""
    options = ("-k", "gevent", "--timeout", "300")
    server = run(start_server, site, logged_url, *options, FLASK_SSE_HEARTBEAT="0.5")
    with open_stream(server.port, "orders"):
        [pid] = children(server.process.pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            line = found(ask(site, logged_url), "workers", "fault", f"1 of 1 workers of this host do not answer: {pid}")
            assert "kill -CONT" in line["remedy"]
            eventually(lambda: ask(site, logged_url).of("listeners")[0]["state"] == "fault", 60)
            line = found(ask(site, logged_url), "listeners", "fault", "1 of 1 listeners are deaf")
            assert "restart that worker" in line["remedy"]
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: ask(site, logged_url).status == 0, 30)
    server.stop()


@pytest.mark.slow
def test_events_for_a_channel_in_another_case(logged_url: str, start_server: StartServer, site: Path) -> None:
    environ = {"FLASK_SSE_CHANNELS": "stock"}
    server = run(start_server, site, logged_url, "-k", "gevent", **environ)
    with open_stream(server.port, "stock") as stream:
        execute(logged_url, "SELECT flask_pg_sse.notify('Stock', '7')")
        answer = ask(site, logged_url, **environ)
        found(answer, "workers", "ok", "Workers of this host: 1. Streams: 1.")
        line = found(answer, "channel names", "warning", "sent to channel 'Stock'", "streams listen to 'stock'")
        assert line["remedy"].startswith("Send to 'stock'")
        execute(logged_url, "SELECT flask_pg_sse.notify('stock', '8')")
        assert next(one for one in iter(stream.event, None) if one.event == "message").data == "8"
        assert ask(site, logged_url, **environ).status == 0
    server.stop()


@pytest.mark.slow
def test_redis_is_lossy_and_one_that_is_away(redis_server: RedisServer, site: Path) -> None:
    environ = {**os.environ, "REDIS_URL": redis_server.url, "SSE_CHANNELS": "orders", "SSE_SECRET_KEY": "s3cret-key"}
    environ["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "flask_pg_sse.cli.main", "doctor", "--json"]
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True)
    [line] = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "broker"]
    assert (done.returncode, line["state"]) == (1, "warning") and "keeps nothing" in line["text"], done.stdout
    environ["REDIS_URL"] = f"redis://:hush-hush@127.0.0.1:{free_port()}"
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True)
    [line] = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "broker"]
    assert (done.returncode, line["state"]) == (2, "fault") and "cannot be reached" in line["text"], done.stdout
    assert "hush-hush" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_without_an_app(site: Path, logged_url: str) -> None:
    environ = {**os.environ, "DATABASE_URL": logged_url, "SSE_CHANNELS": "orders", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flask_pg_sse.cli.main", "doctor", "--json"]
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True)
    lines = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1 and lines["secret key"]["state"] == "warning", done.stdout
    assert lines["secret key"]["remedy"].startswith("Set SSE_SECRET_KEY"), "SECRET_KEY is not read here"
    execute(logged_url, "DROP SCHEMA flask_pg_sse CASCADE")
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True)
    lines = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
    assert lines["event log"]["remedy"].startswith("Run flask-pg-sse init."), "the commands have this script's name"
