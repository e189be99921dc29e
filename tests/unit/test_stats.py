"""The counters: what a hub counts for its streams, and how they are kept where they outlive the process."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator

import pytest

from flask_pg_sse import errors, stats
from flask_pg_sse.engine.base import Disconnect, Readiness
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.stats import Counter, Stats, added, read_totals
from tests.support.model import Quiet, item, raw


def of(counted: Stats, counter: Counter, label: str = "") -> float:
    return counted.totals()[counter.name, label]


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield Hub(Quiet(), heartbeat=1000, retry=3000)


def opened(hub: Hub, *channels: str, limit: int = 10**6) -> Subscription:
    subscription = Subscription(channels, limit)
    hub.open(subscription)
    hub.go_live(subscription)
    subscription.opened = True
    hub.stats.count(stats.OPENED)
    return subscription


def test_a_turn_counts_an_event_once_for_each_stream_that_gets_it(hub: Hub) -> None:
    for channels in (["a"], ["a"], ["a", "b"], ["c"]):
        opened(hub, *channels)
    waiting = Subscription(["a"], 1000)
    hub.open(waiting)  # not live: it would read the log
    turn = [item("a", 1, 30), raw("b", 1), item("a", 2, 30)]
    hub.deliver(turn, 2)
    assert of(hub.stats, stats.RECEIVED) == 3
    assert of(hub.stats, stats.DELIVERED) == 2 + 2 + 3
    sizes = [len(data) for _, data, _ in turn]
    assert of(hub.stats, stats.DELIVERED_BYTES) == 3 * (sizes[0] + sizes[2]) + sizes[1]
    hub.close(hub.streams(["a"])[0])
    hub.sweep()
    before = of(hub.stats, stats.DELIVERED)
    hub.deliver([item("a", 3, 30)], 3)
    assert of(hub.stats, stats.DELIVERED) == before + 2


def test_streams_are_counted_as_they_begin_and_end_and_why(hub: Hub) -> None:
    left, slow, revoked, rest = (opened(hub, name, limit=100) for name in "abcd")
    assert len(hub.streams()) == 4 and hub.streams(["a", "b"]) == [left, slow]
    hub.close(left)
    for _ in range(2):  # one event may be larger than the limit
        hub.deliver([raw("b", number) for number in range(50)], 0)
    hub.control(Disconnect(None, "c"))
    for stream in (slow, revoked):
        hub.close(stream)  # as its generator does after the last block
    hub.sweep()
    hub.drain("shutdown")
    assert hub.streams() == []
    hub.close(rest)
    hub.close(rest)
    hub.sweep()
    ended = {value: of(hub.stats, stats.ENDED, value) for value in stats.ENDED.values}
    assert {value: number for value, number in ended.items() if number} == {
        "client": 1,
        "behind": 1,
        "revoked": 1,
        "shutdown": 1,
    }
    assert of(hub.stats, stats.OPENED) == 4


def test_a_stream_that_falls_behind_gets_nothing_until_it_is_live_again(hub: Hub) -> None:
    hub.position = 1
    slow, quick = opened(hub, "a", limit=100), opened(hub, "a")
    for log_id in (2, 3):  # one event may be larger than the limit
        hub.deliver([item("a", log_id, 200)], log_id)
    assert (slow.live, quick.live) == (False, True)
    before = of(hub.stats, stats.DELIVERED)
    hub.deliver([item("a", 4, 30)], 4)
    assert of(hub.stats, stats.DELIVERED) == before + 1
    assert of(hub.stats, stats.FELL_BEHIND) == 1
    hub.gap("reconnected", 5)
    assert of(hub.stats, stats.RESETS, "reconnected") == 1
    hub.close(slow)
    hub.sweep()
    hub.deliver([item("a", 6, 30)], 6)
    assert of(hub.stats, stats.DELIVERED) == before + 2


def test_only_a_second_ready_is_a_reconnection(hub: Hub) -> None:
    for readiness in (Readiness.AWAY, Readiness.READY, Readiness.AWAY, Readiness.LOG_MISSING, Readiness.READY):
        hub.ready(readiness)
    assert of(hub.stats, stats.RECONNECTED) == 1


def test_what_is_kept_can_be_read_after_the_process(hub: Hub) -> None:
    memory = bytearray(stats.SIZE)
    hub.stats.count(stats.OPENED, 2)
    hub.stats.keep_in(memory)
    hub.stats.count(stats.OPENED)
    hub.stats.count(stats.ENDED, of="a reason of a later version")
    kept = read_totals(bytes(memory))
    assert kept == hub.stats.totals()
    assert (kept[stats.OPENED.name, ""], kept[stats.ENDED.name, "other"]) == (3, 1)
    hub.stats.leave()
    hub.stats.count(stats.OPENED)
    assert of(hub.stats, stats.OPENED) == 4 and read_totals(bytes(memory)) == kept


def test_counters_of_another_version_are_added_by_name() -> None:
    header = json.dumps([["flask_pg_sse_streams_opened_total", ""], ["flask_pg_sse_new_total", "x"]]).encode() + b"\n"
    header += b" " * (-len(header) % 8)
    other = read_totals(header + struct.pack("2d", 5, 7))
    totals = added([other, Stats().totals(), other])
    assert totals[stats.OPENED.name, ""] == 10 and totals["flask_pg_sse_new_total", "x"] == 14
    with pytest.raises(ValueError):
        read_totals(b"")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.PayloadTooLarge("a", 1, 2), "too_large"),
        (errors.InvalidChannel("x"), "invalid"),
        (TypeError("x"), "invalid"),
        (errors.DatabaseNotConfigured("x"), "misconfigured"),
        (errors.DatabaseUnavailable("x"), "unavailable"),
        (errors.EventLogMissing("x"), "no_log"),
        (RuntimeError("x"), "other"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_kind_of_a_failed_notification(error: Exception, kind: str) -> None:
    assert stats.notify_error_kind(error) == kind
    assert kind in stats.NOTIFY_ERRORS.values


def test_names_are_as_prometheus_wants_them() -> None:
    for counter in stats.COUNTERS:
        assert re.fullmatch(r"flask_pg_sse_[a-z_]+_total", counter.name)
        assert counter.help.endswith(".") and counter.label in ("", "reason", "kind")
        assert len(counter.values) < 15
