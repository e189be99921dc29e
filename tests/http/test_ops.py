"""`ops_bp`: the metrics of all workers, read by prometheus_client and by Prometheus, and what load balancers ask."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from flask import Flask
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from flask_pg_sse import ops_bp, stats
from flask_pg_sse.web.metrics import GAUGES
from tests.support.client import eventually, open_stream, request
from tests.support.processes import children, state_of
from tests.support.servers import WebServer, free_port
from tools import postgres

Start = Callable[..., WebServer]
NOBODY_THERE = "postgresql://127.0.0.1:1/nothing_listens_there"
TOKEN = "a token of the operators"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
APP = "tests.support.apps.operated:app"
NOT_ANSWERING = "flask_pg_sse_workers_not_answering"


def scrape(server: WebServer) -> dict[str, float]:
    """Return the samples of the metrics by name and label."""
    with request(server.port, "/metrics", headers=BEARER, timeout=10) as response:
        text = response.read().decode()
        assert (response.status, response.headers["content-type"].partition(";")[0]) == (200, "text/plain"), (
            text + server.log()
        )
    samples = [sample for family in parse(text) for sample in family.samples]
    return {sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value for sample in samples}


def status(server: WebServer, path: str, **headers: str) -> int:
    with request(server.port, path, headers=headers, timeout=10) as response:
        response.read()
        return response.status


@pytest.fixture
def operated(make_app: Callable[..., Flask]) -> Callable[..., Flask]:
    def make(url: str | None = None, authorize: Any = None, **config: Any) -> Flask:
        app = make_app(url, **config)
        app.register_blueprint(ops_bp, authorize=authorize)
        return app

    return make


def test_the_metrics_are_closed_until_a_token_or_a_function_opens_them(
    operated: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    closed = operated(NOBODY_THERE).test_client()
    for headers in ({}, BEARER, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
        answer = closed.get("/metrics", headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.text == "Not authorized.\n"
    assert caplog.text.count("set SSE_OPS_TOKEN") == 1
    blank = operated(NOBODY_THERE, SSE_OPS_TOKEN=" \n").test_client()
    assert blank.get("/metrics", headers={"Authorization": "Bearer "}).status_code == 401
    for token in (TOKEN, TOKEN.encode(), f"{TOKEN}\n"):  # the last one as it is read from a file
        client = operated(NOBODY_THERE, SSE_OPS_TOKEN=token).test_client()
        assert client.get("/metrics", headers=BEARER).status_code == 200
        assert client.get("/metrics", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        for wrong in ("", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \u00e4", TOKEN):
            assert client.get("/metrics", headers={"Authorization": wrong}).status_code == 401, wrong
        assert client.get(f"/metrics?{urlencode({'token': TOKEN})}").status_code == 401


@pytest.mark.parametrize(("answer", "code"), [(True, 200), (False, 401), (None, 401), ("yes", 401)])
def test_only_true_opens_them(operated: Callable[..., Flask], answer: object, code: int) -> None:
    client = operated(NOBODY_THERE, authorize=lambda: answer).test_client()
    assert client.get("/metrics").status_code == code


def test_a_wrong_option_is_refused(make_app: Callable[..., Flask]) -> None:
    with pytest.raises(TypeError, match="unknown options: autorize"):
        make_app().register_blueprint(ops_bp, autorize=lambda: True)
    with pytest.raises(TypeError, match="authorize must be a function"):
        make_app().register_blueprint(ops_bp, authorize="yes")


def test_without_prometheus_client_it_says_what_to_install(
    operated: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    client = operated(NOBODY_THERE, SSE_OPS_TOKEN=TOKEN).test_client()
    said = "The metrics need prometheus_client: pip install 'flask-pg-sse[metrics]'."
    for _ in range(3):
        answer = client.get("/metrics", headers=BEARER)
        assert (answer.status_code, answer.text) == (500, f"{said}\n")
    assert [(record.levelname, record.message) for record in caplog.records] == [("ERROR", said)]


def test_the_names_are_those_of_the_table_and_labels_do_not_grow(operated: Callable[..., Flask]) -> None:
    app = operated(None, SSE_BROKER_URL="memory://", SSE_OPS_TOKEN=TOKEN, SSE_CHANNELS=["open-*"])
    client = app.test_client()
    wanted = {name for counter in stats.COUNTERS for name in [counter.name.removesuffix("_total")]}
    wanted |= {f"flask_pg_sse_{name}" for name in GAUGES}
    counts = []
    for number in range(3):
        client.get(f"/sse/closed-{number}", headers={"X-Forwarded-For": f"10.0.0.{number}"})
        families = list(parse(client.get("/metrics", headers=BEARER).text))
        assert {family.name for family in families} == wanted
        assert all(family.documentation for family in families)
        counts.append(sum(len(family.samples) for family in families))
        refused = {s.labels["kind"]: s.value for f in families for s in f.samples if "refused" in s.name}
        assert refused["closed"] == number + 1
    assert len(set(counts)) == 1 and counts[0] < 100
    answer = client.get("/metrics", headers={**BEARER, "Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.mimetype == "application/openmetrics-text"
    families_of: Any = openmetrics.text_string_to_metric_families
    assert {family.name for family in families_of(answer.text)} == wanted


def test_one_scrape_has_all_workers_and_counters_do_not_fall(database_url: str, start_server: Start) -> None:
    """Also while a worker is stopped, and after it was killed."""
    server = start_server(database_url, "-w", "2", app=APP, FLASK_SSE_OPS_TOKEN=TOKEN)
    eventually(lambda: scrape(server)["flask_pg_sse_workers"] == 2, 30)
    streams = [open_stream(server.port, "orders") for _ in range(12)]
    server.post("/notify/orders", b'{"data": "x"}')
    for stream in streams:
        assert stream.event().data == "x"
    before = eventually(lambda: (found := scrape(server)) and not found[NOT_ANSWERING] and found, 30)
    assert before["flask_pg_sse_streams"] == before["flask_pg_sse_streams_opened_total"] == 12
    assert before["flask_pg_sse_delivered_events_total"] == 12
    assert before["flask_pg_sse_delivered_bytes_total"] == 12 * len("data: x\n\n")
    assert before["flask_pg_sse_notify_calls_total"] == 1
    assert 0 < before["flask_pg_sse_listener_lag_seconds"] < 5
    victim, other = sorted(children(server.process.pid))
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: state_of(victim) == "T")
    began = time.monotonic()
    stopped = scrape_of(server)
    assert time.monotonic() - began < 5
    assert (stopped["flask_pg_sse_workers"], stopped[NOT_ANSWERING]) == (1, 1)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: victim not in children(server.process.pid))
    # The one that comes in its place may take longer than 0.7 s to answer.
    killed = eventually(lambda: (found := scrape_of(server)) and not found[NOT_ANSWERING] and found, 30)
    for name, value in before.items():
        if name.partition(" ")[0].endswith("_total"):
            assert value <= stopped[name] <= killed[name], name
    assert killed["flask_pg_sse_delivered_events_total"] == 12
    for stream in streams:
        stream.close()
    assert other


def scrape_of(server: WebServer) -> dict[str, float]:
    """Scrape while one of the workers does not accept: connections that it gets are not answered."""
    for _ in range(20):
        with contextlib.suppress(TimeoutError, ConnectionError):
            return scrape(server)
    raise AssertionError("no worker answers")


def test_ready_is_when_listen_is_confirmed_and_not_while_postgres_is_away(
    own_postgres: postgres.Server, start_server: Start
) -> None:
    server = start_server(own_postgres.url(), app=APP)
    assert '"streams":0' in server.get("/state").replace(" ", "")
    assert status(server, "/livez") == 200
    began = time.monotonic()
    first = status(server, "/readyz")  # it starts to listen for this, and waits a second for the answer
    assert first == 200 or time.monotonic() - began > 1
    eventually(lambda: status(server, "/readyz") == 200)
    assert json.loads(server.get("/state"))["listened"] == []
    own_postgres.stop()
    eventually(lambda: status(server, "/readyz") == 503, 20)
    with request(server.port, "/readyz") as response:
        assert response.read() == b"not ready\n"
        assert response.headers["cache-control"] == "no-store"
    assert status(server, "/livez") == 200
    own_postgres.start()
    eventually(lambda: status(server, "/readyz") == 200, 20)


def test_not_ready_while_the_worker_ends(database_url: str, start_server: Start) -> None:
    """A request that is under way holds the worker, which still answers on a connection that is open."""
    server = start_server(database_url, "--keep-alive", "30", app="tests.support.apps.draining:app")
    eventually(lambda: status(server, "/readyz") == 200)
    with request(server.port, "/signal-then-ready", timeout=20) as response:
        assert response.read() == b"503"


def test_without_a_database_it_is_not_ready(operated: Callable[..., Flask]) -> None:
    client = operated("sqlite:///x").test_client()
    assert [client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 503]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Start Debian's Prometheus, which scrapes a port of this host each second; returns its URL's port."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no Prometheus here: apt-get install prometheus")
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> str:
        own = free_port()
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {
                    "job_name": "app",
                    "authorization": {"credentials": TOKEN},
                    "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
                }
            ],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        command = [
            program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{own}",
        ]  # fmt: skip
        with (tmp_path / "prometheus.log").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        return str(own)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_prometheus_itself_reads_them(database_url: str, start_server: Start, prometheus: Callable[[int], str]) -> None:
    server = start_server(database_url, "-w", "2", app=APP, FLASK_SSE_OPS_TOKEN=TOKEN)
    port = int(prometheus(server.port))

    def ask(query: str) -> float | None:
        try:
            with request(port, f"/api/v1/query?{urlencode({'query': query})}") as response:
                return float(json.loads(response.read())["data"]["result"][0]["value"][1])
        except (OSError, ValueError, IndexError):  # it starts, or has not scraped yet
            return None

    eventually(lambda: ask('up{job="app"}') == 1, 60)
    with open_stream(server.port, "orders"):
        eventually(lambda: ask("flask_pg_sse_streams") == 1, 60)
    eventually(lambda: ask('flask_pg_sse_streams_ended_total{reason="client"}') == 1, 60)
