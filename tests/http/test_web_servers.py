"""The same app under every server that it may meet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from h2 import events
from h2.connection import H2Connection

from tests.support.client import eventually, open_stream, request
from tests.support.postgres import execute
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]


def pywsgi(*words: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-m", "tests.support.apps.pywsgi", str(port), *words]


def flask_run(*words: str) -> Callable[[int], list[str]]:
    flask = [sys.executable, "-m", "flask", "--app", "tests.support.apps.basic:app", "run"]
    return lambda port: [*flask, "-p", str(port), *words]


# gunicorn's options, or another command line.
SERVERS: dict[str, list[str] | Callable[[int], list[str]]] = {
    "gevent": [],
    "gevent with 4 workers": ["-w", "4"],
    "gevent preloaded": ["--preload"],
    "gevent with 4 workers preloaded": ["-w", "4", "--preload"],
    "gevent_pywsgi": ["-k", "gevent_pywsgi"],
    "gthread": ["-k", "gthread", "--threads", "16"],
    "gthread preloaded": ["-k", "gthread", "--threads", "16", "--preload"],
    "pywsgi": pywsgi(),
    "flask run": flask_run(),
}
SLOW = ["gevent with 4 workers", "gevent with 4 workers preloaded", "pywsgi"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SERVERS]
)
def test_events_reach_all_streams(database_url: str, start_server: Start, name: str) -> None:
    how = SERVERS[name]
    server = start_server(database_url, command=how) if callable(how) else start_server(database_url, *how)
    streams = [open_stream(server.port, "orders") for _ in range(8)]
    for number in range(3):
        server.post("/notify/orders", json.dumps({"data": {"number": number}}).encode())
    execute(database_url, "NOTIFY orders, 'raw'")
    for stream in streams:
        assert [stream.event().json["number"] for _ in range(3)] == [0, 1, 2]
        assert stream.event().data == "raw"
        stream.close()
    assert "Traceback" not in server.log()
    assert "Warning" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gevent",
        pytest.param("gthread", marks=pytest.mark.slow),
        pytest.param("gevent_pywsgi", marks=pytest.mark.slow),
    ],
)
def test_an_app_may_have_a_response_class_of_its_own(database_url: str, start_server: Start, name: str) -> None:
    options = SERVERS[name]
    assert isinstance(options, list)
    server = start_server(
        database_url, *options, "--keep-alive", "75", app="tests.support.apps.own_response:app",
        FLASK_SSE_MAX_STREAMS="1", FLASK_SSE_SEND_TIMEOUT="1",
    )  # fmt: skip
    with open_stream(server.port, "a") as stream:
        assert stream.headers["x-own"] == "yes"
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        server.post("/notify/a", b'{"data": "x"}')
        assert stream.event().data == "x"
        with request(server.port, "/sse?channel=a") as refused:
            assert refused.next().json == {"reason": "capacity"} and refused.headers["x-own"] == "yes"
            assert refused.read() == b""
            refused.wait_closed()
    assert (json.loads(server.get("/writes"))["whole"] > 0) == (name != "gevent_pywsgi")
    eventually(lambda: '"streams":0' in server.get("/state"))
    with open_stream(server.port, "a", receive_buffer=2048):  # reads no more
        server.post("/flood/a/2000/7000")
        eventually(lambda: '"streams":0' in server.get("/state"))


def test_gunicorn_sync_refuses_streams_in_words(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, "-k", "sync")
    with request(server.port, "/sse?channel=orders") as response:
        text = response.read().decode()
    assert response.status == 500
    assert "-k gevent" in text and text.count("\n") == 1
    assert "-k gevent" in server.log()
    # What does not stream works there.
    server.post("/notify/orders", b'{"data": "x"}')


def test_gthread_with_one_thread_refuses_streams_in_words(database_url: str, start_server: Start) -> None:
    for options in (["-k", "gthread"], ["-k", "gthread", "--preload"]):
        server = start_server(database_url, *options)
        with request(server.port, "/sse?channel=orders") as response:
            assert (response.status, b"--threads" in response.read()) == (500, True)
        assert "--threads" in server.log()


@pytest.mark.slow
def test_servers_with_one_request_at_a_time_refuse_streams(database_url: str, start_server: Start) -> None:
    for command in (flask_run("--without-threads"), pywsgi("unpatched")):
        server = start_server(database_url, command=command)
        with request(server.port, "/sse?channel=orders") as response:
            assert (response.status, b"one request at a time" in response.read()) == (500, True)


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_http2_of_gunicorn_refuses_streams_in_words(
    database_url: str, start_server: Start, tmp_path: Path, worker: str
) -> None:
    server = start_server(
        database_url, "-k", worker, "--threads", "4", "--http-protocols", "h1,h2", "--http2-cleartext", "both"
    )
    connection = H2Connection()
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        connection.initiate_connection()
        path = [(":method", "GET"), (":path", "/sse?channel=a"), (":scheme", "http"), (":authority", "localhost")]
        connection.send_headers(1, path, end_stream=True)
        sock.sendall(connection.data_to_send())
        status, body, ended = "", b"", False
        while not ended:
            data = sock.recv(65536)
            assert data, server.log()
            for event in connection.receive_data(data):
                if isinstance(event, events.ResponseReceived):
                    status = dict(event.headers)[b":status"].decode()
                elif isinstance(event, events.DataReceived):
                    body += event.data
                ended = ended or isinstance(event, events.StreamEnded)
            sock.sendall(connection.data_to_send())
    assert status == "500"
    assert b"HTTP/2" in body


@pytest.fixture
def silent_postgres() -> Iterator[str]:
    """A server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        yield f"postgresql://u:hunter2@127.0.0.1:{listener.getsockname()[1]}/d"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for sock in taken:
            sock.close()


