"""While one event goes out to thousands of streams, the worker answers other requests; and all take turns."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flask_pg_sse.hub.fanout import OFFERS_BETWEEN_YIELDS
from tests.support import servers

STREAMS = 5000
BEGINNING = """
import gevent.monkey; gevent.monkey.patch_all()
import socket, sys, threading, time, gevent
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.subscription import Subscription
from tests.support.model import Quiet
"""
FAN_OUT = """
hub = Hub(Quiet(), heartbeat=15, retry=3000)
other, sink = socket.socket(type=socket.SOCK_DGRAM), socket.socket(type=socket.SOCK_DGRAM)
other.bind(("127.0.0.1", 0))
sink.connect(other.getsockname())  # takes all: what nobody fetches is dropped
for _ in range(int(sys.argv[1])):
    stream = Subscription("a", 1000)
    hub.open(stream)
    hub.go_live(stream)
    stream._way = sink._sock

ours, theirs = socket.socketpair()
answered = 0
def answer():
    while request := theirs.recv(1):
        theirs.sendall(request)
def ask():
    global answered
    while True:
        try:
            ours.sendall(b"?")
        except OSError:
            return
        if not ours.recv(1):
            return
        answered += 1
threads = [threading.Thread(target=one) for one in (answer, ask)]
for thread in threads: thread.start()
while not answered:
    time.sleep(0.001)
before = answered
hub.deliver([("a", b"data: x\\n\\n", 0)], 0)
print(answered - before)
ours.shutdown(socket.SHUT_RDWR)
for thread in threads: thread.join()
"""


def run(script: str, argument: str) -> int:
    """Run a script of the above in a process of its own, and return the number that it prints."""
    command = [sys.executable, "-c", BEGINNING + script, argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=servers.ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_requests_are_answered_within_one_fan_out() -> None:
    """Counted, not timed: a request and its answer need two looks at the sockets, and there is one for each portion."""
    looks = STREAMS // OFFERS_BETWEEN_YIELDS - 1
    assert run(FAN_OUT, str(STREAMS)) >= looks // 3


BUSY = """
hub = Hub(Quiet(), heartbeat=0.001, retry=3000)
turns = beats = 0

def client(stream):  # whose generator takes longer for a block than it takes to hand it one
    while stream.take() is not None:
        until = time.perf_counter() + 0.0002
        while time.perf_counter() < until:
            pass

def deliver():
    global turns
    turns += 1
    hub.deliver([("a", b"data: x\\n\\n", 0)], 0)

def beat():
    global beats
    beats += 1
    hub._look_at = 0
    hub.beat()

def again_and_again(work):
    while True:
        work()
        gevent.idle(2)

for _ in range(1000):
    stream = Subscription("a", 1_000_000)
    hub.open(stream)
    hub.go_live(stream)
    gevent.spawn(client, stream)
gevent.spawn(again_and_again, {"a turn": beat, "heartbeats": deliver}[sys.argv[1]])
waited = []
for _ in range(3):
    before = turns + beats
    while turns + beats < before + 5:  # until it is busy
        gevent.sleep(0.01)
    before = turns + beats
    {"a turn": deliver, "heartbeats": beat}[sys.argv[1]]()
    waited.append(turns + beats - before - 1)
print(max(waited))
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a turn", "heartbeats"])
def test_on_a_busy_worker_events_and_heartbeats_take_turns(who: str) -> None:
    """Each waits for at most one round of the other. Before, it was thirty, and under heartbeats no event came."""
    assert run(BUSY, who) <= 2
