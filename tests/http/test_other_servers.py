"""Servers whose threads cannot be counted: streams are refused in words there, unless `SSE_MAX_STREAMS` is set."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable

import pytest

from tests.support.client import open_stream, request
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
APP = "tests.support.apps.basic:app"

# What Python runs; {port} is the port.
SERVERS = {
    "waitress": f"-m waitress --listen=127.0.0.1:{{port}} {APP}",
    "cheroot": f"-m cheroot --bind 127.0.0.1:{{port}} {APP}",
    "granian": f"-m granian --interface wsgi --host 127.0.0.1 --port {{port}} --blocking-threads 4 {APP}",
    "hypercorn": f"-m hypercorn --bind 127.0.0.1:{{port}} wsgi:{APP}",
    "uvicorn": "-m uvicorn --host 127.0.0.1 --port {port} tests.support.apps.in_asgi:by_uvicorn",
    "a2wsgi": "-m uvicorn --host 127.0.0.1 --port {port} tests.support.apps.in_asgi:by_a2wsgi",
    "uWSGI": f"-c 'import pyuwsgi; pyuwsgi.run()' --http-socket 127.0.0.1:{{port}} --threads 4 --module {APP}",
}
UNCOUNTED = [
    pytest.param(name, marks=() if name == "waitress" else pytest.mark.slow) for name in SERVERS if name != "uWSGI"
]
ALL = [pytest.param(name, marks=() if name == "waitress" else pytest.mark.slow) for name in SERVERS]


def run(line: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, *shlex.split(line.format(port=port))]


def refused(server: WebServer) -> str:
    with request(server.port, "/sse?channel=orders") as response:
        text = response.read().decode()
    assert (response.status, response.headers["content-type"]) == (500, "text/plain; charset=utf-8")
    assert text.count("\n") == 1 and text.endswith("\n")
    return text


@pytest.mark.parametrize("name", UNCOUNTED)
def test_streams_are_refused_in_words_and_other_routes_are_answered(
    database_url: str, start_server: Start, name: str
) -> None:
    server = start_server(database_url, command=run(SERVERS[name]))
    for _ in range(12):  # more than any of these servers has threads
        text = refused(server)
        assert "gunicorn -k gevent" in text and "SSE_MAX_STREAMS" in text
    assert server.get("/ping") == "pong"
    server.post("/notify/orders", b'{"data": "x"}')
    assert server.log().count("Streams cannot be served by this server") == 1, "said once, then counted"


@pytest.mark.parametrize("name", ALL)
def test_with_a_limit_that_is_set_by_hand_streams_are_served_and_the_rest_of_the_app_too(
    database_url: str, start_server: Start, name: str
) -> None:
    server = start_server(database_url, command=run(SERVERS[name]), FLASK_SSE_MAX_STREAMS="2")
    with open_stream(server.port, "orders") as one, open_stream(server.port, "orders") as other:
        for _ in range(12):
            with request(server.port, "/sse?channel=orders") as third:
                assert third.next().json == {"reason": "capacity"}
        server.post("/notify/orders", b'{"data": "x"}')
        assert one.event().data == other.event().data == "x"


UWSGI = "-c 'import pyuwsgi; pyuwsgi.run()' --http-socket 127.0.0.1:{{port}} {options} --module {app}"


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--threads 1", "--enable-threads", "--processes 2", "--async 4", "--gevent 4"])
def test_uwsgi_refuses_streams_where_a_process_handles_one_request_at_a_time(
    database_url: str, start_server: Start, options: str
) -> None:
    """Whatever the limit, and whatever it says of itself."""
    app = "tests.support.apps.says_threads:app"
    command = run(UWSGI.format(options=options, app=app))
    server = start_server(database_url, command=command, FLASK_SSE_MAX_STREAMS="2")
    for _ in range(4):
        assert "one request at a time" in refused(server) and "--threads" in refused(server)
    server.post("/notify/orders", b'{"data": "x"}')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"),
    [("--threads 4", 3), ("--processes 2 --threads 2", 1), ("--gevent 10 --gevent-monkey-patch", 9)],
)
def test_uwsgi_says_how_many_streams_it_can_hold(
    database_url: str, start_server: Start, options: str, most: int
) -> None:
    server = start_server(database_url, command=run(UWSGI.format(options=options, app=APP)))
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(open_stream(server.port, "orders")) for _ in range(most)]
        if "--processes" not in options:  # of two, either may get a request
            for _ in range(3):
                with request(server.port, "/sse?channel=orders") as one_more:
                    assert one_more.event().json == {"reason": "capacity"}
        server.post("/notify/orders", b'{"data": "x"}')
        assert [stream.event().data for stream in streams] == ["x"] * most
        assert server.get("/ping") == "pong"
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_a_server_that_claims_threads_and_has_none_refuses_streams(database_url: str, start_server: Start) -> None:
    command = run("-m tests.support.apps.says_threads {port}")
    server = start_server(database_url, command=command, FLASK_SSE_MAX_STREAMS="2")
    for _ in range(3):
        assert "one request at a time" in refused(server)
    assert server.get("/ping") == "pong"


@pytest.mark.slow
def test_a_process_that_eventlet_has_patched_refuses_streams_in_words(database_url: str, start_server: Start) -> None:
    for limit in ({}, {"FLASK_SSE_MAX_STREAMS": "2"}):
        command = run("-m tests.support.apps.eventlet_server {port}")
        server = start_server(database_url, command=command, **limit)
        for _ in range(3):
            assert "eventlet" in refused(server)
        assert server.get("/ping") == "pong"
        assert server.log().count("Streams cannot be served in a process that eventlet has patched") == 1
        assert "Traceback" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize("late", ["", "1"])
def test_gthreads_threads_are_counted_also_where_the_app_has_its_own_sigterm_handler(
    database_url: str, start_server: Start, late: str
) -> None:
    options = ("-k", "gthread", "--threads", "4")
    server = start_server(database_url, *options, app="tests.support.apps.own_sigterm:app", SET_LATE=late)
    with contextlib.ExitStack() as streams:
        for _ in range(3):
            streams.enter_context(open_stream(server.port, "orders"))
        for _ in range(4):
            with request(server.port, "/sse?channel=orders") as response:
                assert response.next().json == {"reason": "capacity"}
        assert server.get("/ping") == "pong"
