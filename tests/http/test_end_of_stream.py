"""A stream that the server ends: its body breaks off for clients built on fetch, so that they come back too."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.support.client import open_stream, request
from tests.support.servers import WebServer, free_port, gunicorn
from tests.support.slow import but_one_slow

Start = Callable[..., WebServer]

APP = "tests.support.apps.basic:app"
SERVERS: dict[str, Callable[[int], list[str]]] = {
    "gevent": lambda port: gunicorn(APP, port, "--access-logfile", "-"),
    "gthread": lambda port: gunicorn(APP, port, "--access-logfile", "-", "-k", "gthread", "--threads", "8"),
    "gevent_pywsgi": lambda port: gunicorn(APP, port, "--access-logfile", "-", "-k", "gevent_pywsgi"),
    "pywsgi": lambda port: [sys.executable, "-m", "tests.support.apps.pywsgi", str(port)],
    "flask run": lambda port: [sys.executable, "-m", "flask", "--app", APP, "run", "--port", str(port)],
}
EACH_SERVER = but_one_slow(SERVERS)


@pytest.mark.parametrize(
    "direct", ["true", pytest.param("false", marks=pytest.mark.slow)], ids=["direct", "generators"]
)
@pytest.mark.parametrize("name", EACH_SERVER)
def test_the_last_chunk_is_not_sent(database_url: str, start_server: Start, name: str, direct: str) -> None:
    """Neither after an open stream nor after a refusal. All that was sent arrives, and the log is as ever."""
    env = {"FLASK_SECRET_KEY": "x", "FLASK_SSE_MAX_STREAMS": "1", "FLASK_SSE_DIRECT_WRITE": direct}
    server = start_server(database_url, command=SERVERS[name], **env)
    with open_stream(server.port, "orders") as stream, request(server.port, "/sse?channel=orders") as refused:
        server.post("/notify/orders", b'{"data": "hello"}')
        assert stream.event().data == "hello"
        server.post("/end/orders")
        for one, reason in ((stream, "revoked"), (refused, "capacity")):
            assert one.event().json == {"reason": reason}
            assert one.read() == b"" and one.broken
            one.wait_closed()
    with request(server.port, "/ping") as response:  # any other answer ends as before
        assert response.read() == b"pong" and not response.broken
    server.stop()
    assert server.log().count('"GET /sse?channel=orders HTTP/1.1" 200') == 2
    assert not any(word in server.log() for word in ("Traceback", "ERROR", "Broken pipe")), server.log()


@pytest.mark.parametrize("name", EACH_SERVER)
def test_the_end_is_a_clean_one_for_an_event_source(database_url: str, start_server: Start, name: str) -> None:
    """Which comes back after any end, and is known by what it asks for. A page must see the last event."""
    env = {"FLASK_SECRET_KEY": "x", "FLASK_SSE_MAX_STREAMS": "1"}
    server = start_server(database_url, command=SERVERS[name], **env)
    asks = {"Cache-Control": "no-cache"}
    with (
        open_stream(server.port, "orders", headers=asks) as stream,
        request(server.port, "/sse?channel=orders", headers=asks) as refused,
    ):
        server.post("/end/orders")
        for one, reason in ((stream, "revoked"), (refused, "capacity")):
            assert one.event().json == {"reason": reason}
            assert one.read() == b"" and one.finished and not one.broken
            one.wait_closed()


@pytest.mark.parametrize("app", ["tests.support.apps.hiding:app", "HTTP/1.0"])
def test_where_the_end_is_a_clean_one(database_url: str, start_server: Start, app: str) -> None:
    """As docs/deploy.md says. What the server makes of the body is not seen there, or HTTP has no other end."""
    version = "1.0" if app == "HTTP/1.0" else "1.1"
    server = start_server(database_url, app=APP if version == "1.0" else app, FLASK_SECRET_KEY="x")
    with open_stream(server.port, "orders", version=version) as stream:
        server.post("/end/orders")
        assert stream.event().json == {"reason": "revoked"}
        assert stream.read() == b"" and stream.finished and not stream.broken


@pytest.mark.slow
def test_while_postgres_is_away_too(start_server: Start) -> None:
    """The app looks for it for ten seconds."""
    server = start_server(f"postgresql://nobody@127.0.0.1:{free_port()}/none")
    with request(server.port, "/sse?channel=orders", timeout=25) as refused:
        assert refused.event().json == {"reason": "unavailable"}
        assert refused.read() == b"" and refused.broken
