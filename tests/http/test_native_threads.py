"""Threads of the system beside greenlets, under `gevent.monkey.patch_all()`: both may use the package at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.servers import ROOT

# One process, because what gevent has patched stays patched. It ends by itself if anything hangs.
BEGIN = """
import faulthandler; faulthandler.dump_traceback_later(60, exit=True)
import gevent.monkey; gevent.monkey.patch_all()
import concurrent.futures, ctypes, gevent, os, sys, threading, time
from gevent.threadpool import ThreadPoolExecutor
from flask import Flask
from flask_pg_sse import disconnect, notify, sse_bp, sse_cursor, sse_url
from flask_pg_sse.testing import close, stream

def new_app():
    app = Flask("tests")
    app.config.update(SECRET_KEY="secret", SSE_CHANNELS=["*"], SERVER_NAME="localhost")
    app.config.update(SSE_BROKER_URL=sys.argv[1]) if "://" in sys.argv[1] and not sys.argv[1].startswith("postgres") \
        else app.config.update(SSE_DATABASE_URL=sys.argv[1])
    app.register_blueprint(sse_bp)
    return app

app = new_app()
# The first app context imports this codec (werkzeug, with SERVER_NAME), and where several threads import one module at
# once under gevent, gevent's locks may hang: 1 of 14 processes did that had nothing of this package.
"".encode("idna")
COUNT = int(sys.argv[2])
done, failed = [], []

def calls(app=app, count=COUNT):
    try:
        with app.app_context():
            for number in range(count):
                notify("orders", number)
                sse_cursor()
                if number % 10 == 0:
                    disconnect(channel="nobody's")
                sse_url("orders", sign=True)
                done.append(None)
    except BaseException as error:
        failed.append(repr(error))
        raise

start_thread = gevent.monkey.get_original("_thread", "start_new_thread")
sleep = gevent.monkey.get_original("time", "sleep")

class AllOfThem:
    # greenlets, gevent's thread pool, an executor of threads, Python's own threads, and threads of a C library
    def __init__(self, work, each):
        self.greenlets = [gevent.spawn(work) for _ in range(each * 2)]
        self.pool = [gevent.get_hub().threadpool.spawn(work) for _ in range(each)]
        self.executor = ThreadPoolExecutor(each)
        self.futures = [self.executor.submit(work) for _ in range(each)]
        self.native = []
        for _ in range(each):
            def run(ended=[]):
                try:
                    work()
                finally:
                    ended.append(None)
            ended = []
            self.native.append(ended)
            start_thread(run, (ended,))
        self.callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: work())
        self.ended = each * 6
        libc = ctypes.CDLL(None)
        for _ in range(each):
            thread = ctypes.c_ulong()
            assert libc.pthread_create(ctypes.byref(thread), None, self.callback, None) == 0
            libc.pthread_detach(thread)

    def wait(self, expected):
        while len(done) < expected and not failed:
            gevent.sleep(0.01)
        gevent.joinall(self.greenlets)
        self.executor.shutdown()
"""

MIXTURE = """
everybody = AllOfThem(calls, 4)
everybody.wait(24 * COUNT)
assert not failed, failed
sleep(0.1)
before = len(os.listdir("/proc/self/fd"))
for _ in range(20):  # threads that come and go
    ended = []
    start_thread(lambda: (calls(count=1), ended.append(None)), ())
    while not ended and not failed:
        gevent.sleep(0.01)
sleep(0.1)
assert not failed, failed
assert len(os.listdir("/proc/self/fd")) <= before, "descriptors are left of threads"
print("fine")
"""

# The first stream starts the listener. A greenlet may open that stream, or a thread. Both hear all that both send.
STREAMS = """
def listen(heard, opened):
    events = stream(app.test_client(), "/sse/orders", timeout=20)
    assert next(events).event == "sse-open"
    opened.append(None)
    for _ in range(24 * COUNT):
        heard.append(next(events).data)
    reason = next(events).json
    assert reason == {"reason": "shutdown"}, reason
    heard.append("ended")

kinds = {"greenlet": gevent.spawn, "thread": gevent.get_hub().threadpool.spawn}
readers = []
for kind in (sys.argv[3], *kinds):
    heard, opened = [], []
    reader = kinds[kind](listen, heard, opened)
    readers.append((reader, heard))
    while not opened:
        gevent.sleep(0.01)
        assert not reader.ready() or reader.get()
everybody = AllOfThem(calls, 4)
everybody.wait(24 * COUNT)
assert not failed, failed
deadline = time.monotonic() + 30
while any(len(heard) < 24 * COUNT for _, heard in readers) and time.monotonic() < deadline:
    gevent.sleep(0.01)
ending = []
start_thread(lambda: (close(app), ending.append(None)), ())
for reader, heard in readers:
    reader.get(timeout=10)
    assert heard.pop() == "ended"
    assert sorted(map(int, heard)) == sorted(list(range(COUNT)) * 24), len(heard)
while not ending:
    gevent.sleep(0.01)
print("fine")
"""


def run(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout == "fine\n", done.stderr
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("count", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_threads_and_greenlets_publish_together(logged_url: str, count: int) -> None:
    run(MIXTURE, logged_url, str(count))


@pytest.mark.slow
def test_without_the_log(database_url: str) -> None:
    run(MIXTURE, database_url, "30")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["greenlet", "thread"])
@pytest.mark.parametrize("engine", ["PostgreSQL", "memory"])
def test_streams_hear_what_threads_and_greenlets_send(logged_url: str, engine: str, first: str) -> None:
    run(STREAMS, logged_url if engine == "PostgreSQL" else "memory://", "20", first)
