"""Streams in processes that others have changed: their signals, tracers, limits, time-outs and environment."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.support.client import open_stream
from tests.support.postgres import execute
from tests.support.publishers import install_log
from tests.support.servers import WebServer
from tests.support.slow import but_one_slow
from tests.support.surroundings import AFTER, BEFORE

Start = Callable[..., WebServer]

ENVIRONMENTS = {
    "development mode": {"PYTHONDEVMODE": "1"},
    "without docstrings and asserts": {"PYTHONOPTIMIZE": "2"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"},
    "warnings are errors": {"PYTHONWARNINGS": "error"},
    "memory debugged": {"PYTHONMALLOC": "debug"},
    "no home": {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"},
}
GTHREAD = ("-k", "gthread", "--threads", "8")


@pytest.mark.parametrize("options", [(), pytest.param(GTHREAD, marks=pytest.mark.slow)], ids=["gevent", "gthread"])
@pytest.mark.parametrize("what", but_one_slow([*BEFORE, *AFTER, *ENVIRONMENTS]))
def test_events_arrive_and_nothing_is_said(
    database_url: str, start_server: Start, what: str, options: tuple[str, ...]
) -> None:
    install_log(database_url)
    env = {"SURROUNDINGS": what, "FLASK_SSE_HEARTBEAT": "1", **ENVIRONMENTS.get(what, {})}
    server = start_server(database_url, *options, app="tests.support.apps.surroundings:app", **env)
    with open_stream(server.port, "orders", "größe") as stream:
        for number in range(5):
            server.post("/notify/orders", json.dumps({"data": {"n": number}}).encode())
            assert stream.event().data == f'{{"n": {number}}}'
        execute(database_url, "SELECT flask_pg_sse.notify('größe', 'ä', event => 'created')")
        event = stream.event()
        assert (event.event, event.data) == ("created", "ä")
        execute(
            database_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        server.post("/notify/orders", b'{"data": "since then"}')
        assert stream.event().data == "since then"
    assert "Traceback" not in server.log() and "Warning" not in server.log()
