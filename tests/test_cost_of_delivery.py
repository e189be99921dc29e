"""What one delivery costs in steps of the interpreter: a figure that no machine's speed changes.

A benchmark says how fast the fan-out is; this says when somebody puts work for each client into its loop.
"""

from __future__ import annotations

import inspect
import json
import logging
import operator
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from flask_pg_sse import hub as hub_module
from flask_pg_sse import subscription as subscription_module
from flask_pg_sse.group import OFFERS_BETWEEN_YIELDS
from flask_pg_sse.hub import Hub
from flask_pg_sse.subscription import Subscription, offer_to_all

# Bytecode instructions of a delivery, the system call aside. CPython 3.10 takes 28, and 29, 27 and 26 the next three.
MOST_STEPS = 31 if sys.version_info < (3, 12) else 29
FEW, MANY = 50, 150
assert MANY < OFFERS_BETWEEN_YIELDS


class Heard:
    def wait(self, timeout: float) -> bool:
        return True

    def cancel(self) -> None: ...


def deliverer(streams: int) -> Callable[[], None]:
    """Return what delivers one event to idle streams that have had the same before."""
    hub = Hub(lambda channels: Heard(), lambda channels: None, heartbeat=15, retry=3000)
    hub.position = 1
    for _ in range(streams):
        subscription = Subscription(["a"], 1000)
        assert hub.open(subscription) is None
        hub.go_live(subscription)
        subscription._send = operator.length_hint  # takes all, in C as a socket does

    def deliver() -> None:
        hub.deliver([("a", b"data: x\n\n", hub.position + 1)], hub.position + 1)

    deliver()
    return deliver


def steps_of(work: Callable[[], None]) -> int:
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
    for _ in range(2):
        steps = 0
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
    return steps


def steps_a_delivery() -> float:
    few, many = (steps_of(deliverer(streams)) for streams in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def test_a_delivery_is_few_steps() -> None:
    assert 0 < steps_a_delivery() <= MOST_STEPS


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
def test_work_for_each_client_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with one line more is above the limit."""
    source = inspect.getsource(offer_to_all)
    place = "                sent = send(chunk, NOW)\n"
    assert source.count(place) == 1
    space: dict[str, Any] = {**vars(subscription_module), "json": json, "lock": threading.Lock()}
    space["logger"] = logging.getLogger("a library")
    exec(source.replace(place, f"{' ' * 16}{line}\n{place}"), space)
    monkeypatch.setattr(hub_module, "offer_to_all", space["offer_to_all"])
    assert steps_a_delivery() > MOST_STEPS
