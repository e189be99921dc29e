"""The package's lock and event: between threads, between greenlets, and between both."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from flask_pg_sse.concurrency import locks
from flask_pg_sse.concurrency.locks import Event, Lock
from tests.support.client import eventually


def test_one_holder_at_a_time_between_threads() -> None:
    lock, inside, most = Lock(), [0], [0]

    def work() -> None:
        for _ in range(500):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] and not any(thread.is_alive() for thread in threads)
    assert not lock._waiting and not lock._held.locked()


def test_it_goes_to_the_one_that_has_waited_longest() -> None:
    lock, order = Lock(), list[int]()

    def wait(number: int) -> None:
        with lock:
            order.append(number)

    threads = []
    with lock:
        for number in range(5):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            eventually(lambda number=number: len(lock._waiting) == number + 1)  # type: ignore[misc]
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


def test_a_holder_that_does_not_go_on_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LONGEST_WAIT", 0.05)
    lock, said = Lock(), list[str]()

    def wait() -> None:
        try:
            with lock:
                raise AssertionError("it is held")
        except TimeoutError as error:
            said.append(str(error))

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(10)
    assert "event loop" in said[0]
    with lock:  # the one that gave up is not handed the lock
        pass
    assert not lock._held.locked()


def test_an_event_ends_every_wait() -> None:
    event, seen = Event(), list[bool]()
    assert not event.wait(0.01)
    threads = [threading.Thread(target=lambda: seen.append(event.wait(10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    event.set()
    for thread in threads:
        thread.join(10)
    assert seen == [True] * 3 and event.is_set() and event.wait(0)
    event.clear()
    assert not event.is_set()


MIXTURE = """
import faulthandler; faulthandler.dump_traceback_later(50, exit=True)
import gevent.monkey; gevent.monkey.patch_all()
import gevent
from flask_pg_sse.concurrency.locks import Event, Lock
lock, event, inside, most, ended = Lock(), Event(), [0], [0], []
sleep = gevent.monkey.get_original("time", "sleep")

def work(pause):
    assert event.wait(20)
    for _ in range(60):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            pause(0.0001)  # the holder lets others run
            inside[0] -= 1
    ended.append(None)

start = gevent.monkey.get_original("_thread", "start_new_thread")
greenlets = [gevent.spawn(work, gevent.sleep) for _ in range(6)]
for _ in range(6):
    start(work, (sleep,))
gevent.sleep(0.05)

def hold():
    while True:
        with lock:
            gevent.sleep(0.0001)

killed = [gevent.spawn(hold) for _ in range(3)]
event.set()
gevent.sleep(0.01)
gevent.killall(killed)  # one holds the lock, the others wait for it
while len(ended) < 12:
    gevent.sleep(0.01)
with lock:
    pass
print(most)
"""


def test_between_greenlets_and_threads_of_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", MIXTURE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1]\n", done.stderr
