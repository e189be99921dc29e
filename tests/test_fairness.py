"""While one event goes out to thousands of streams, the worker answers others."""

from __future__ import annotations

import subprocess
import sys

from flask_pg_sse.group import OFFERS_BETWEEN_YIELDS
from tests import servers

STREAMS = 5000
SCRIPT = """
import gevent.monkey; gevent.monkey.patch_all()
import operator, socket, sys, threading, time
from flask_pg_sse.hub import Hub
from flask_pg_sse.subscription import Subscription

class Heard:
    def wait(self, timeout): return True
    def cancel(self): ...

hub = Hub(lambda channels: Heard(), lambda channels: None, heartbeat=15, retry=3000)
for _ in range(int(sys.argv[1])):
    stream = Subscription("a", 1000)
    assert hub.open(stream) is None
    hub.go_live(stream)
    stream._send = operator.length_hint  # takes all, as a socket does

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


def test_requests_are_answered_within_one_fan_out() -> None:
    """Counted, not timed: a request and its answer need two looks at the sockets, and there is one for each portion."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(STREAMS)], capture_output=True, text=True, timeout=60, cwd=servers.ROOT
    )
    assert done.returncode == 0, done.stderr
    looks = STREAMS // OFFERS_BETWEEN_YIELDS - 1
    assert int(done.stdout) >= looks // 3
