"""The server that stands alone, with Redis: what others PUBLISH reaches the streams, and what Redis cannot do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask
from flask_sse import sse  # type: ignore[import-untyped]

from flask_pg_sse import disconnect, sse_cursor
from flask_pg_sse.cli.main import main
from flask_pg_sse.errors import ConfigurationError
from flask_pg_sse.serve import create_app
from flask_pg_sse.testing import Received, stream
from tests.support.client import Response, open_stream, request
from tests.support.redis import RedisServer, RunRedis
from tests.support.servers import ROOT, WebServer

Serve = Callable[..., WebServer]
Listen = Callable[..., Iterator[Received]]
WORKERS = pytest.mark.parametrize(
    "options", ["", pytest.param("-k gthread --threads 8", marks=pytest.mark.slow)], ids=["gevent", "gthread"]
)


@pytest.fixture
def serve(start_server: Serve) -> Serve:
    """Start the server on a free port, with a Redis and gunicorn's options."""

    def start(redis_url: str, options: str = "", **env: str) -> WebServer:
        def line(port: int) -> list[str]:
            start = [sys.executable, "-m", "flask_pg_sse.cli.main", "serve", "--port", str(port), "--"]
            return [*start, "-c", "python:tests.support.apps.gunicorn_conf", *options.split()]

        return start_server("", command=line, ready="/livez", REDIS_URL=redis_url, **env)

    return start


def opened(server: WebServer, *channels: str) -> Any:
    return open_stream(server.port, *channels, path="/")


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Open a stream of the server's app in this process, behind its first event."""
    apps: dict[str, Flask] = {}
    streams = ExitStack()

    def listen(redis: RedisServer, channel: str) -> Iterator[Received]:
        app = apps.setdefault(redis.url, create_app({"REDIS_URL": redis.url}))
        events = streams.enter_context(closing(stream(app.test_client(), f"/{channel}", timeout=20)))
        assert next(events).event == "sse-open"
        return events

    yield listen
    streams.close()
    for app in apps.values():
        app.extensions["pg_sse"].close()


def waiting_stream(server: WebServer, path: str) -> socket.socket:
    """Ask for a stream that cannot begin yet; `Response()` reads its answer."""
    sock = socket.create_connection(("127.0.0.1", server.port), 10)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return sock


@WORKERS
def test_an_event_from_redis_reaches_a_stream(redis_server: RedisServer, serve: Serve, options: str) -> None:
    server = serve(redis_server.url, options, DATABASE_URL="postgresql://nobody@127.0.0.1:1/x")
    assert "keeps nothing" in server.log(), "it says that it is lossy"
    with opened(server, "orders", "Ünïcode names") as stream:
        assert redis_server.publish("orders", "hello") == 1
        assert stream.event().data == "hello"
        said = CliRunner().invoke(
            main,
            ["notify", "Ünïcode names", '{"a": 1}', "--event", "made", "--id", "7"],
            env={"REDIS_URL": redis_server.url},
        )
        assert (said.exit_code, said.output) == (0, "Sent to Ünïcode names.\n")
        event = stream.event()
        assert (event.event, event.id, event.data) == ("made", "7", '{"a": 1}')
    assert server.get("/readyz") == "ok\n"


def test_an_event_that_is_sent_right_after_sse_open_arrives(redis_server: RedisServer, listen: Listen) -> None:
    for number in range(30):
        events = listen(redis_server, f"room-{number}")
        redis_server.publish(f"room-{number}", str(number))
        assert next(events).data == str(number)


def test_flask_sses_publisher_works_unchanged(redis_server: RedisServer, listen: Listen) -> None:
    app = Flask("theirs")
    app.config["REDIS_URL"] = redis_server.url
    app.register_blueprint(sse, url_prefix="/stream")
    events, social = listen(redis_server, "sse"), listen(redis_server, "users.social")
    with app.app_context():
        sse.publish({"message": "Hello!"}, type="greeting")
        sse.publish({"user": "alice", "status": "Life is good! ☀"}, type="social", channel="users.social")
        for data in ("text", "two\nlines", [1, {"a": None}], 5, False, None):
            sse.publish(data, id=5, retry=2000)
    event = next(events)
    assert (event.event, event.json) == ("greeting", {"message": "Hello!"})
    assert next(social).json["status"] == "Life is good! ☀"
    for expected in ("text", "two\nlines", '[1, {"a": null}]', "5", "false", "null"):
        assert next(events) == Received("message", expected, "5")


def test_after_a_restart_of_redis_streams_are_told_and_go_on(run_redis: RunRedis, listen: Listen) -> None:
    redis = run_redis()
    events = listen(redis, "a")
    redis.stop()
    redis.start()
    reset = next(events)
    assert (reset.event, reset.json) == ("sse-reset", {"reason": "reconnected"})
    redis.publish("a", "again")
    assert next(events).data == "again"


@pytest.mark.slow
def test_streams_are_told_that_redis_is_away(run_redis: RunRedis, serve: Serve, listen: Listen) -> None:
    redis = run_redis()
    events = listen(redis, "a")
    redis.stop()
    away = next(events)
    assert (away.event, away.json) == ("sse-status", {"live": False})
    redis.start()
    assert [next(events).event for _ in range(2)] == ["sse-reset", "sse-status"]
    redis.publish("a", "again")
    assert next(events).data == "again"


