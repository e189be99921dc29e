"""The change of a stream from reading the log to live: its output always equals the log."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_pg_sse.engine.base import Item, Tail
from flask_pg_sse.hub import history as recent_module
from flask_pg_sse.hub.block import Block
from flask_pg_sse.hub.history import TOTAL_BYTES, History
from flask_pg_sse.hub.subscription import Subscription
from tests.support import model, servers
from tests.support.log import LONG
from tests.support.model import FIRST, ModelLog, World, item, logged_in, opening_id, raw, raw_in

CHANNELS = "abcd"

# A long run of random choices is the point.
LARGE = [HealthCheck.data_too_large, HealthCheck.too_slow]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=30), st.integers(0, 200))
def test_the_part_of_a_block_above_an_id(steps: list[tuple[bool, int]], after: int) -> None:
    items: list[Item] = []
    log_id = 0
    for is_logged, gap in steps:
        log_id += gap
        items.append(item("a", log_id, 10) if is_logged else raw("a", len(items)))
    ids = [one[2] for one in items if one[2]]
    block = Block.of(items)
    assert (block.first, block.last) == ((ids[0], ids[-1]) if ids else (2**63, 0))
    above = block.seen_from(after)
    wanted = [one for one in items if not one[2] or one[2] > after]
    assert above.data == b"".join(one[1] for one in wanted)
    assert above.first > after and above.last in (block.last, 0)


class Client(Subscription):
    """A stream whose generator never waits: where it would, the next heartbeat comes."""

    __slots__ = ("output", "pieces", "world")

    def __init__(self, world: World, channels: str, limit: int, last_event_id: int | None) -> None:
        super().__init__(channels, limit)
        self.world = world
        self.output = b""
        self.pieces: Iterator[bytes] = iter(world.stream(self, last_event_id))
        self.step()  # the first line, which leaves before anything is waited for
        self.step()

    def _park(self) -> None:
        self.world.hub.beat()

    def step(self) -> None:
        self.output += next(self.pieces)

    @property
    def to_come(self) -> int:
        """Bytes that were offered and that no step has had."""
        return 0 if self._buffer is None else self._buffer.size - self._buffer._in_flight

    def check(self, last_event_id: int | None, *, undone: bool) -> None:
        """Compare what came with the log, which it must have up to its end; after events were undone, since a reset."""
        start = opening_id(self.output)
        assert last_event_id is None or start == last_event_id
        numbers = raw_in(self.output)
        assert numbers == sorted(set(numbers))
        assert undone or model.RESET not in self.output
        *_, output = self.output.split(model.RESET)
        if reset := re.match(rb"id: (\d+)\n", output):
            start = int(reset[1])
        assert logged_in(output) == [one[2] for one in self.world.log.on(self.channels, start)]


@pytest.mark.parametrize(
    "undoes", [pytest.param(False, marks=pytest.mark.slow), True], ids=["nothing is undone", "events are undone"]
)
@settings(deadline=None, max_examples=100 * LONG, suppress_health_check=LARGE)
@given(st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2]))
def test_every_stream_has_exactly_the_log_whatever_the_order_of_things(
    undoes: bool, chooser: random.Random, fails: float
) -> None:
    world = World(ModelLog(chooser.randrange(1 << 30), 0.0))
    given: list[int] = []  # all ids, also of events that were undone
    away = False  # the log has lost events, and the hub has not heard of it
    clients: list[tuple[Client, int | None]] = []
    numbers = 0
    for _ in range(chooser.randrange(5, 60)):
        act = chooser.choice(["publish", "publish", "deliver", "deliver", "open", "step", "step", "drain", "beat"])
        if undoes and not away and chooser.random() < 0.2:
            world.log.undo(chooser.choice([1, 3, 30]))
            away = True
        if away and chooser.random() < 0.4:
            world.reconnect()
            away = False
        if away and act == "deliver":
            continue
        if act == "publish":
            for _ in range(chooser.choice([1, 2, 10])):
                size = chooser.choice([20, 20, 60, 400])
                given.append(world.log.append(chooser.choice(CHANNELS), size, chooser.randrange(1, 4))[2])
        elif act == "deliver":
            extra = [raw(chooser.choice(CHANNELS), numbers + n) for n in range(chooser.choice([0, 0, 1, 3]))]
            numbers += len(extra)
            world.deliver(chooser.choice([0, 1, 5, 100]), extra)
        elif act == "open":
            ids = [FIRST, *given]
            known = chooser.choice([None, 0, ids[-1], chooser.choice(ids), chooser.choice(ids[-5:])])
            channels = "".join(chooser.sample(CHANNELS, chooser.choice([1, 1, 2, 4])))
            clients.append((Client(world, channels, chooser.choice([1, 50, 200, 5000]), known), known))
        elif act == "beat":
            world.hub.beat()
        elif clients:
            client, _ = chooser.choice(clients)
            world.log._fails = fails
            for _ in range(1 if act == "step" else 10):
                client.step()
            world.log._fails = 0.0
        if clients and chooser.random() < 0.05:
            world.hub.close(clients.pop(chooser.randrange(len(clients)))[0])
    if away:
        world.reconnect()
    while world.undelivered:
        world.deliver(7)
    for client, _ in clients:
        steps = 0
        while not (client.live and client.sent >= world.hub.position and not client.to_come):
            client.step()
            steps += 1
            assert steps < 10_000, "a stream never has it all"
    for client, known in clients:
        client.check(known, undone=undoes)


def test_a_stream_asks_rarely_where_the_log_has_lost_what_the_hub_still_has() -> None:
    """Until the listener finds out. What the hub remembers does not fit the stream, and the log has nothing more."""
    world = World(ModelLog(1))
    ids = [world.log.append("a", 400)[2] for _ in range(5)]
    world.deliver(5)
    world.log.undo(3)
    client = Client(world, "a", 50, ids[1])
    for _ in range(5):
        client.step()
    assert world.log.pages < 10
    world.reconnect()
    new = world.log.append("a", 20)[2]
    world.deliver(1)
    while new not in logged_in(client.output):
        client.step()
    client.check(ids[1], undone=False)


def test_a_stream_whose_buffer_is_full_is_told_too_that_events_were_undone() -> None:
    """It falls behind at the reset, and then has to ask the log."""
    world = World(ModelLog(1))
    client = Client(world, "a", 1, None)
    undone = world.log.append("a", 20)[2]
    world.deliver(1)
    client.step()
    client.step()
    assert logged_in(client.output) == [undone] and model.RESET not in client.output
    world.log.undo(1)
    world.reconnect()
    client.step()
    assert model.RESET in client.output
    client.check(None, undone=True)


@pytest.mark.slow
@settings(deadline=None, max_examples=30 * LONG, suppress_health_check=LARGE)
@given(st.randoms(use_true_random=False), st.sampled_from([400, 2000, 100_000]))
def test_what_is_remembered_is_all_there_was_or_nothing(chooser: random.Random, limit: int) -> None:
    """Against a list of all that came, and a set of what cannot be known."""
    recent = History()
    log = ModelLog(chooser.randrange(1 << 30))
    position = log.head
    asked: list[tuple[str, int]] = []
    before = recent_module.RING_BYTES, recent_module.TOTAL_BYTES
    recent_module.RING_BYTES, recent_module.TOTAL_BYTES = limit, 3 * limit
    try:
        for _ in range(chooser.randrange(10, 80)):
            act = chooser.choice(["add", "add", "add", "begin", "ask", "fill", "trim", "end", "restart"])
            channel = chooser.choice(CHANNELS)
            if act == "add":
                new = [
                    log.append(chooser.choice(CHANNELS), chooser.choice([20, 60, 150]))
                    for _ in range(chooser.choice([1, 3, 10]))
                ]
                position = log.head
                recent.add([*new, raw(channel, 1)])
            elif act == "begin":
                recent.begin([channel], position)
            elif act == "ask":
                asked += recent.gaps(chooser.sample(CHANNELS, 2)).items()
            elif act == "fill" and asked:
                name, upto = asked.pop(chooser.randrange(len(asked)))
                [tail] = log.last({name: upto}, 0)
                recent.fill(tail, upto)
            elif act == "trim":
                recent.trim()
            elif act == "end":
                recent.end(channel)
            elif act == "restart" and chooser.random() < 0.3:
                log.append(channel, 20)  # it was not heard
                position = log.head
                recent.restart(position)
            rings = recent._rings.values()
            for ring in rings:
                assert ring.size <= limit and ring.size >= sum(len(one[1]) for one in ring.items)
            if act == "trim":
                assert sum(ring.size for ring in rings) <= 3 * limit
            for _ in range(3):
                wanted = chooser.sample(CHANNELS, chooser.choice([1, 2]))
                near = [one[2] + distance for one in log.items for distance in (-1, 0)]
                after = chooser.choice([0, 0, FIRST, FIRST, position, position, *near])
                found = recent.missed(wanted, after)
                assert found is None or found == log.on(wanted, after)
                if found is None:
                    assert any(name not in recent._rings or after < recent._rings[name].after for name in wanted)
    finally:
        recent_module.RING_BYTES, recent_module.TOTAL_BYTES = before


@pytest.mark.slow
def test_what_is_remembered_stays_within_its_bounds() -> None:
    """Two thousand channels, each with much more than its share, in events of all sizes."""
    names = [f"room-{number}" for number in range(2000)]
    recent = History()
    tracemalloc.start()
    try:
        for index, name in enumerate(names):
            recent.begin([name], FIRST)
            [(_, upto)] = recent.gaps([name]).items()
            size = (20, 200, 2000)[index % 3]
            recent.fill(Tail(name, 0, [item(name, log_id, size) for log_id in range(1, 65)]), upto)
            recent.add([item(name, 1000 + 1000 * index + number, size) for number in range(100)])
        recent.trim()
        memory = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    print(f"{memory / 1e6:.1f} MB")
    assert all(recent._rings[name].items for name in names)
    assert TOTAL_BYTES // 2 < memory < TOTAL_BYTES + 2000 * 1500, "the rings themselves come on top"


def test_an_answer_of_the_log_that_no_longer_fits_is_not_used() -> None:
    """Events that came while the log was asked have pushed out events that are not in its answer."""
    recent = History()
    recent.begin("a", FIRST)
    [(channel, upto)] = recent.gaps("a").items()
    events = [item("a", FIRST + number, 10_000) for number in range(1, 40)]
    recent.add(events)
    kept = recent.missed("a", FIRST + 35)
    assert kept == events[35:] and recent.missed("a", upto) is None, "more than is kept of one channel"
    recent.fill(Tail(channel, 0, [item("a", 50, 10)]), upto)
    for number in range(40):
        found = recent.missed("a", FIRST + number)
        assert found is None or found == events[number:]


def test_a_channel_whose_listen_is_under_way_is_not_remembered_yet() -> None:
    """This holds even if another stream asks the log for it, on behalf of a stream that has gone."""
    log = ModelLog(1)
    world = World(log)
    gone = Client(world, "a", 1000, FIRST)
    world.replay._unfilled.add((), "a")  # it was killed while it waited for its turn to ask
    world.hub.close(gone)
    world.hub.sweep()
    come = Subscription("a", 1000)  # and on its channel, whose LISTEN has ended, there comes another
    world.hub.open(come)
    Client(world, "b", 1000, FIRST)
    missed = log.append("a", 20)  # not heard: LISTEN comes after it
    world.hub.deliver((), log.head)
    pieces = world.replay.read(come)
    come.sent = FIRST
    output = b"".join(pieces) + (b"" if not come.waiting else come.take() or b"")
    assert logged_in(output) == [missed[2]]


def test_a_stream_without_a_place_in_the_log_does_not_begin_at_its_beginning() -> None:
    """The log was installed after the stream opened: the stream has heard events that the log may hold too."""
    hub = World(ModelLog(1)).hub
    hub.position = 0
    early = Subscription("a", 10)
    hub.open(early)
    hub.go_live(early)
    hub.deliver([item("a", 101, 50)], 101)
    hub.deliver([item("a", 102, 50)], 102)
    end = early.take()
    assert end is not None and b'{"reason": "behind"}' in end


RACE = """
import random, sys, threading, time
if "gevent" in sys.argv:
    import gevent.monkey
    gevent.monkey.patch_all()
