"""One stream's buffer, and the fan-out to many: order, bounds, wake-ups, by threads and by greenlets."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse import event
from flask_pg_sse.concurrency import greenlets
from flask_pg_sse.engine.base import Disconnect
from flask_pg_sse.hub import hub as hub_module
from flask_pg_sse.hub.admission import TryLater
from flask_pg_sse.hub.block import Block, Position
from flask_pg_sse.hub.buffer import PIECE_BYTES
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.subscription import Subscription, Terms


class Confirmed:
    """A ticket that is granted, or, while `granted` is false, waited for."""

    def __init__(self, granted: bool = True) -> None:
        self.granted = granted
        self.cancelled = threading.Event()

    def wait(self, timeout: float) -> bool:
        return self.granted or (self.cancelled.wait(timeout) and False)

    def cancel(self) -> None:
        self.cancelled.set()


def make_hub(log: list[str] | None = None, ticket: Confirmed | None = None, heartbeat: float = 15) -> Hub:
    class Engine:
        def subscribe(self, channels: Iterable[str], client: Hashable) -> Confirmed:
            if log is not None:
                log.append("listen " + " ".join(sorted(channels)))
            return ticket or Confirmed()

        def unsubscribe(self, channels: Iterable[str]) -> None:
            if log is not None:
                log.append("unlisten " + " ".join(sorted(channels)))

    return Hub(Engine(), heartbeat=heartbeat, retry=3000)


def live(channels: Iterable[str], limit: int) -> Subscription:
    subscription = Subscription(channels, limit)
    subscription.go_live(0, Block(b""), 0.0)
    return subscription


def opened(hub: Hub, channels: Iterable[str], limit: int = 1000) -> Subscription:
    subscription = Subscription(channels, limit)
    hub.open(subscription)
    hub.go_live(subscription)
    return subscription


def drain(subscription: Subscription) -> list[bytes]:
    subscription.end(b"")
    pieces = []
    while (piece := subscription.take()) is not None:
        pieces.append(piece)
    return pieces


def test_all_that_waits_goes_in_one_piece() -> None:
    subscription = live(["a"], 1000)
    for number in range(5):
        assert subscription.offer(Block(b"%d," % number), 0.0)
    assert subscription.take() == b"0,1,2,3,4,"


def test_large_blocks_go_in_pieces() -> None:
    subscription = live(["a"], 10)
    block = random.Random(1).randbytes(3 * PIECE_BYTES + 17)
    assert subscription.offer(Block(block), 0.0), "one larger than the limit is taken where nothing waits"
    pieces = drain(subscription)
    assert b"".join(pieces) == block
    assert max(map(len, pieces)) == PIECE_BYTES


def test_the_limit_counts_what_waits_and_what_is_in_flight() -> None:
    subscription = live(["a"], 100)
    assert subscription.offer(Block(b"x" * 60), 0.0)
    assert subscription.take() == b"x" * 60  # with the server now
    assert subscription.waiting == 60
    assert not subscription.offer(Block(b"y" * 41), 0.0)
    assert subscription.offer(Block(b"y" * 40), 0.0)
    assert subscription.take() == b"y" * 40  # asking for more says that the first is sent
    assert subscription.waiting == 40


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500), st.randoms(use_true_random=False))
def test_whatever_the_sizes_order_is_kept_and_the_limit_holds(
    sizes: list[int], limit: int, chooser: random.Random
) -> None:
    subscription = live(["a"], limit)
    sent, received = b"", b""
    for number, size in enumerate(sizes):
        block = bytes([number % 256]) * size
        before = subscription.waiting
        if subscription.offer(Block(block), 0.0):
            sent += block
            assert subscription.waiting <= limit + (max(sizes) if max(sizes) > limit else 0)
        else:
            assert before and before + size > limit
        if subscription.waiting and received != sent and chooser.random() < 0.5:
            received += subscription.take() or b""
    received += b"".join(drain(subscription))
    assert received == sent


def test_what_was_offered_before_the_end_comes_before_it() -> None:
    subscription = live(["a"], 1000)
    subscription.offer(Block(b"last"), 0.0)
    subscription.end(b"end")
    subscription.end(b"another end")
    assert subscription.offer(Block(b"too late"), 0.0)
    assert [subscription.take(), subscription.take(), subscription.take()] == [b"last", b"end", None]


def test_an_end_in_place_of_what_waits() -> None:
    subscription = live(["a"], 1000)
    subscription.offer(Block(b"dropped"), 0.0)
    subscription.end(b"end", drop=True)
    assert [subscription.take(), subscription.take()] == [b"end", None]


RACE = """
import sys
if "gevent" in sys.argv:
    import gevent.monkey
    gevent.monkey.patch_all()
