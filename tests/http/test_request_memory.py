"""A stream holds little of its request, however large that was; and the access log is right all the same."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.http.test_web_servers import pywsgi
from tests.support.client import Response, eventually
from tests.support.crowd import worker
from tests.support.processes import resident
from tests.support.servers import WebServer

Start = Callable[..., WebServer]

STREAMS = 60
# An ordinary stream takes 12 kB under gevent, and one with a thread some more. Besides, there is what one request needs
# while it is answered: up to a megabyte for all streams together.
MOST_EACH = 60_000
LONG = "x" * 8000
HEADERS = {
    "headers": {f"X-{number}": LONG for number in range(90)},
    "header names": {f"X-{number}-{LONG}": "y" for number in range(90)},
    "what is logged": {"User-Agent": f"agent {LONG}", "Referer": f"referer {LONG}", "Last-Event-ID": LONG},
}
GTHREAD = ("-k", "gthread", "--threads", "100")
SERVERS = [
    pytest.param(command, options, what, id=f"{name}-{what}")
    for name, command, options in [
        ("gevent", {}, ()),
        ("gevent through generators", {"FLASK_SSE_DIRECT_WRITE": "false"}, ()),
        # By default each of 16 groups of threads keeps the most that one of its threads has needed.
        ("gthread", {"MALLOC_ARENA_MAX": "2"}, GTHREAD),
        ("gevent_pywsgi", {}, ("-k", "gevent_pywsgi")),
        ("pywsgi", {"command": pywsgi()}, ()),
    ]
    for what in HEADERS
]


def opened_with(server: WebServer, headers: dict[str, str], after: bytes = b"") -> Response:
    """Open a stream, with bytes behind the request that no one will read."""
    sock = socket.create_connection(("127.0.0.1", server.port), 20)
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sock.sendall(f"GET /sse?channel=orders HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode() + after)
    response = Response(sock, 20)
    assert response.next().event == "sse-open"
    return response


def growth(server: WebServer, process: int, headers: dict[str, str]) -> float:
    """Return by how many bytes a process grows for each stream with these headers."""
    with ExitStack() as streams:
        for _ in range(30):  # each thread's own part of the memory has then had such a request
            streams.enter_context(opened_with(server, headers, b"GET /" + b"z" * 8000))
        before = resident(process)
        for _ in range(STREAMS):
            streams.enter_context(opened_with(server, headers, b"GET /" + b"z" * 8000))
        return (resident(process) - before) / STREAMS


@pytest.mark.slow
@pytest.mark.parametrize(("how", "options", "what"), SERVERS)
def test_a_stream_costs_the_same_whatever_its_client_sent(
    database_url: str, start_server: Start, how: dict[str, str], options: tuple[str, ...], what: str
) -> None:
    grown: list[float] = []
    while not grown or (grown[-1] >= MOST_EACH and len(grown) < 3):
        # A new server for each look: the allocator's own moods pass, and what a stream keeps is there each time.
        server = start_server(database_url, *options, **how)
        process = server.process.pid if "command" in how else worker(server)
        grown.append(growth(server, process, HEADERS[what]))
        server.stop()
    assert grown[-1] < MOST_EACH, grown


@pytest.mark.parametrize(
    "options", [(), pytest.param(GTHREAD, marks=pytest.mark.slow), ("-k", "gevent_pywsgi")], ids=str
)
def test_the_access_log_has_what_it_names(database_url: str, start_server: Start, options: tuple[str, ...]) -> None:
    """By default: the request's line, the user, the status, the bytes, referer and user agent."""
    named = '%(h)s %(u)s "%(r)s" %(s)s "%(f)s" "%(a)s" %({x-request-id}i)s %({http_x_far}e)s %({x-other}i)s'
    server = start_server(database_url, *options, "--access-logfile", "-", "--access-logformat", named)
    headers = {"Authorization": "Basic YW5uOnNlY3JldA==", "X-Request-ID": f"i{LONG}", "X-Far": f"f{LONG}"}
    headers |= HEADERS["what is logged"] | {"X-Unnamed": LONG}
    opened_with(server, headers).close()
    line = eventually(lambda: re.findall(r'^127.0.0.1 .* "GET /sse.*$', server.log(), re.MULTILINE))[0]
    expected = f'"GET /sse?channel=orders HTTP/1.1" 200 "referer {LONG}" "agent {LONG}" i{LONG} f{LONG} -'
    assert line == f"127.0.0.1 ann {expected}"
    assert "Traceback" not in server.log()
