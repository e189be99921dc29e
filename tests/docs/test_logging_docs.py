"""docs/logging.md is right: what gunicorn's log has without any configuration, and with the page's."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import eventually, request
from tests.support.documents import Document
from tests.support.servers import WebServer, free_port

PAGE = Document("docs/logging.md")
Start = Callable[..., WebServer]


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_logging_docs.py")
    PAGE.assert_links_lead_somewhere()


APP = """
from flask import Flask
from flask_pg_sse import sse_bp

app = Flask(__name__)
app.config["SSE_CHANNELS"] = ["*"]
app.register_blueprint(sse_bp)
app.get("/ping")(lambda: "pong")
"""


def log_of_an_outage(start_server: Start, folder: Path, *options: str) -> list[str]:
    """Open a stream on an app whose database is away, and return the lines of the package."""
    (folder / "plain.py").write_text(APP)
    url = f"postgresql://localhost:{free_port()}/shop"

    def command(port: int) -> list[str]:
        server = [sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", "4", "-b", f"127.0.0.1:{port}"]
        return [*server, *options, "--pythonpath", str(folder), "plain:app"]

    server = start_server(url, command=command, ready="/ping")
    with request(server.port, "/sse?channel=orders", timeout=30):
        eventually(lambda: "Next attempt" in server.log(), 20, "the outage is logged")
    return [line for line in server.log().splitlines() if "flask_pg_sse" in line or "Is the server running" in line]


def test_gunicorn_without_configuration(start_server: Start, tmp_path: Path) -> None:
    lines = log_of_an_outage(start_server, tmp_path)
    assert lines
    for line in lines:
        assert re.match(r"\[[\d-]+ [\d:]+ [+-]\d{4}\] \[\d+\] \[(WARNING|ERROR)\] flask_pg_sse\.[\w.]+: ", line), line
    [away] = [line for line in lines if "Next attempt" in line]
    assert re.search(
        r": Connection refused\. Is the server running on that host and accepting TCP/IP connections\? ", away
    ), away


@pytest.mark.parametrize("option", ["-c", pytest.param("--log-config-json", marks=pytest.mark.slow)])
def test_gunicorn_with_the_configuration_of_the_page(start_server: Start, tmp_path: Path, option: str) -> None:
    config = example("gunicorn.conf.py")
    if option == "--log-config-json":
        names: dict[str, object] = {}
        exec(config, names)
        config = json.dumps(names["logconfig_dict"])
    (tmp_path / "config.py").write_text(config)
    lines = log_of_an_outage(start_server, tmp_path, option, str(tmp_path / "config.py"))
    for line in lines:
        assert re.match(r"[\d-]+ [\d:,]+ \d+ (INFO|WARNING|ERROR) flask_pg_sse\.[\w.]+: ", line), line
    assert len([line for line in lines if " INFO " in line and "Using PostgreSQL at localhost" in line]) == 1
    assert len([line for line in lines if "Next attempt" in line]) >= 1