import random, threading, time
sys.setswitchinterval(1e-6)
from flask_pg_sse.hub.block import Block
from flask_pg_sse.hub.subscription import Subscription
for round in range(30):
    subscription = Subscription(["a"], 1 << 30)
    subscription.go_live(0, Block(b""), 0.0)
    def write():
        for number in range(2000):
            subscription.offer(Block(b"%d," % number), 0.0)
            if number % 7 == 0:
                time.sleep(0)
        subscription.end(b"end")
    received = []
    def read():
        while (piece := subscription.take()) is not None:
            received.append(piece)
    threads = [threading.Thread(target=target) for target in (read, write)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a wake-up was lost"
    assert b"".join(received) == b"".join(b"%d," % n for n in range(2000)) + b"end"
print("fine")
"""


def race(*words: str) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr


def test_no_wake_up_is_lost_between_threads() -> None:
    race()


def test_no_wake_up_is_lost_between_greenlets() -> None:
    race("gevent")


KILL = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent
from flask_pg_sse.hub.block import Block
from flask_pg_sse.hub.subscription import Subscription
subscription = Subscription(["a"], 1000)
subscription.go_live(0, Block(b""), 0.0)
reader = gevent.spawn(subscription.take)
gevent.sleep(0)
reader.kill(block=False)           # it will leave its spot …
subscription.offer(Block(b"x"), 0.0)      # … before this wake-up gets there
reader.join()
def next_reader():
    with gevent.Timeout(0.05, False):
        return subscription.take()
assert next_reader() == b"x"
assert next_reader() is None       # times out while parked
subscription.offer(Block(b"y"), 0.0)
assert subscription.take() == b"y"
print("fine")
"""


def test_a_greenlet_that_is_killed_in_its_spot_confuses_nobody() -> None:
    done = subprocess.run([sys.executable, "-c", KILL], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr


def test_streams_of_the_same_channels_share_the_bytes() -> None:
    hub = make_hub()
    same = [opened(hub, ["b", "a"]), opened(hub, ["a", "b"])]
    other = opened(hub, ["a"])
    hub.deliver([("b", b"1", 0), ("a", b"2", 0), ("c", b"3", 0), ("b", b"4", 0)], 0)
    first, second = same[0].take(), same[1].take()
    assert first == b"124", "in the order of the turn, over both channels"
    assert first is second
    assert other.take() == b"2"


def test_the_tables_are_empty_when_all_have_gone() -> None:
    log: list[str] = []
    hub = make_hub(log)
    streams = [Subscription(names, 1000) for names in ("a", "ab", "ab", "c")]
    for subscription in streams:
        hub.open(subscription)
    for subscription in streams:
        hub.close(subscription)
        hub.close(subscription)
    hub.sweep()
    assert not hub._sets and not hub._sets.of_channel and not len(hub)
    came = ["listen a", "listen a b", "listen a b", "listen c"]
    assert log == came + [f"un{line}" for line in came]
    hub.close(Subscription("a", 1000))  # never opened


def test_a_stream_that_waits_for_listen_is_let_go_at_the_end() -> None:
    ticket = Confirmed(granted=False)
    hub = make_hub(ticket=ticket)
    subscription = Subscription("a", 1000)
    hub.open(subscription)
    answers: list[str] = []

    def wait() -> None:
        with pytest.raises(TryLater) as refused:
            hub.wait_until_heard(subscription)
        answers.append(refused.value.reason)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not subscription.waits_for:
        time.sleep(0)
    hub.drain("shutdown")
    waiting.join(5)
    assert answers == ["shutdown"]
    with pytest.raises(TryLater, match="shutdown"):  # and so is one that comes later
        hub.open(Subscription("a", 1000))


def test_a_stream_is_told_of_a_gap_only_once_it_was_promised_something() -> None:
    hub = make_hub()
    told, waiting = opened(hub, "a"), Subscription("a", 1000)
    hub.open(waiting)
    hub.gap("reconnected", 0)
    assert told.take() == b'event: sse-reset\ndata: {"reason": "reconnected"}\n\n'
    assert not waiting.waiting


def sent(subscription: Subscription) -> bytes | None:
    """Return what there is to send, as by a generator that has sent it and looks for more."""
    if not subscription._has_work():
        return None
    piece = subscription.take()
    if subscription._buffer is not None:
        subscription._buffer.arrived()
    return piece


class Clock:
    """The monotonic time, which stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_heartbeats_go_to_streams_that_are_quiet_and_have_nothing_waiting(clock: Clock) -> None:
    hub = make_hub(heartbeat=10)
    quiet, stuck, apart, busy = (opened(hub, channel) for channel in "aaab")
    stuck.offer(Block(b"waits"), clock.now)
    clock.now += 6
    hub.deliver([("b", b"x", 0)], 0)
    assert sent(busy) == b"x"
    apart.position = Position(active_at=clock.now)
    clock.now += 5
    hub.beat()
    assert sent(quiet) == event.HEARTBEAT
    assert sent(apart) == event.HEARTBEAT, "early, with the others of its channels"
    assert drain(stuck) == [b"waits"]
    assert sent(busy) is None
    clock.now += 6
    hub.beat()
    assert sent(busy) == event.HEARTBEAT, "ten seconds after its last event"
    assert sent(quiet) is None


def test_who_comes_puts_off_no_heartbeat_of_those_that_are_there(clock: Clock) -> None:
    """This holds even if the log has moved on, so that the streams of a channel have different positions."""
    hub = make_hub(heartbeat=10)
    hub.deliver((), 1)
    first = opened(hub, "a")
    clock.now += 11
    hub.deliver((), 5)
    second = opened(hub, "a")
    hub.beat()
    assert first.waiting and first.take() == b"event: sse-cursor\nid: 5\ndata: {}\n\n"
    assert second.waiting and second.take() == event.HEARTBEAT


def test_a_channel_that_was_left_and_is_wanted_again_is_asked_by_its_new_time(clock: Clock) -> None:
    hub = make_hub(heartbeat=10)
    first = opened(hub, "a")
    hub.close(first)
    hub.sweep()
    clock.now += 5
    second = opened(hub, "a")
    for seconds, sign in ((6, None), (5, event.HEARTBEAT), (9, None), (1, event.HEARTBEAT)):
        clock.now += seconds
        hub.beat()
        assert sent(second) == sign


@pytest.mark.parametrize("stuck", [False, True])
def test_whoever_comes_keeps_no_position_from_those_that_are_there(clock: Clock, stuck: bool) -> None:
    """This holds although unlogged events keep the channel busy, and the position does not move again."""
    hub = make_hub(heartbeat=10)
    hub.deliver((), 1)
    first = opened(hub, "a")
    hub.deliver((), 5)
    second = opened(hub, "a")
    if stuck:
        first.offer(Block(b"waits"), clock.now)
    got: dict[Subscription, bytes] = {first: b"", second: b""}
    for _ in range(4):
        clock.now += 5
        hub.deliver([("a", b"raw", 0)], 5)
        hub.beat()
        for stream in (second,) if stuck else (first, second):
            while (piece := sent(stream)) is not None:
                got[stream] += piece
    if stuck:
        got[first] = b"".join(drain(first))
    assert got[second] == b"raw" * 4
    assert got[first].replace(b"waits", b"").replace(b"raw", b"") == b"event: sse-cursor\nid: 5\ndata: {}\n\n"


def test_a_position_that_does_not_fit_any_more_is_read_in_the_log(clock: Clock) -> None:
    hub = make_hub(heartbeat=10)
    hub.deliver((), 1)
    slow = opened(hub, "a", limit=40)
    assert slow.offer(Block(b"x" * 35), clock.now)
    clock.now += 11
    hub.deliver((), 5)
    hub.beat()
    assert not slow.live and slow.sent == 1 and not slow.ended


def test_a_stream_that_is_behind_is_ended_and_the_others_go_on() -> None:
    hub = make_hub()
    slow, quick = opened(hub, "a", 10), opened(hub, "a", 20)
    for number in range(8):
        hub.deliver([("a", b"%d23456" % number, 0)], 0)
        assert quick.take() == b"%d23456" % number
    end = slow.take()
    assert end is not None and b'event: sse-end\ndata: {"reason": "behind"}\n\n' in end and end.startswith(b"retry: ")
    assert slow.take() is None


def test_blocks_that_are_dropped_while_they_are_taken_lose_no_end() -> None:
    class Dropped(list[Block]):
        """As if another thread had cleared it behind the taker's back."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            self.clear()
            return found

    for count in (1, 2):
        subscription = live("a", 1000)
        assert subscription.offer(Block(b"x"), 0.0)
        assert subscription._buffer is not None
        subscription._buffer._blocks = Dropped([Block(b"x")] * count)
        subscription.end(b"end")
        assert [subscription.take(), subscription.take(), subscription.take()] == [b"x" * count, b"end", None]


def test_who_is_interrupted_on_the_way_into_the_tables_leaves_nothing_behind() -> None:
    class Interrupted:
        def __enter__(self) -> None:
            raise TimeoutError

        def __exit__(self, *error: object) -> None: ...

    log: list[str] = []
    hub = make_hub(log)
    lock, hub._dispatch = hub._dispatch, cast(Any, Interrupted())
    subscription = Subscription("a", 1000)
    with pytest.raises(TimeoutError):
        hub.open(subscription)
    hub._dispatch = lock
    hub.close(subscription)
    hub.sweep()
    assert not len(hub) and not hub.admission.limiter._taken and log == []


def test_a_stream_may_be_closed_by_the_garbage_collector_at_any_moment() -> None:
    """The garbage collector runs in any thread, also in one that holds a lock of the hub."""
    log: list[str] = []
    hub = make_hub(log)
    subscription = Subscription("a", 1000)
    hub.open(subscription)

    def close_within_locks() -> None:
        with hub._dispatch:
            hub.close(subscription)

    thread = threading.Thread(target=close_within_locks, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    hub.sweep()
    assert not len(hub) and log == ["listen a", "unlisten a"]


def test_a_channel_for_each_beside_one_for_all_shares_the_bytes() -> None:
    hub = make_hub()
    streams = [opened(hub, ["news", f"user-{number}"]) for number in range(10)]
    hub.deliver([("news", b"1", 0), ("user-3", b"2", 0), ("news", b"3", 0)], 0)
    received = [stream.take() for stream in streams]
    assert received[3] == b"123"
    others = received[:3] + received[4:]
    assert others == [b"13"] * 9
    assert all(block is others[0] for block in others)


def test_a_large_page_lets_others_work_between(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = make_hub()
    for number in range(1000):
        opened(hub, ["news", f"user-{number}"])
    pauses: list[int] = []
    monkeypatch.setattr(greenlets, "checkpoint", lambda: pauses.append(1))
    hub.deliver([("news", b"x", 0)], 0)
    assert len(pauses) == 4


def test_nobody_is_looked_at_before_something_is_due(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    hub = make_hub(heartbeat=100)
    streams = [opened(hub, "a") for _ in range(3)]
    hub.beat()
    looked: list[Subscription] = []
    monkeypatch.setattr(hub, "_check", lambda stream, now: looked.append(stream))
    clock.now += 20
    hub.beat()
    assert not looked
    hub.disconnect(Disconnect("nobody", None))  # from now on ended streams must be cut off in time
    clock.now += hub_module.END_TIMEOUT
    hub.beat()
    assert set(looked) == set(streams)


def test_a_stream_that_is_to_end_is_looked_at_in_time() -> None:
    hub = make_hub(heartbeat=100)
    opened(hub, "a")
    hub.beat()
    ends_at = time.monotonic() + 0.05
    for at in (ends_at, ends_at + 0.05):
        soon = Subscription("a", 1000, Terms(ends_at=at, ends_because="max_age"))
        hub.open(soon)
        hub.go_live(soon)
        soon.awake.discard(soon)  # as if its generator were parked
    while not soon.ended:
        assert time.monotonic() < ends_at + 10
        hub.beat()
    assert time.monotonic() >= ends_at + 0.05


def test_who_asks_whether_there_is_work_writes_only_if_the_generator_waits_after_that() -> None:
    """With threads a generator may leave its spot, and have taken all that waited, at any moment of an offer."""

    class Overtaken(Subscription):
        """A stream whose generator takes the waiting bytes while the hub asks for them."""

        __slots__ = ()

        def _has_work(self) -> bool:
            if self._buffer is not None and self._way is not None:
                self._way = None
                assert self._buffer.next_piece() is not None
            return super()._has_work()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        subscription = Overtaken(["a"], 1_000_000)
        subscription.go_live(0, Block(b""), 0.0)
        subscription._way = ours  # it is parked
        assert subscription.offer(Block(b"x" * 100_000), 0.0)  # too large to be written past the generator
        assert subscription.offer(Block(b"data: next\n\n"), 0.0)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)  # while the generator sends
        assert subscription.waiting == 100_000 + len(b"data: next\n\n")
