"""Reading the event log: pages of any channels from any id on, and the tail of a channel. Against a model in Python."""

from __future__ import annotations

import random
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from flask import Flask

from flask_pg_sse.testing import stream
from tests.support.log import LONG, PUBLISH, InThread, connected, fill, run
from tests.support.postgres import execute

MakeApp = Callable[..., Flask]
CHANNELS = [f"room-{number}" for number in range(40)]


class Row(NamedTuple):
    id: int
    channel: str
    fields: str
    data: str | None

    @property
    def size(self) -> int:
        return len(self.fields.encode()) + len((self.data or "").encode())


@pytest.fixture
def seed() -> int:
    number = random.randrange(1_000_000)
    print(f"seed {number}")
    return number


def random_events(rng: random.Random, count: int, first: int) -> Iterator[Row]:
    number = first
    for _ in range(count):
        number += rng.choice([1, 1, 1, 2, 40])
        # One channel has most of the events, and some have none.
        channel = CHANNELS[0] if rng.random() < 0.3 else rng.choice(CHANNELS[:30])
        size = rng.choice([0, 1, 3, 10, 10, 30, 100]) if rng.random() < 0.98 else rng.choice([5_000, 70_000])
        fields = rng.choice(["{}", "{}", '{"event": "creäted"}'])
        if rng.random() < 0.02:
            yield Row(number, channel, '{"data": "' + "\\u0000" * size + '"}', None)
        else:
            yield Row(number, channel, fields, rng.choice("xé€") * size)


def filled(url: str, rng: random.Random, count: int) -> list[Row]:
    start = execute(url, "SELECT flask_pg_sse.head_v1()")[0][0]
    events = list(random_events(rng, count, start))
    fill(url, events)
    execute(url, "ANALYZE flask_pg_sse.event")
    return events


PAGE = (
    "SELECT id, channel, fields::text, data, size, upto, head, refusal "
    "FROM flask_pg_sse.page_v1(%s, %s, %s, %s) WITH ORDINALITY ORDER BY ordinality"
)


def read_page(connection: Any, *args: Any) -> tuple[str | None, int, int, list[tuple[Any, ...]]]:
    """Return the refusal, the head, upto and the rows of a page."""
    *rows, last = run(connection, PAGE, args)
    upto, head, refusal = last[5:]
    assert last[:5] == (None,) * 5 and {row[5:] for row in rows} <= {(None,) * 3}
    return refusal, head, upto, [row[:5] for row in rows]


