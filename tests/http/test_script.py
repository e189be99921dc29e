"""PgSSE in a script without any Flask app: it sends, signs URLs for the app's streams, and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from flask_pg_sse import ConfigurationError, PgSSE
from tests.support.client import opened, request
from tests.support.documents import Document
from tests.support.servers import ROOT, WebServer

SCRIPT = Document("docs/without-flask.md").example("script")


def test_the_script_of_the_docs_signs_sends_and_ends(logged_url: str, start_server: Callable[..., WebServer]) -> None:
    server = start_server(logged_url, FLASK_SSE_CHANNELS="[]", FLASK_SECRET_KEY="the app's key")
    env = {
        "DATABASE_URL": logged_url,
        "SECRET_KEY": "the app's key",
        "SSE_SERVER_URL": f"http://127.0.0.1:{server.port}/sse",
    }

    def run(code: str) -> str:
        command = [sys.executable, "-W", "error", "-c", code]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    *making, sending, ending = SCRIPT.split("\n\n")
    url = urlsplit(run("\n".join([*making, sending])))
    assert url.netloc == f"127.0.0.1:{server.port}"
    with opened(lambda: request(server.port, f"{url.path}?{url.query}")) as stream:
        assert stream.next().json == {"done": 100}  # after the cursor
        run("\n".join([*making, ending]))
        assert stream.next().json == {"reason": "revoked"}


def test_without_a_key_it_signs_nothing() -> None:
    sse = PgSSE(database_url="postgresql://127.0.0.1/x")
    with pytest.raises(ConfigurationError, match=r"web app's key: PgSSE\(secret_key=…\), or SSE_SECRET_KEY"):
        sse.sse_url("orders", sign=True)
