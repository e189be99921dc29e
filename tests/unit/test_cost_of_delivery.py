"""The cost of a delivery and of a heartbeat in interpreter steps, which do not depend on a machine's speed.

A benchmark measures how fast the fan-out is; this test fails when somebody adds work for each client to its loop.
"""

from __future__ import annotations

import gc
import inspect
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from flask_pg_sse.hub import hub as hub_module
from flask_pg_sse.hub import subscription as subscription_module
from flask_pg_sse.hub.fanout import OFFERS_BETWEEN_YIELDS
from flask_pg_sse.hub.hub import Hub
from flask_pg_sse.hub.subscription import Subscription, Terms, offer_to_all
from tests.support.model import Quiet

# Bytecode instructions of a delivery, the system call aside. CPython 3.10 takes 31, and 30, 28 and 25 the next three.
MOST_STEPS = 31 if sys.version_info < (3, 12) else 29
# A heartbeat takes 66 on CPython 3.11: a look at the stream, and the same way out as an event's.
MOST_STEPS_OF_A_HEARTBEAT = 72
FEW, MANY = 50, 150
assert MANY < OFFERS_BETWEEN_YIELDS


@pytest.fixture
def sink() -> Iterator[socket.socket]:
    """A socket that takes whatever is sent: what nobody fetches from the other one is dropped."""
    with socket.socket(type=socket.SOCK_DGRAM) as other, socket.socket(type=socket.SOCK_DGRAM) as this:
        other.bind(("127.0.0.1", 0))
        this.connect(other.getsockname())
        yield this


def make_hub(streams: int, sink: socket.socket, heartbeat: float = 0, terms: Terms = Terms()) -> Hub:  # noqa: B008
    """Return a hub with idle streams that have all had the same."""
    hub = Hub(Quiet(), heartbeat=heartbeat, retry=3000)
    hub.position = 1
    for _ in range(streams):
        subscription = Subscription(["a"], 1000, terms)
        hub.open(subscription)
        hub.go_live(subscription)
        subscription._way = sink  # it is parked
        subscription.awake.discard(subscription)
    deliver(hub)
    return hub


def deliver(hub: Hub) -> None:
    hub.deliver([("a", b"data: x\n\n", hub.position + 1)], hub.position + 1)


def steps_of(work: Callable[[Hub], None], hub: Hub) -> int:
    """Count the bytecode instructions of a call, with all that it calls.

    Of the second of two: CPython 3.12 tells of none at the first time.
    """
    steps = 0

    def trace(frame: FrameType, kind: str, arg: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += kind == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # a collection would be counted too: the finalizers of what earlier tests have left
    try:
        for _ in range(2):
            steps = 0
            sys.settrace(trace)
            try:
                work(hub)
            finally:
                sys.settrace(before)
    finally:
        gc.enable()
    return steps


def steps_each(work: Callable[[Hub], None], sink: socket.socket) -> float:
    few, many = (steps_of(work, make_hub(streams, sink)) for streams in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def test_a_delivery_is_few_steps(sink: socket.socket) -> None:
    assert 0 < steps_each(deliver, sink) <= MOST_STEPS


def test_a_heartbeat_is_few_steps(sink: socket.socket) -> None:
    assert 0 < steps_each(Hub.beat, sink) <= MOST_STEPS_OF_A_HEARTBEAT


@pytest.mark.parametrize("terms", [Terms(), Terms(ends_at=sys.float_info.max)], ids=["endless", "ending"])
def test_to_look_after_idle_streams_is_no_step_for_any(terms: Terms, sink: socket.socket) -> None:
    """Between two heartbeats the ticker looks often, and would find ten thousand streams that need nothing."""

    def look(hub: Hub) -> None:
        hub._look_at = 0
        hub.beat()
        assert hub._look_at > 0

    few, many = (steps_of(look, make_hub(streams, sink, 1000, terms)) for streams in (FEW, MANY))
    assert few == many > 0


@pytest.mark.parametrize(
    "line",
    [
        'json.dumps({"data": "x"})',
        'logger.debug("%d bytes", size)',
        "with lock: pass",
        "stream._past = stream._past + 0",
        'b"%X" % len(chunk)',
    ],
)
def test_work_for_each_client_is_noticed(line: str, sink: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with one line more is above the limit."""
    source = inspect.getsource(offer_to_all)
    place = "                sent = send(way, chunk, NOW)\n"
    assert source.count(place) == 1
    space: dict[str, Any] = {**vars(subscription_module), "json": json, "lock": threading.Lock()}
    space["logger"] = logging.getLogger("a library")
    exec(source.replace(place, f"{' ' * 16}{line}\n{place}"), space)
    monkeypatch.setattr(hub_module, "offer_to_all", space["offer_to_all"])
    assert steps_each(deliver, sink) > MOST_STEPS
