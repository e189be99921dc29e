"""Turns go round among the clients, and one caller hands over to the next: threads, greenlets, and both at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.engine.turns import Turn, TurnQueue, Turns
from tests.support import servers

SCRIPT = """
import sys, time
if sys.argv[1] != "threads":
    import gevent, gevent.monkey; gevent.monkey.patch_all()
import threading
from flask_pg_sse.engine.turns import Turns
turns = Turns(2)
going = most = 0
took = {}
def work(name):
    global going, most
    for _ in range(50):
        turn = turns.ask()
        try:
            assert turn.wait(20), "no turn"
            going += 1
            most = max(most, going)
            time.sleep(0.001)  # others come meanwhile
            took[name] = took.get(name, 0) + 1
            if len(took) == 10 and "first" not in sizes:
                sizes["first"] = dict(took)
            going -= 1
        finally:
            turn.leave()
sizes = {}
here = [threading.Thread(target=work, args=(number,)) for number in range(5 if sys.argv[1] == "both" else 10)]
for thread in here: thread.start()
if sys.argv[1] == "both":  # threads of the system, beside greenlets
    pool = gevent.get_hub().threadpool
    there = [pool.spawn(work, 100 + number) for number in range(5)]
    for one in there: one.get()
for thread in here: thread.join()
assert most <= 2, most
assert set(took.values()) == {50} and len(took) == 10, took
assert turns._free == 2 and not turns._waiting
if sys.argv[1] != "both":
    assert max(sizes["first"].values()) <= 3, sizes
print("fine")
"""


@pytest.mark.parametrize("kind", ["threads", "gevent", "both"])
def test_everybody_gets_a_turn_and_not_more_than_two_at_a_time(kind: str) -> None:
    """When the last of ten has its first turn, none has had many: the one that leaves does not get it back."""
    command = [sys.executable, "-c", SCRIPT, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=servers.ROOT)
    assert done.stdout == "fine\n", done.stderr


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), unique=True))
def test_clients_come_in_turn_and_their_own_in_order(ones: list[tuple[int, int]]) -> None:
    queue = TurnQueue[tuple[int, int]]()
    for one in ones:
        queue.add(one[0], one)
    order = []
    while (one_ := queue.pop()) is not None:
        order.append(one_)
    own = {client: [one for one in ones if one[0] == client] for client in range(4)}
    for client in range(4):
        assert [one for one in order if one[0] == client] == own[client]
    for place, (client, number) in enumerate(order):
        before = own[client].index((client, number))
        # Everybody that waits as well has had at most one turn more.
        assert all(min(before + 1, len(own[other])) >= _count(order[:place], other) for other in range(4))
    assert not queue


def _count(order: list[tuple[int, int]], client: int) -> int:
    return sum(one[0] == client for one in order)


def test_one_that_leaves_before_its_turn_holds_nobody_up() -> None:
    turns = Turns(1)
    first, *others = [turns.ask(client) for client in ("a", "a", "b", "c")]
    assert [turn.given for turn in (first, *others)] == [True, False, False, False]
    assert not others[0].wait(0.01)
    others[1].cancel()
    assert not others[1].wait(60)
    for turn in others[:2]:
        turn.leave()
    first.leave()
    assert others[2].wait(60)
    others[2].leave()
    assert turns.ask().given


def test_the_garbage_collector_may_end_one_in_the_middle_of_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1)
    first, second, third = turns.ask("a"), turns.ask("b"), turns.ask("c")
    given: list[Turn] = []

    def give(turn: Turn) -> None:
        turn.given = True
        given.append(turn)
        if turn is second:
            second.leave()  # here a collection ends the generator that waited for it

    monkeypatch.setattr(Turn, "give", give)
    first.leave()
    assert given == [second, third] and third.given and turns._free == 0
