"""docs/redis.md: its examples bring an event from redis-cli to curl, and its URLs are read."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flask_pg_sse.engine.broker import to_broker
from tests.support.client import eventually
from tests.support.documents import Document
from tests.support.redis import RedisServer
from tests.support.servers import WebServer

PAGE = Document("docs/redis.md")


def test_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_redis_docs.py")
    PAGE.assert_links_lead_somewhere()


def test_the_urls() -> None:
    urls = re.findall(r"`((?:redis|rediss|valkey|unix)://[^`]+)`", PAGE.text.split("## The URL")[1])
    assert len(urls) >= 6
    for url in urls:
        to_broker(url, "REDIS_URL")


def test_from_redis_cli_to_curl(
    redis_server: RedisServer, start_server: Callable[..., WebServer], tmp_path: Path
) -> None:
    """The commands as they stand there, but for the ports and `pip install`."""
    setting, *command = PAGE.example("start").splitlines()[1].split()
    assert command == ["flask-pg-sse", "serve"] and setting.startswith("REDIS_URL=")
    serve = [sys.executable, "-m", "flask_pg_sse.cli.main", "serve", "--port"]
    own = ["--", "-c", "python:tests.support.apps.gunicorn_conf"]
    server = start_server(
        "", command=lambda port: [*serve, str(port), *own], ready="/livez", REDIS_URL=redis_server.url
    )
    curl = shlex.split(PAGE.example("listen").replace("8001", str(server.port)))
    with (tmp_path / "curl").open("wb") as output:
        listening = subprocess.Popen(
            [shutil.which(curl[0]) or pytest.skip("curl is not installed"), "-s", *curl[1:]], stdout=output
        )
    try:
        eventually(lambda: b"sse-open" in (tmp_path / "curl").read_bytes(), 20)
        publish, notify = PAGE.example("publish").splitlines()
        name, *words = shlex.split(publish)
        subprocess.run([name, "-p", str(redis_server.port), *words], check=True)
        _, name, *words = shlex.split(notify)
        subprocess.run(
            [sys.executable, "-m", "flask_pg_sse.cli.main", *words], check=True, env={"REDIS_URL": redis_server.url}
        )
        wanted = b'data: hello\n\nevent: created\ndata: {"id": 7}\n\n'
        eventually(lambda: (tmp_path / "curl").read_bytes().replace(b": heartbeat\n", b"").endswith(wanted))
    finally:
        listening.kill()
        listening.wait()
