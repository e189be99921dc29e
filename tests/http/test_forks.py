"""A process that serves streams forks: the child has no part in them, and does as it likes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg2.extensions import parse_dsn

from tests.support.client import Response, eventually, open_stream
from tests.support.postgres import connect
from tests.support.processes import parent_of, state_of
from tests.support.redis import RedisServer
from tests.support.servers import ROOT, WebServer
from tests.support.slow import but_one_slow

Start = Callable[..., WebServer]
APP = "tests.support.apps.forking:app"
GTHREAD = ["-k", "gthread", "--threads", "16"]
COUNT = 500
WRONG = ("Traceback", "ERROR", "WARNING:flask_pg_sse")


def sockets(pid: int) -> set[str]:
    """Return the sockets that a process holds, apart from those that accept connections."""
    listening = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line}
    found = set()
    for number in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = os.readlink(number)
        except FileNotFoundError:
            continue
        if name.startswith("socket:") and name[8:-1] not in listening:
            found.add(name)
    return found


def at_postgres(url: str) -> set[str]:
    """Return the sockets of all processes that are connected to a database's server."""
    port = f":{int(parse_dsn(url)['port']):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{line[9]}]" for line in lines if line[2].endswith(port)}


def publish(url: str, count: int = COUNT) -> None:
    connection = connect(url)
    try:
        with connection.cursor() as cursor:
            for number in range(count):
                cursor.execute("SELECT pg_notify('orders', %s)", (str(number),))
    finally:
        connection.close()


def exactly(streams: list[Response], count: int = COUNT) -> None:
    for stream in streams:
        assert [stream.event().data for _ in range(count)] == list(map(str, range(count)))


def started(server: WebServer, start: Callable[[], object], listener: Response) -> int:
    """Have a job begin, and return the number of its process."""
    start()
    return int((listener.event().data or "").removeprefix("begun in "))


def check(server: WebServer, url: str, folder: Path, how: str) -> None:
    streams = [open_stream(server.port, "orders") for _ in range(4)]
    jobs = open_stream(server.port, "jobs")
    publish(url, 3)
    exactly(streams, 3)
    child = started(server, lambda: server.post(f"/fork/{how}?folder={folder}"), jobs)
    shared = sockets(child) & sockets(parent_of(child))
    publish(url)
    exactly(streams)
    assert len(shared) == 1, "only the socket that reads as ended, which children get in the place of all others"
    before = time.monotonic()
    publish(url, 1)
    exactly(streams, 1)  # and the heartbeats that came while the others were read
    beats = [streams[0].next() for _ in range(3)]  # SSE_HEARTBEAT is 1 s
    assert all(beat.comments == ["heartbeat"] or beat.event == "sse-cursor" for beat in beats)
    assert time.monotonic() - before > 1.5
    (folder / "go").touch()
    assert jobs.event().data == "ended"
    if how != "executor":  # whose process waits for another job
        eventually(lambda: state_of(child) in ("", "Z"))
    publish(url, 3)
    exactly(streams, 3)
    for stream in (*streams, jobs):
        stream.close()
    assert not any(word in server.log() for word in WRONG), server.log()


HOW = ["multiprocessing", "os.fork", "atexit", "executor"]
SERVERS: dict[str, list[str] | Callable[[int], list[str]]] = {
    "gevent": [],
    "gthread": GTHREAD,
    "gevent preloaded": ["--preload"],
    "pywsgi": lambda port: [sys.executable, "-m", "tests.support.apps.forking", str(port)],
    "flask run": lambda port: [sys.executable, "-m", "flask", "--app", APP, "run", "--port", str(port)],
}


def run(name: str, start_server: Start, database_url: str, **env: str) -> WebServer:
    """Start one of the servers."""
    options = SERVERS[name]
    if callable(options):
        return start_server(database_url, command=options, **env)
    return start_server(database_url, *options, app=APP, **env)


@pytest.mark.parametrize("how", but_one_slow(HOW))
@pytest.mark.parametrize("name", but_one_slow(SERVERS))
def test_streams_go_on_and_the_child_notifies(
    database_url: str, start_server: Start, tmp_path: Path, name: str, how: str
) -> None:
    server = run(name, start_server, database_url, FLASK_SSE_HEARTBEAT="1")
    check(server, database_url, tmp_path, how)


@pytest.mark.slow
@pytest.mark.parametrize("asks", [{}, {"Cache-Control": "no-cache"}], ids=["fetch", "EventSource"])
@pytest.mark.parametrize("name", SERVERS)
def test_a_stream_ends_for_its_client_though_another_process_has_its_socket(
    database_url: str, start_server: Start, tmp_path: Path, name: str, asks: dict[str, str]
) -> None:
    """A C library may fork, or the process may do so before the stream is known."""
    server = run(name, start_server, database_url, FLASK_SSE_MAX_AGE="1")
    with open_stream(server.port, "orders", headers=asks) as stream:
        child = int(server.post(f"/fork/c?folder={tmp_path}"))
        assert stream.event().json == {"reason": "max_age"}
        assert stream.read() == b"" and stream.broken != bool(asks)
        stream.wait_closed()
        assert state_of(child) in ("S", "R")
    (tmp_path / "go").touch()
    assert not any(word in server.log() for word in WRONG), server.log()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gevent", "gthread"])
