"""The descriptor that a wakeup watches sets it, under greenlets and threads, and costs nothing while nobody waits."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
if "gevent" in sys.argv:
    import gevent.monkey; gevent.monkey.patch_all()
import socket
from flask_pg_sse.concurrency.wakeup import Wakeup
ours, theirs = socket.socketpair()
wakeup = Wakeup()
wakeup.watch(ours.fileno())
begun = time.monotonic()
wakeup.wait(0.2)
assert 0.15 < time.monotonic() - begun < 5, "it returned before anything came"
for _ in range(3):
    theirs.send(b"x")
    begun = time.monotonic()
    wakeup.wait(30)
    assert time.monotonic() - begun < 5, "it was not set"
    ours.recv(10)
    begun = time.monotonic()
    wakeup.wait(0.01)
    assert time.monotonic() - begun < 5, "it kept to the time of the wait before"
theirs.send(b"x")
wakeup.wait(2e9)  # as where the clock was frozen in another century
wakeup.watch(-1)
wakeup.close()
print("fine")
"""


@pytest.mark.parametrize("kind", ["gevent", "threads"])
def test_a_watched_descriptor_sets_it(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr


def test_the_end_of_a_process_is_no_warning() -> None:
    """What is kept for the children that a process may fork is let go of there, in some order."""
    script = (
        "from flask_pg_sse.concurrency.wakeup import Wakeup; from flask_pg_sse.concurrency import forks\n"
        "Wakeup().close(); assert forks._ended; forks._ended.clear()"
    )
    command = [sys.executable, "-W", "always", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


BUSY = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, socket, time
from flask_pg_sse.concurrency.wakeup import Wakeup
loop = gevent.get_hub().loop
ours, theirs = socket.socketpair()
wakeup = Wakeup()
wakeup.watch(ours.fileno())
for _ in range(3):
    wakeup.wait(0.01)
    # The listener waits elsewhere now, for an answer of PostgreSQL, and something comes that it does not take.
    wakeup.set()
    theirs.send(b"x")
    before = loop.iteration
    gevent.sleep(0.3)
    assert loop.iteration - before < 50, f"{loop.iteration - before} rounds of the event loop"
    for what in ("set", "readable"):
        begun = time.monotonic()
        wakeup.wait(30)
        assert time.monotonic() - begun < 5, f"{what} before the wait"
    ours.recv(10)
wakeup.close()
print("fine")
"""


def test_what_comes_while_nobody_waits_leaves_the_event_loop_at_rest() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr
