"""docs/without-flask.md is right: from nothing to an event, and the examples that send from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.support.client import Response, open_stream, request
from tests.support.django_site import as_django_has_it, django_site, in_django
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.relay import ours
from tests.support.servers import WebServer, gunicorn
from tools import postgres

PAGE = Document("docs/without-flask.md")
Start = Callable[..., WebServer]


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_without_flask.py", "http/test_script.py")
    PAGE.assert_links_lead_somewhere()


@pytest.fixture
def server(database_url: str, start_server: Start) -> WebServer:
    return start_server(database_url, command=ours, ready="/livez")


@pytest.fixture
def stream(server: WebServer) -> Iterator[Response]:
    with open_stream(server.port, "orders", path="/") as response:
        yield response


def shell(script: str, database_url: str, *arguments: str, **env: str) -> str:
    path = f"{postgres.binaries()}:{os.environ['PATH']}"  # PostgreSQL's, for psql
    environ = {**os.environ, "DATABASE_URL": database_url, "PATH": path, **env}
    done = subprocess.run(["sh", "-e", "-c", script, "sh", *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def post(server: WebServer, path: str, form: dict[str, str] | None = None) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = urlencode(form or {}).encode()
    with request(server.port, path, method="POST", headers=headers, body=body) as response:
        assert response.status in (200, 201), (response.read(), server.log())


@pytest.mark.slow
def test_from_nothing(database_url: str, tmp_path: Path, start_server: Start) -> None:
    """In an environment of its own, with pip, the script that pip installs, psql and curl."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl: apt-get install curl")
    start = example("start").splitlines()
    assert [line.split("#")[0].strip() for line in start] == [
        "pip install .",
        "export DATABASE_URL=postgresql://postgres@localhost/postgres",
        "flask-pg-sse serve",
    ]
    # The packages that it needs come from the environment of the tests, so that this needs no network.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv").glob("lib/python3*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    source = tmp_path / "source"
    shutil.copytree(Path(__file__).parents[2], source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "."], cwd=source, check=True)
    script = str(tmp_path / "venv" / "bin" / "flask-pg-sse")

    def command(port: int) -> list[str]:
        return [script, "serve", "--port", str(port), "--", "--no-control-socket"]

    server = start_server(database_url, command=command, ready="/livez", cwd=tmp_path, PYTHONPATH="")
    line = example("curl").strip().replace("8001", str(server.port)).replace("'", "").split()
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        while curl.stdout.readline() != "event: sse-open\n":
            pass
        shell(example("psql"), database_url)
        while (found := curl.stdout.readline()) in ("data: {}\n", "\n", ": heartbeat\n"):
            pass
        assert found == "data: Two soups\n"
        curl.terminate()
    assert server.port and "EventSource" in example("page")


def test_from_a_shell_script(stream: Response, database_url: str) -> None:
    for text in ("Two soups", 'it\'s "two"; $(id) `id` \\', "Zoë\nand Tea"):
        shell(example("shell"), database_url, "orders", text)
        assert stream.event().data == text


@pytest.mark.slow
def test_from_django(stream: Response, database_url: str, start_server: Start, tmp_path: Path) -> None:
    django_site(tmp_path, example("django"))
    site = start_server(
        database_url, command=in_django(tmp_path), ready="/",
        DJANGO_DATABASE=json.dumps(as_django_has_it(database_url)), SSE_SERVER_URL="",
    )  # fmt: skip
    for number, dish in enumerate(("soup", "it's tea"), 1):
        post(site, "/orders", {"dish": dish})
        event = stream.event()
        assert (event.event, event.json) == ("created", {"id": number})


@pytest.mark.slow
def test_from_fastapi(stream: Response, database_url: str, start_server: Start, tmp_path: Path) -> None:
    (tmp_path / "fast_site.py").write_text(example("fastapi"))
    uvicorn = [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "fast_site:app", "--port"]
    site = start_server(database_url, command=lambda port: [*uvicorn, str(port)], ready="/docs")
    post(site, "/orders?dish=it%27s+tea")
    event = stream.event()
    assert (event.event, event.json) == ("created", {"dish": "it's tea"})


@pytest.mark.slow
def test_the_event_log(server: WebServer, database_url: str, tmp_path: Path) -> None:
    command = example("init").split()
    assert command[0] == "flask-pg-sse"
    line = [sys.executable, "-m", "flask_pg_sse.cli.main", *command[1:]]
    subprocess.run(line, env={**os.environ, "DATABASE_URL": database_url}, check=True)
    execute(database_url, "SELECT flask_pg_sse.notify('orders', 'Two soups')")
    with open_stream(server.port, "orders", path="/", headers={"Last-Event-ID": "0"}) as stream:
        assert stream.event().data == "Two soups"


@pytest.mark.slow
def test_an_authorizer(database_url: str, start_server: Start, tmp_path: Path) -> None:
    (tmp_path / "live.py").write_text(example("authorizer"))
    server = start_server(
        database_url, command=lambda port: gunicorn("live:app", port, "--pythonpath", str(tmp_path)), ready="/livez"
    )
    open_stream(server.port, "news", path="/").close()
    open_stream(server.port, "secret", path="/", headers={"Cookie": "member=yes"}).close()
    with request(server.port, "/secret") as response:
        assert response.status == 403
