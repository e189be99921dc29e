"""What every engine does: `flask_pg_sse/engine/base.py` as tests, over all that `tests/support/engines.py` lists."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import pytest

from flask_pg_sse.engine.base import Disconnect, Engine, Item, Readiness
from flask_pg_sse.errors import ConfigurationError
from flask_pg_sse.event import Event, encode
from tests.support.client import eventually
from tests.support.engines import ENGINES, LOGGED, Bus, Process, together

Start = Callable[..., Process]


@pytest.fixture(params=ENGINES)
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    with ENGINES[request.param](request) as bus:
        yield bus


keeps_events = pytest.mark.parametrize("bus", LOGGED, indirect=True)


@pytest.fixture
def start(bus: Bus) -> Iterator[Start]:
    """Start an engine that hears some channels; it is stopped after the test."""
    started: list[Engine] = []

    def start(*channels: str) -> Process:
        engine = bus.new_engine()
        started.append(engine)
        return Process(engine, *channels)

    yield start
    for engine in started:
        engine.stop(5)


def texts(items: list[Item]) -> list[str]:
    return [data.decode().partition("data: ")[2].strip() for _, data, _ in items]


def publish(engine: Engine, channel: str, *data: str) -> int | None:
    return engine.publish(channel, [Event(text) for text in data])


# -- hearing


def test_events_arrive_once_in_order_and_encoded(start: Start) -> None:
    one = start("a", "b")
    events = [Event("x", event="named", comment="seen"), Event("two\nlines"), Event(""), Event("naïve \U0001f600")]
    one.engine.publish("a", events)
    publish(one.engine, "b", "last")
    found = one.sink.wait(5)
    assert [channel for channel, _, _ in found] == ["a"] * 4 + ["b"]
    pairs = zip(events, found[:4], strict=True)
    assert [data for _, data, _ in found[:4]] == [encode(event, id or None) for event, (_, _, id) in pairs]


def test_other_channels_are_not_heard(start: Start) -> None:
    one = start("a")
    for channel in ("b", "A", "a b", "a"):
        publish(one.engine, channel, channel)
    assert texts(one.sink.wait(1)) == ["a"]


def test_the_engine_counts_who_wants_a_channel(start: Start) -> None:
    one = start("a")
    assert one.engine.subscribe(["a", "b"]).wait(20)
    one.engine.unsubscribe(["a", "b"])
    publish(one.engine, "a", "still heard")
    assert texts(one.sink.wait(1)) == ["still heard"]
    one.engine.unsubscribe(["a"])
    assert one.engine.subscribe(["a"]).wait(20), "and a channel that nobody wanted is heard again"
    publish(one.engine, "a", "again")
    assert texts(one.sink.wait(2)) == ["still heard", "again"]


def test_a_confirmed_ticket_misses_nothing(start: Start) -> None:
    one = start()
    for number in range(30):
        assert one.engine.subscribe([f"room-{number}"]).wait(20)
        publish(one.engine, f"room-{number}", str(number))
    assert texts(one.sink.wait(30)) == [str(number) for number in range(30)]


def test_equal_events_are_as_many_events(start: Start) -> None:
    one = start("a")
    publish(one.engine, "a", *["same"] * 5)
    publish(one.engine, "a", "same")
    assert texts(one.sink.wait(6)) == ["same"] * 6


def test_readiness_is_told_before_the_first_event(start: Start) -> None:
    one = start("a")
    publish(one.engine, "a", "x")
    one.sink.wait(1)
    kinds = [what for what, _ in one.sink.told]
    assert ("ready", Readiness.READY) in one.sink.told[: kinds.index("deliver") + 1]
    status = one.engine.status()
    assert status.readiness is Readiness.READY and status.channels >= 1 and status.position == one.sink.position


def test_other_processes_hear_it_too(start: Start, bus: Bus) -> None:
    processes = [start("a") for _ in range(3 if bus.shared else 1)]
    last = publish(processes[0].engine, "a", "x", "y")
    for process in processes:
        assert texts(process.sink.wait(2)) == ["x", "y"]
        assert process.sink.items == processes[0].sink.items
        assert process.sink.items[-1][2] == (last or 0)


def test_an_engine_that_was_not_started_sends(start: Start, bus: Bus) -> None:
    hearing = start("a")
    sending = bus.new_engine() if bus.shared else hearing.engine
    publish(sending, "a", "x")
    assert texts(hearing.sink.wait(1)) == ["x"]
    sending.stop(5)


def test_what_has_stopped_hears_nothing(start: Start) -> None:
    one = start("a")
    one.engine.stop(5)
    publish(one.engine, "a", "x")
    assert not one.sink.items
    one.engine.stop(5)  # harmless


# -- ids


def test_ids_rise_over_all_channels_and_are_the_position(start: Start, bus: Bus) -> None:
    one = start("a", "b")
    ids = [publish(one.engine, "ab"[number % 2], str(number)) for number in range(10)]
    if not bus.logged:
        assert ids == [None] * 10 and {id for _, _, id in one.sink.wait(10)} == {0}
        assert one.sink.position == one.engine.head() == 0
        return
    assert [id for _, _, id in one.sink.wait(10)] == ids
    assert all(before < after for before, after in itertools.pairwise(ids) if before and after)
    turns = [told for what, told in one.sink.told if what == "deliver" and told[0]]
    assert all(position == turn[-1][2] for turn, position in turns)


def test_publishers_at_once_are_heard_in_the_order_of_their_ids(start: Start, bus: Bus) -> None:
    hearing = start("a", "b")

    def sender(name: str) -> Callable[[], object]:
        engine = start().engine if bus.shared else hearing.engine
        return lambda: [publish(engine, "ab"[n % 2], f"{name}{n}") for n in range(50)]

    together(*map(sender, "xyz"))
    found = hearing.sink.wait(150)
    assert len(set(texts(found))) == len(found) == 150
    for name in "xyz":
        assert [text for text in texts(found) if text[0] == name] == [f"{name}{n}" for n in range(50)]
    if bus.logged:
        ids = [id for _, _, id in found]
        assert ids == sorted(ids)


def test_an_ephemeral_event_has_no_id_and_is_not_kept(start: Start, bus: Bus) -> None:
    one = start("a")
    before = one.engine.head()
    assert one.engine.publish("a", [Event("typing")], durable=False) is None
    assert [(data, id) for _, data, id in one.sink.wait(1)] == [(b"data: typing\n\n", 0)]
    assert one.engine.head() == before


# -- the log


@keeps_events
def test_pages_have_every_event_once_and_in_order(start: Start) -> None:
    engine = start().engine
    begin = engine.head()
    sent = [(channel, publish(engine, channel, "x" * size)) for size in range(1, 60, 7) for channel in "abc"]
    for channels in (["a"], ["a", "c"], ["nothing"]):
        expected = [id for channel, id in sent if channel in channels]
        found: list[int] = []
        after, pages = begin, 0
        while True:
            page = engine.page(channels, after, 100, 0)
            pages += 1
            assert page.refusal is None and page.upto >= after and page.head == sent[-1][1]
            found += [id for _, _, id in page.items]
            after = page.upto
            if after >= page.head:
                break
        assert found == expected and (pages > 1 or not expected)
    assert engine.page(["a"], engine.head(), 100, 0).items == []


@keeps_events
def test_pages_and_deliveries_are_the_same_bytes(start: Start) -> None:
    one = start("a")
    begin = one.engine.head()
    one.engine.publish("a", [Event("x", event="e", id="own", retry=1000, comment="c"), Event("\0"), Event("y\r\nz")])
    delivered = one.sink.wait(3)
    assert list(one.engine.page(["a"], begin, 10_000, 0).items) == delivered


@keeps_events
def test_an_event_that_is_larger_than_a_page_comes_alone(start: Start) -> None:
    one = start("a")
    begin = one.engine.head()
    publish(one.engine, "a", "before")
    large = publish(one.engine, "a", "x" * 1_000_000)
    publish(one.engine, "a", "behind")
    assert [len(data) > 1_000_000 for _, data, _ in one.sink.wait(3)] == [False, True, False]
    first = one.engine.page(["a"], begin, 1000, 0)
    assert texts(list(first.items)) == ["before"] and first.too_large is None
    page = one.engine.page(["a"], first.upto, 1000, 0)
    assert not page.items and page.too_large is not None and page.too_large[0] == large
    whole = one.engine.page(["a"], first.upto, 0, page.too_large[1])
    assert [id for _, _, id in whole.items] == [large] and whole.upto >= (large or 0)
    assert texts(list(one.engine.page(["a"], large or 0, 1000, 0).items)) == ["behind"]


@keeps_events
def test_the_last_events_of_a_channel_are_complete_from_where_they_say(start: Start) -> None:
    engine = start().engine
    ids = {channel: [publish(engine, channel, f"{channel}{n}") or 0 for n in range(20)] for channel in "ab"}
    upto = {"a": ids["a"][9], "b": ids["b"][19], "empty": engine.head()}
    for max_bytes in (0, 30, 200, 100_000):
        tails = {tail.channel: tail for tail in engine.last(upto, max_bytes)}
        assert tails.keys() == upto.keys()
        for channel, tail in tails.items():
            expected = [id for id in ids.get(channel, []) if tail.after < id <= upto[channel]]
            assert [id for _, _, id in tail.items] == expected
        if max_bytes in (0, 100_000):
            assert len(tails["a"].items) == (10 if max_bytes else 0)
    assert not tails["empty"].items


@keeps_events
def test_a_position_that_is_not_in_the_log_is_told(start: Start) -> None:
    engine = start().engine
    begin = engine.head()
    first = publish(engine, "a", "x") or 0
    last = publish(engine, "b", "x") or 0
    reasons: dict[int, str | None] = {0: None, 1: "too-old", begin - 1: "too-old", begin: None, first: None, last: None}
    # Nobody was ever given such ids, unless the log has lost them.
    reasons |= {last + 1: "undone", last + 1000: "undone", 2**62: "future-id"}
    if last > first + 1:
        reasons[last - 1] = "undone"
    for after, reason in reasons.items():
        assert engine.page(["a"], after, 100, 0).refusal == reason, after
    look = engine.look(reasons)
    assert look.head == last == engine.head()
    assert look.refusals == {after: reason for after, reason in reasons.items() if reason}


# -- between processes


@pytest.mark.parametrize("message", [Disconnect("ann", None), Disconnect(None, "a"), Disconnect("ann", "a")])
def test_every_process_obeys_a_control_message_once(start: Start, bus: Bus, message: Disconnect) -> None:
    processes = [start("a") for _ in range(2 if bus.shared else 1)]
    if not bus.commands:
        with pytest.raises(ConfigurationError, match=r"disconnect\(\) needs PostgreSQL"):
            processes[0].engine.control(message)
        return
    processes[0].engine.control(message)
    publish(processes[0].engine, "a", "after it")
    for process in processes:
        process.sink.wait(1)
        assert process.sink.messages == [message]
        kinds = [what for what, told in process.sink.told if what == "control" or (what == "deliver" and told[0])]
        assert kinds == ["control", "deliver"], "and before any event that was sent after it"
        assert all(channel == "a" for channel, _, _ in process.sink.items), "it is no event"


def test_all_processes_share_a_clock(start: Start) -> None:
    assert abs(start().engine.now() - time.time()) < 60


def test_many_come_and_go(start: Start) -> None:
    """Tickets of many threads at once, while events come."""
    one = start()

    def listen(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(10):
                assert one.engine.subscribe(["all", name]).wait(20)
                publish(one.engine, name, name)
                one.engine.unsubscribe(["all", name])

        return run

    together(*map(listen, "abcdef"))
    eventually(lambda: len(one.sink.items) == 60, 20, "every event of a channel that was heard is delivered")