sys.setswitchinterval(1e-6)
from flask_pg_sse.hub.subscription import Subscription
from tests.support.model import ModelLog, World, logged_in, opening_id, FIRST, RESET
log = ModelLog(1)
world = World(log, heartbeat=0.01)
done = threading.Event()
failures = []
behind = [0]
fall_behind = Subscription.fall_behind
def counted(self):
    behind[0] += 1
    fall_behind(self)
Subscription.fall_behind = counted
def publish():
    chooser = random.Random(2)
    for number in range(1000):
        for _ in range(chooser.choice([1, 1, 3])):
            log.append(chooser.choice("ab"), chooser.choice([20, 20, 100]), chooser.choice([1, 2]))
        if chooser.random() < 0.8:
            world.deliver(chooser.choice([1, 5, 1000]))
        if number % 50 == 0:
            world.hub.beat()
        if chooser.random() < 0.4:
            time.sleep(0.002)
    while world.undelivered:
        world.deliver(3)
    done.set()
def listen(seed):
    chooser = random.Random(seed)
    known, wanted = FIRST, ["a", "b", "ab"][seed % 3]
    got = []
    try:
        while True:
            subscription = Subscription(wanted, chooser.choice([60, 150, 400]))
            pieces = iter(world.stream(subscription, known))
            output = next(pieces)  # the first line
            stays = chooser.choice([1, 5, 50, 500])
            while stays:
                stays -= 1
                output += next(pieces)
                assert RESET not in output
                if chooser.random() < 0.05:
                    time.sleep(chooser.choice([0, 0.001, 0.01]))
                if done.is_set() and subscription.live and subscription.sent >= log.head:
                    stays = 0
            pieces.close()
            world.hub.sweep()
            assert opening_id(output) == known
            got += logged_in(output)
            known = subscription.sent
            if done.is_set() and known >= log.head:
                break
        backlog = subscription._buffer
        while backlog is not None and b"[" in backlog._rest[backlog._rest_from:]:
            got += logged_in(subscription.take())
        expected = [one[2] for one in log.on(wanted, FIRST)]
        assert got == expected, [(a, b) for a, b in zip(got, expected) if a != b][:3] or (len(got), len(expected))
    except BaseException as error:
        failures.append((seed, repr(error)[:500]))