def test_pages_have_every_event_once_and_in_order(log_url: str, seed: int) -> None:
    rng = random.Random(seed)
    events = filled(log_url, rng, 14_000)
    ids = [event.id for event in events]
    pruned, head = ids[0] - 1, ids[-1]
    execute(log_url, "UPDATE flask_pg_sse.retention SET pruned_through = %s", (pruned,))
    with connected(log_url, transactions=False) as connection:
        for round in range(20 * LONG):
            many = rng.random() < 0.4
            channels = rng.sample(CHANNELS, rng.randint(17, 40) if many else rng.choice([0, 1, 1, 2, 5, 16]))
            if channels and rng.random() < 0.5:
                channels = [
                    *(name for name in channels[1:] if name != CHANNELS[0]),
                    CHANNELS[0],
                ]  # more events than a page has rows
            channels += channels[: rng.randint(0, 2 if many else 16 - len(channels))]  # some twice
            max_bytes = rng.choice([0, 1, 10, 100, 1_000, 20_000, 262_144, 10**9, 10**9, 10**9])
            max_event = rng.choice([0, 0, 6_000, 10**9])
            after = rng.choice([0, pruned, rng.choice(ids), rng.choice(ids), head])
            known = set(channels)
            wanted = [event for event in events if event.id > after and event.channel in known]
            for _ in range(25):
                refusal, told_head, upto, rows = read_page(connection, channels, after, max_bytes, max_event)
                what = (round, channels, after, max_bytes, max_event)
                assert (refusal, told_head) == (None, head), what
                got = wanted[: len(rows)]
                del wanted[: len(rows)]
                limit = max(max_bytes, max_event)
                for row, event in zip(rows, got, strict=True):
                    whole = event.size <= limit
                    assert row[:2] == (event.id, event.channel) and row[4] == event.size, what
                    assert row[2:4] == ((event.fields, event.data) if whole else ("{}", None)), what
                total = sum(event.size for event in got)
                assert total <= max_bytes or len(got) == 1, what
                assert upto >= after and (not got or upto >= got[-1].id), what
                assert not wanted or upto < wanted[0].id, what
                if upto < head:  # it goes on: because the page is full, or so many were looked at that most are wanted
                    looked_at = bisect_right(ids, upto) - bisect_right(ids, after)
                    full = wanted and total + wanted[0].size > max_bytes and upto == got[-1].id
                    number = len(known)
                    enough = looked_at == 20 * number and len(got) * number >= 20 * looked_at
                    assert full or enough or len(got) == min(500, max_bytes // 64 + 1), what
                assert upto > after or after >= head, what
                after = upto
                if upto >= head:
                    assert not wanted, what
                    break


def test_a_page_of_an_empty_log(log_url: str) -> None:
    start = execute(log_url, "SELECT flask_pg_sse.head_v1()")[0][0]
    with connected(log_url, transactions=False) as connection:
        for after in (0, start):
            for channels in (["a"], CHANNELS, []):
                assert read_page(connection, channels, after, 1000, 0) == (None, start, start, [])


def test_an_event_larger_than_a_page_comes_alone_and_whole_on_demand(log_url: str) -> None:
    start = execute(log_url, "SELECT flask_pg_sse.head_v1()")[0][0]
    zeros = '{"data": "' + "\\u0000" * 1000 + '"}'
    texts = [("{}", "small"), ("{}", "x" * 5000), (zeros, None), ("{}", "small")]
    fill(log_url, [(start + n, "a", *text) for n, text in enumerate(texts, 1)])
    with connected(log_url, transactions=False) as connection:
        pages = []
        after = start
        for _ in range(4):
            _, _, after, rows = read_page(connection, ["a"], after, 1000, 0)
            pages += [[row[2:4] for row in rows]]
        assert pages == [[texts[0]], [("{}", None)], [("{}", None)], [texts[3]]]
        for offset, max_event, shown in ((1, 4999, False), (1, 5002, True), (2, 6011, False), (2, 6012, True)):
            _, _, _, rows = read_page(connection, ["a"], start + offset, 1000, max_event)
            assert [row[2:4] for row in rows] == [texts[offset] if shown else ("{}", None)]


@pytest.mark.parametrize("channels", [CHANNELS[:2], CHANNELS], ids=["few", "many"])
def test_a_page_says_when_pruning_was_faster(log_url: str, seed: int, channels: list[str]) -> None:
    """Whatever page is read while the log is pruned: it has all rows, or says that it cannot have."""
    rng = random.Random(seed)
    events = filled(log_url, rng, 6_000 * LONG)
    wanted = [event.id for event in events if event.channel in set(channels)]
    stop = threading.Event()

    def prune() -> None:
        with connected(log_url, transactions=False) as pruner:
            while not stop.is_set() and run(pruner, "SELECT flask_pg_sse.prune_v1('1 hour', 20)")[0][0]:
                pass

    pruned_meanwhile = 0
    pruner = InThread(prune)
    try:
        with connected(log_url, transactions=False) as connection:
            while pruner.alive():
                pruned = run(connection, "SELECT pruned_through FROM flask_pg_sse.retention")[0][0]
                known = [pruned, *(event.id for event in events if event.id > pruned)]
                after = known[rng.randint(0, min(100, len(known) - 1))]
                refusal, _, upto, rows = read_page(connection, channels, after, 3_000, 0)
                if refusal is not None:
                    assert refusal == "too-old"
                    pruned_meanwhile += 1
                    continue
                got = [row[0] for row in rows]
                assert got == wanted[bisect_right(wanted, after) : bisect_right(wanted, upto)]
    finally:
        stop.set()
        pruner.join()
    assert pruned_meanwhile > 0


TAIL = "SELECT channel, complete_after, id, fields::text, data FROM flask_pg_sse.tail_v1(%s, %s, %s)"


def tail(events: list[Row], pruned: int, channel: str, upto: int, max_bytes: int) -> tuple[int, list[Row]]:
    """The model: at most a thousand of the last events, of max_bytes together."""
    before = [event for event in events if event.channel == channel and event.id <= upto]
    taken: list[Row] = []
    for event in reversed(before):
        if len(taken) == 1000 or sum(row.size for row in taken) + event.size > max_bytes:
            return event.id, taken[::-1]
        taken.append(event)
    return pruned, taken[::-1]


def test_tails(log_url: str, seed: int) -> None:
    rng = random.Random(seed)
    events = filled(log_url, rng, 4_000)
    pruned, head = events[0].id - 1, events[-1].id
    execute(log_url, "UPDATE flask_pg_sse.retention SET pruned_through = %s", (pruned,))
    cut = 0
    with connected(log_url, transactions=False) as connection:
        for _ in range(150 * LONG):
            channels = rng.sample(CHANNELS, rng.randint(1, 6))
            uptos = [rng.choice([0, pruned, rng.randint(pruned, head), head, head + 9]) for _ in channels]
            max_bytes = rng.choice([0, 100, 1_000, 10_000, 65_536, 262_144, 10**9])
            rows = run(connection, TAIL, (channels, uptos, max_bytes))
            assert {row[0] for row in rows} == set(channels)
            for channel, upto in zip(channels, uptos, strict=True):
                complete_after, expected = tail(events, pruned, channel, upto, max_bytes)
                of_channel = [row[1:] for row in rows if row[0] == channel]
                assert {row[0] for row in of_channel} == {complete_after}
                rows_expected: list[tuple[Any, ...]] = [(row.id, row.fields, row.data) for row in expected]
                assert [row[1:] for row in of_channel] == (rows_expected or [(None, None, None)])
                cut += complete_after != pruned
        assert cut > 20
        assert run(connection, TAIL, ([], [], 0)) == []


# -- what goes out


def test_bounds_count_what_streams_send(log_url: str, make_app: MakeApp) -> None:
    """A line end is one byte in the log and seven in a stream: 60 kB of them are an event of 420 kB."""
    execute(log_url, PUBLISH, ("orders", ["{}"], ["first"]))
    for data in ("\n" * 60_000, *["\n" * 3_000] * 40, "\r\n" * 100_000, "last"):
        execute(log_url, PUBLISH, ("orders", ["{}"], [data]))
    app = make_app(log_url, SSE_BUFFER_BYTES=65536)
    with app.app_context():
        engine = app.extensions["pg_sse"].runtime.worker.engine
        after, head, sizes = 1, engine.head(), []
        while after < head:
            page = engine.page(["orders"], after, 65536, 0)
            if page.too_large:
                log_id, size = page.too_large
                page = engine.page(["orders"], after, 0, size)
                [(_, block, found)] = page.items
                assert found == log_id and len(block) > 65536
            else:
                assert sum(len(block) for _, block, _ in page.items) <= 65536
            sizes += [len(block) for _, block, _ in page.items]
            after = page.upto
        assert len(sizes) == 44 and sizes[1] > 420_000 and sizes[2:42] == [sizes[2]] * 40
        [tail] = engine.last({"orders": head}, 65536)
        assert sum(len(block) for _, block, _ in tail.items) <= 65536
        assert tail.items[-1][2] == head and tail.after < tail.items[0][2]
    events = stream(app.test_client(), "/sse?channel=orders&last_event_id=0", timeout=20)
    expected = ["first", "\n" * 60_000, *["\n" * 3_000] * 40, "\n" * 100_000, "last"]
    assert next(events).event == "sse-open"
    assert [next(events).data for _ in expected] == expected
    events.close()