def test_a_child_hears_streams_of_its_own(database_url: str, start_server: Start, tmp_path: Path, name: str) -> None:
    """Under gevent it does so beside copies of its parent's greenlets, which must not run."""
    options = SERVERS[name]
    assert not callable(options)
    server = start_server(database_url, *options, app=APP, FLASK_SSE_HEARTBEAT="1")
    with open_stream(server.port, "jobs") as jobs, open_stream(server.port, "orders") as orders:
        server.post(f"/fork/listening?folder={tmp_path}")
        assert jobs.event().data == "own"
        assert (jobs.event().data or "").startswith("begun in ")
        assert (tmp_path / "heard").read_text() == "own"
        publish(database_url)
        exactly([orders])
        (tmp_path / "go").touch()
        assert jobs.event().data == "ended"
    assert not any(word in server.log() for word in WRONG), server.log()


@pytest.mark.slow
def test_celerys_pool_of_processes(database_url: str, start_server: Start, tmp_path: Path) -> None:
    """The process that forks it has used the app, and has a stream open."""
    (tmp_path / "control").mkdir()
    server = start_server(database_url)
    env = {**os.environ, "DATABASE_URL": database_url, "CELERY_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "celery", "-A", "tests.support.apps.celery_jobs", "worker"]
    options = ["--pool", "prefork", "--concurrency", "2", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    log = tmp_path / "worker.log"
    with log.open("wb") as output, open_stream(server.port, "orders", timeout=30) as orders:
        worker = subprocess.Popen([*command, *options], env=env, cwd=ROOT, stdout=output, stderr=output)
        try:
            assert orders.event().data == "loaded"
            eventually(lambda: " ready." in log.read_text() or worker.poll() is not None, 60, "Celery is ready")
            sender = "from tests.support.apps.celery_jobs import send\nfor number in range(40): send.delay(number)"
            subprocess.run([sys.executable, "-c", sender], env={**env, "ONLY_SENDS": "1"}, cwd=ROOT, check=True)
            found = [orders.event().json for _ in range(40)]
            assert sorted(one["number"] for one in found) == list(range(40))
            for pid in {one["pid"] for one in found}:
                assert pid != worker.pid
                assert not sockets(pid) & sockets(worker.pid) & at_postgres(database_url)
        finally:
            worker.terminate()
            worker.wait(20)
    assert not any(word in log.read_text() for word in WRONG), log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gevent", "gevent preloaded"])
def test_notify_lets_no_copy_of_a_greenlet_run(database_url: str, start_server: Start, name: str) -> None:
    """That of gunicorn's main greenlet would end the child: "Parent changed, shutting down"."""
    options = SERVERS[name]
    assert not callable(options)
    server = start_server(database_url, *options, app=APP)
    with open_stream(server.port, "jobs") as jobs:
        server.post("/fork/patient")
        assert [jobs.event().data for _ in range(20)] == list(map(str, range(20)))
    assert "Parent changed" not in server.log()


# One process, because what gevent has patched stays patched.
OTHER_ENGINES = """
import faulthandler; faulthandler.dump_traceback_later(60, exit=True)
import sys
url, patched = sys.argv[1], sys.argv[2] == "gevent"
if patched:
    import gevent.monkey; gevent.monkey.patch_all()
import json, multiprocessing, os, time
from flask import Flask
from flask_pg_sse import notify, sse_bp
from flask_pg_sse.serve import create_app
from flask_pg_sse.testing import stream

def sockets():
    numbers = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            numbers.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    return {name for name in numbers if name.startswith("socket:")}

if url.startswith("redis"):
    app = create_app({"REDIS_URL": url})
    where = "/?channel=orders"
else:
    app = Flask("tests")
    app.config.update(SSE_CHANNELS=["*"], SSE_BROKER_URL=url)
    app.register_blueprint(sse_bp)
    where = "/sse/orders"

def job(theirs):
    with app.app_context():
        notify("orders", "the child's")
        time.sleep(0.3)  # under gevent the copies of greenlets could run
        events = stream(app.test_client(), where, timeout=10)
        next(events)
        notify("orders", "own")
        result = json.dumps([next(events).data, sorted(sockets() & theirs)])
        with open(f"{sys.argv[3]}/new", "w") as file:
            file.write(result)
        os.rename(file.name, f"{sys.argv[3]}/result")
        events.close()

events = stream(app.test_client(), where, timeout=10)
assert next(events).event == "sse-open"
with app.app_context():
    notify("orders", "before")
    assert next(events).data == "before"
    child = multiprocessing.get_context("fork").Process(target=job, args=(sockets(),))
    child.start()
    for number in range(20):
        notify("orders", number)
    while not os.path.exists(f"{sys.argv[3]}/result"):
        time.sleep(0.01)
    own, shared = json.load(open(f"{sys.argv[3]}/result"))
    notify("orders", "end")
    heard = []
    while (data := next(events).data) != "end":
        heard.append(data)
assert own == "own", own
assert len(shared) == 1, shared  # the socket that reads as ended
expected = ["the child's", "own"] if url.startswith("redis") else []
assert [one for one in heard if not one.isdigit()] == expected, heard
assert [int(one) for one in heard if one.isdigit()] == list(range(20)), heard
events.close()
app.extensions["pg_sse"].close()
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gevent", "threads"])
@pytest.mark.parametrize("engine", ["memory", "Redis"])
def test_on_another_engine(redis_server: RedisServer, tmp_path: Path, engine: str, kind: str) -> None:
    url = redis_server.url if engine == "Redis" else "memory://"
    done = subprocess.run(
        [sys.executable, "-c", OTHER_ENGINES, url, kind, tmp_path], capture_output=True, text=True, timeout=90, cwd=ROOT
    )
    assert done.stdout == "fine\n", done.stderr
    assert "Traceback" not in done.stderr, done.stderr