def tick():
    while not done.is_set() or any(thread.is_alive() for thread in threads):
        world.hub.beat()
        time.sleep(0.005)
threads = [threading.Thread(target=listen, args=(seed,)) for seed in range(9)] + [threading.Thread(target=publish)]
for thread in threads: thread.start()
ticker = threading.Thread(target=tick)
ticker.start()
for thread in threads: thread.join(60)
if any(thread.is_alive() for thread in threads):
    print("stuck", failures); import os; sys.stdout.flush(); os._exit(1)
ticker.join()
assert not failures, failures
assert behind[0] > 50 and log.pages > 100, (behind, log.pages)
assert not world.hub._sets
print("fine", behind[0], log.pages, log.tail_reads)
"""


def race(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, *words], capture_output=True, text=True, timeout=120, cwd=servers.ROOT
    )
    print(done.stdout)
    assert done.stdout.startswith("fine"), (done.stdout, done.stderr)


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_by_threads_that_fall_behind_and_come_back() -> None:
    race()


def test_nothing_is_lost_or_doubled_by_greenlets_that_fall_behind_and_come_back() -> None:
    race("gevent")


def test_a_stream_in_the_middle_of_the_log_is_told_that_its_position_was_undone() -> None:
    """Its position was good when it was looked up, and the hub remembers nothing after it that the stream lacks."""
    world = World(ModelLog(1))
    events = [world.log.append("a", 60) for _ in range(20)]
    world.deliver(20)
    client = Client(world, "a", 1, FIRST)
    while len(logged_in(client.output)) < 5:
        client.step()
    assert not client.live
    world.log.undo(18)
    world.reconnect()
    for _ in range(5):
        client.step()
    assert model.RESET in client.output
    assert logged_in(client.output.partition(model.RESET)[0])[:5] == [log_id for _, _, log_id in events[:5]]