@pytest.mark.slow
def test_a_silent_postgres_stops_no_other_route(silent_postgres: str, start_server: Start) -> None:
    """Connecting, for LISTEN and for notify, waits as a greenlet: one worker goes on answering."""
    server = start_server(silent_postgres)
    busy = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(8)]
    for index, sock in enumerate(busy):
        call = "GET /sse?channel=orders" if index % 2 else "POST /notify/orders"
        body = "" if index % 2 else "Content-Type: application/json\r\nContent-Length: 2\r\n"
        sock.sendall(f"{call} HTTP/1.1\r\nHost: localhost\r\n{body}\r\n{'' if index % 2 else '{}'}".encode())
    for _ in range(20):
        with request(server.port, "/ping", timeout=5) as response:
            assert response.read() == b"pong"
    # After 10 s the streams are told to come back later, and the views get an error that shows no password.
    for index, sock in enumerate(busy):
        sock.settimeout(20)
        answer = b""
        while not answer.endswith(b"0\r\n\r\n") and (data := sock.recv(65536)):
            answer += data
        if index % 2:
            assert answer.startswith(b"HTTP/1.1 200") and b'"reason": "unavailable"' in answer and b"retry: " in answer
        else:
            assert answer.startswith(b"HTTP/1.1 500")
        sock.close()
    assert "PostgreSQL cannot be reached" in server.log()
    assert "hunter2" not in server.log()


def test_the_app_starts_while_postgres_is_down(own_postgres: postgres.Server, start_server: Start) -> None:
    own_postgres.stop()
    server = start_server(own_postgres.url())
    # A stream that is asked for now opens once PostgreSQL is there.
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(b"GET /sse?channel=orders HTTP/1.1\r\nHost: localhost\r\n\r\n")
        own_postgres.start()
        sock.settimeout(10)
        answer = b""
        while b"sse-open" not in answer:
            data = sock.recv(65536)
            assert data, answer
            answer += data


def test_importing_the_package_starts_and_imports_nothing() -> None:
    code = (
        "import sys, threading, flask_pg_sse, flask_pg_sse.testing\n"
        "assert threading.active_count() == 1\n"
        "print([m for m in ('gevent', 'gunicorn', 'redis', 'psycopg', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_development_server_says_that_the_next_tab_will_wait(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, command=flask_run())
    streams = []
    for number in range(8):
        streams.append(open_stream(server.port, "orders"))
        assert server.log().count("streams are open on the development server") == (number >= 5)
    for stream in streams:
        stream.close()
