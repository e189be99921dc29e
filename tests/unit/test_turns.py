"""Turns go round among the clients, and one caller hands over to the next: threads, greenlets, and both at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.engine.base import Tail
from flask_pg_sse.engine.turns import Turn, TurnQueue, Turns
from flask_pg_sse.hub import large_events
from flask_pg_sse.hub.large_events import KEPT_FOR, LargeEvents
from flask_pg_sse.hub.subscription import Subscription, Terms
from tests.support import servers
from tests.support.client import eventually
from tests.support.log import InThread
from tests.support.model import FIRST, Connection, ModelLog, World

SCRIPT = """
import sys, time
if sys.argv[1] != "threads":
    import gevent, gevent.monkey; gevent.monkey.patch_all()
import threading
from flask_pg_sse.engine.turns import Turn, Turns
turns = Turns(2)
going = most = 0
took, firsts, order = {}, {}, []
give = Turn.give

def noted(turn):
    order.append(turn)
    give(turn)
Turn.give = noted

def work(name):
    global going, most
    for _ in range(50):
        turn = turns.ask()
        firsts.setdefault(name, turn)
        try:
            assert turn.wait(20), "no turn"
            going += 1
            most = max(most, going)
            time.sleep(0.001)  # others come meanwhile
            took[name] = took.get(name, 0) + 1
            going -= 1
        finally:
            turn.leave()
held = turns.ask(), turns.ask()  # until all of them wait
here = [threading.Thread(target=work, args=(number,)) for number in range(5 if sys.argv[1] == "both" else 10)]
for thread in here: thread.start()
if sys.argv[1] == "both":  # threads of the system, beside greenlets
    pool = gevent.get_hub().threadpool
    there = [pool.spawn(work, 100 + number) for number in range(5)]
while len(turns._waiting._waiting.get((), ())) < 10: time.sleep(0.001)
for turn in held: turn.leave()
if sys.argv[1] == "both":
    for one in there: one.get()
for thread in here: thread.join()
assert most <= 2, most
assert set(took.values()) == {50} and len(took) == 10, took
assert turns._free == 2 and not turns._waiting
assert set(order[2:12]) == set(firsts.values()), "somebody had a second turn before all had one"
print("fine")
"""


@pytest.mark.parametrize("kind", ["threads", "gevent", "both"])
def test_everybody_gets_a_turn_and_not_more_than_two_at_a_time(kind: str) -> None:
    """Before all of the ten that wait have had one, none has a second: the one that leaves does not get it back."""
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


class Busy(ModelLog):
    """Stands still at its first question until it is let go on, and notes of which channels it is asked."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[list[str]] = []
        self.let = threading.Event()

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        self.asked.append(list(uptos))
        assert self.let.wait(20)
        return [Tail(channel, 0, []) for channel in uptos]


def test_who_resumes_with_one_channel_does_not_wait_behind_all_of_another_client() -> None:
    """The log is asked for two streams of it, a hundred channels each in seven questions, and then for this one."""
    log = Busy()
    world = World(log, heartbeat=15)
    streams = []
    for number in range(20):
        channels = [f"{number}-{which}" for which in range(100)]
        streams.append(Subscription(channels, 1000, Terms(clients=("address many",))))
    streams.append(Subscription(["own"], 1000, Terms(clients=("address one",))))
    threads = []
    for stream in streams:
        world.hub.open(stream)
        threads.append(InThread(list, world.replay._fill(stream, sorted(stream.channels), False)))
        if len(threads) == 1:
            eventually(lambda: log.asked)
    waiting = world.replay._fills.turns._waiting._waiting
    eventually(lambda: sum(map(len, waiting.values())) == len(streams) - 1)
    log.let.set()
    for thread in threads:
        thread.join()
    assert "own" in [name for asked in log.asked[:15] for name in asked]
    assert not world.replay._unfilled and sum(map(len, log.asked)) == 2001
    for stream in streams:
        world.hub.close(stream)


def test_a_large_event_gives_its_room_to_the_next_if_nobody_has_taken_any_of_it() -> None:
    large = LargeEvents(300)
    events = [large.join(number, 100, "reader") for number in range(4)]
    for number, one in enumerate(events[:3]):
        large.make_room(100)
        one.keep(bytes([number]) * 100)
        one.loaded_at -= KEPT_FOR + 1
    assert events[0].piece(0) == b"\0" * 100, "it was loaded first, but somebody reads it"
    large.make_room(100)
    assert [one.data is None for one in events] == [False, True, False, True]
    large.make_room(10_000)  # more than all the room: alone
    assert [one.piece(0) for one in events] == [None] * 4
    for one in events:
        large.leave(one, "reader")
    assert not large._events


def test_a_large_event_keeps_its_room_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    large = LargeEvents(100)
    first = large.join(1, 100, "reader")
    begun = time.monotonic()
    first.keep(b"x" * 100)
    large.make_room(100)
    assert first.data is None and time.monotonic() - begun > KEPT_FOR / 2
    monkeypatch.setattr(large_events, "KEPT_FOR", 60.0)
    first.keep(b"x" * 100)
    leaving = InThread(large.leave, first, "reader")
    begun = time.monotonic()
    large.make_room(100)
    assert time.monotonic() - begun < 30, "and not when its stream has left"
    leaving.join()


class Cut(Connection):
    """The connection of a client, which notes that it was cut."""

    was_cut = False

    def cut(self) -> None:
        self.was_cut = True


@pytest.mark.parametrize("gone", [False, True], ids=["still there", "pruned meanwhile"])
def test_an_event_that_lost_its_room_goes_on_where_it_was(gone: bool) -> None:
    """And if the log has it no more, nothing may follow its first part: the connection is cut."""
    log = ModelLog(1)
    world = World(log)
    sent = log.append("a", 100_000)
    world.deliver(1)
    stream = Subscription(["a"], 1000)
    stream.connection = cut = cast(Any, Cut())
    world.hub.open(stream)
    stream.sent = FIRST
    pieces = iter(world.replay.read(stream))
    output = next(pieces)
    [large] = world.replay._large._events.values()
    large.data = None  # another event has its room
    if gone:
        log.items.clear()
    output += b"".join(pieces)
    assert cut.was_cut == gone and stream.ended == gone
    assert output == (sent[1][:16384] if gone else sent[1])
    assert not world.replay._large._events
    world.hub.close(stream)


def test_the_heartbeats_forget_the_sets_whose_streams_have_left() -> None:
    world = World(ModelLog(1), heartbeat=1000)
    kept = Subscription(["kept"], 1000)
    world.hub.open(kept)
    for number in range(1000):
        stream = Subscription([f"room-{number}"], 1000)
        world.hub.open(stream)
        world.hub.close(stream)
        world.hub.sweep()
    assert len(world.hub._heartbeats._foreseen) <= 4
    world.hub.close(kept)