@pytest.mark.slow
def test_the_older_relays_notify_works_unchanged(redis_server: RedisServer, listen: Listen) -> None:
    call = """
import json
from sse_relay_server import notify

notify(channel="Notifications", sse_payload={"event": "NEW", "id": 1, "data": json.dumps({"message": "A new one"})})
"""
    events = listen(redis_server, "Notifications")
    subprocess.run([sys.executable, "-c", call], check=True, env={"REDIS_URL": redis_server.url}, cwd="/")
    event = next(events)
    assert (event.event, event.id, event.json) == ("NEW", "1", {"message": "A new one"})


@pytest.mark.slow
@WORKERS
def test_a_redis_that_hangs_stops_nothing_else(run_redis: RunRedis, serve: Serve, options: str) -> None:
    redis = run_redis()
    server = serve(redis.url, options, SSE_HEARTBEAT="0.2")
    with opened(server, "a") as stream:
        redis.freeze()
        with waiting_stream(server, "/b") as sock:
            for _ in range(5):
                began = time.monotonic()
                assert server.get("/livez") == "ok\n"
                assert stream.next().data is None, "a heartbeat"
                assert time.monotonic() - began < 2
            began = time.monotonic()
            server.terminate()
            for one in (stream, Response(sock, 10)):
                assert one.event().json == {"reason": "shutdown"}
            server.process.wait(10)
            assert time.monotonic() - began < 8


@pytest.mark.slow
def test_a_redis_that_is_away_at_start(run_redis: RunRedis, serve: Serve) -> None:
    redis = run_redis(started=False)
    server = serve(redis.url)
    with waiting_stream(server, "/a") as sock, request(server.port, "/readyz") as ready:
        assert ready.status == 503
        redis.start()
        stream = Response(sock, 10)
        assert stream.event().event == "sse-open"
        redis.publish("a", "there")
        assert stream.event().data == "there"
    assert server.get("/readyz") == "ok\n"


@pytest.mark.slow
def test_without_redis_a_new_stream_is_told_to_come_back(run_redis: RunRedis, serve: Serve) -> None:
    server = serve(run_redis(started=False).url)
    with request(server.port, "/a", timeout=20) as stream:
        assert stream.event().json == {"reason": "unavailable"}


# -- what Redis cannot do, and what is wrong in the environment


def test_what_needs_postgresql_says_so(redis_server: RedisServer) -> None:
    app = create_app({"REDIS_URL": redis_server.url, "SSE_SECRET_KEY": "k"})
    with app.app_context():
        assert sse_cursor() is None
        with pytest.raises(ConfigurationError, match=r"disconnect\(\) needs PostgreSQL.*REDIS_URL"):
            disconnect(subject="ann")
    app.extensions["pg_sse"].close()
    for name in ("init", "prune"):
        said = CliRunner().invoke(main, [name], env={"REDIS_URL": redis_server.url})
        assert said.exit_code == 1 and "REDIS_URL" in said.output and "DATABASE_URL" in said.output, said.output


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"REDIS_URL": "redis://:s3cr3t@a,b/0"}, "REDIS_URL names several servers"),
        ({"REDIS_URL": "redis+sentinel://:s3cr3t@a/m"}, "REDIS_URL names a Sentinel"),
        ({"REDIS_URL": "redis://:s3cr3t@a", "SSE_EVENT_LOG": "true"}, "Redis keeps no events"),
        ({"REDIS_URL": "redis://:s3cr3t@a", "RELAY_USE_PG": "perhaps"}, "RELAY_USE_PG is 'perhaps'"),
    ],
)
def test_a_wrong_environment_is_one_line(env: dict[str, str], words: str) -> None:
    said = CliRunner().invoke(main, ["serve"], env=env)
    assert said.exit_code == 1 and words in said.output and "s3cr3t" not in said.output
    assert len(said.output.splitlines()) == 1


def test_a_notify_that_fails_is_one_line() -> None:
    env = {"REDIS_URL": "redis://:s3cr3t@127.0.0.1:1/0"}
    said = CliRunner().invoke(main, ["notify", "a", "x"], env=env)
    assert said.exit_code == 1 and said.output.startswith("Error: The event was not sent: Redis at 127.0.0.1:1 cannot")
    assert "s3cr3t" not in said.output and len(said.output.splitlines()) == 1
    assert "Channel names that begin with" in CliRunner().invoke(main, ["notify", "flask_pg_sse", "x"], env=env).output


def test_redis_py_is_imported_only_where_redis_is_used() -> None:
    lines = """
import sys
import flask_pg_sse, flask_pg_sse.serve, flask_pg_sse.cli.main
flask_pg_sse.serve.create_app({"DATABASE_URL": "postgresql://host/x", "REDIS_URL": "redis://host", "RELAY_USE_PG": "1"})
assert "redis" not in sys.modules
sys.modules["redis"] = None  # as if it were not installed
try:
    flask_pg_sse.serve.create_app({"REDIS_URL": "redis://host"})
except flask_pg_sse.ConfigurationError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "Redis needs the client redis-py: pip install 'flask-pg-sse[redis]'.\n"
    assert json.dumps(said.stderr) == '""'
