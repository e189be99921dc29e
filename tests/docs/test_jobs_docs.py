"""docs/jobs.md is right: its jobs, script and shell send to streams of a web server, and no job is too fast."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flask_pg_sse import schema_sql
from tests.support.client import eventually, open_stream, request
from tests.support.documents import ROOT, Document
from tests.support.log import logged, run
from tests.support.postgres import connect, execute
from tests.support.redis import RedisServer
from tests.support.servers import WebServer, gunicorn

PAGE = Document("docs/jobs.md")
Start = Callable[..., WebServer]
PING = """
app.get("/ping")(lambda: "pong")
"""


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_jobs_docs.py")
    PAGE.assert_links_lead_somewhere()


class Shop:
    """One of the page's apps under gunicorn, and its workers: processes in the same folder and environment."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.environment = {
            "PYTHONPATH": f"{ROOT}:{folder}",
            "FLASK_SSE_DATABASE_URL": database_url,
            "FLASK_SECRET_KEY": "secret",
            "DATABASE_URL": database_url,
            "SECRET_KEY": "secret",
        }

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a program to its end; return what it wrote."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextlib.contextmanager
    def running(self, command: Sequence[str], ready: str) -> Iterator[None]:
        """Run a worker for a block, which begins when the worker has written `ready`."""
        log = self.folder / "worker.log"
        with log.open("w") as output:
            worker = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=output,
            )
        try:
            eventually(lambda: ready in log.read_text() or worker.poll() is not None, 60, "the worker is ready")
            assert worker.poll() is None, log.read_text()
            yield
        finally:
            worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(20)
            worker.kill()
            worker.wait()


@pytest.fixture
def shop(database_url: str, tmp_path: Path, redis_server: RedisServer) -> Iterator[Shop]:
    execute(database_url, schema_sql())
    for name, code in (("shop.py", example("shop.py")), ("shop_rq.py", example("shop_rq.py"))):
        assert "redis://localhost/0" in code
        (tmp_path / name).write_text(code.replace("redis://localhost/0", redis_server.url) + PING)
    redis_server.ask("FLUSHALL")
    yield Shop(tmp_path, database_url)


def start(shop: Shop, start_server: Start, app: str = "shop:app") -> WebServer:
    return start_server(
        "",
        command=lambda port: gunicorn(app, port, "--pythonpath", str(shop.folder)),
        **shop.environment,
    )


def report(server: WebServer) -> str:
    """Start a job in a page; return the URL of the page's stream."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with request(server.port, "/reports", method="POST", headers=headers, body=b"title=May") as response:
        assert response.status == 200, server.log()
        url: str = json.loads(response.read())["live"]
        return url


def percents(server: WebServer, url: str) -> list[int]:
    with request(server.port, url) as stream:
        assert stream.next().event == "sse-open"
        return [stream.event().json["percent"] for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_celery_job_that_is_faster_than_its_page(shop: Shop, start_server: Start, pool: str) -> None:
    server = start(shop, start_server)
    worker = ["-m", "celery", "-A", "shop:celery", "worker", "--pool", pool, "--concurrency", "2", "--loglevel", "INFO"]
    with shop.running(worker, " ready."):
        urls = [report(server) for _ in range(3)]
        eventually(lambda: len(logged(shop.database_url)) == 9, 60, "the jobs have ended")
        for url in urls:
            assert percents(server, url) == [0, 50, 100]


@pytest.mark.slow
def test_an_rq_job_that_is_faster_than_its_page(shop: Shop, start_server: Start) -> None:
    server = start(shop, start_server, "shop_rq:app")
    urls = [report(server) for _ in range(2)]
    redis = re.search(r'from_url\("(.*)"\)', (shop.folder / "shop_rq.py").read_text())
    assert redis is not None
    shop.run("-m", "rq.cli", "worker", "--burst", "--url", redis[1])
    for url in urls:
        assert percents(server, url) == [0, 50, 100]


def test_a_script_and_the_shell(shop: Shop, start_server: Start) -> None:
    server = start_server(shop.database_url)
    with open_stream(server.port, "orders") as stream:
        (shop.folder / "script.py").write_text(example("script.py"))
        shop.run("script.py")
        event = stream.event()
        assert (event.event, event.json) == ("created", {"id": 7})
        shop.run(
            "-m", "flask", "--app", "shop", "shell", stdin='from flask_pg_sse import notify; notify("orders", 8)\n'
        )
        assert stream.event().json == 8


@pytest.mark.slow
def test_psycopg2_waits_for_no_other_request(shop: Shop, start_server: Start) -> None:
    """Under --preload, with the page's gunicorn.conf.py: a query that waits stops no other request."""
    (shop.folder / "gunicorn.conf.py").write_text(example("gunicorn.conf.py"))
    (shop.folder / "waits.py").write_text(
        "import os, psycopg2\n"
        "from shop import app\n\n"
        '@app.get("/wait")\n'
        "def wait():\n"
        '    connection = psycopg2.connect(os.environ["DATABASE_URL"])\n'
        '    connection.cursor().execute("SELECT pg_advisory_lock(7)")\n'
        "    connection.close()\n"
        '    return "waited"\n'
    )
    config = str(shop.folder / "gunicorn.conf.py")
    server = start_server(
        "",
        command=lambda port: [
            *[sys.executable, "-m", "gunicorn", "-k", "gevent", "--preload", "-b", f"127.0.0.1:{port}", "-c", config],
            *["--pythonpath", str(shop.folder), "waits:app"],
        ],
        **shop.environment,
    )
    query = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with contextlib.closing(connect(shop.database_url)) as connection, ThreadPoolExecutor() as pool:
        run(connection, "SELECT pg_advisory_lock(7)")
        waiting = pool.submit(server.get, "/wait")
        eventually(lambda: execute(shop.database_url, query), 10, "the view waits for the lock")
        assert server.get("/ping") == "pong"
        run(connection, "SELECT pg_advisory_unlock(7)")
        assert waiting.result() == "waited"
