"""The engines that the contract is tested on. A new one registers itself here, and `test_contract.py` runs over it too.

`@register(…)` stands before a context manager that gets pytest's request and gives a `Bus`.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from redis._parsers import _RESP3Parser

from flask_pg_sse.engine.base import ControlMessage, Engine, Item, Readiness
from flask_pg_sse.engine.broker import to_broker
from flask_pg_sse.engine.memory import MemoryEngine
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.engine.postgres.engine import PostgresEngine
from flask_pg_sse.engine.redis.engine import RedisEngine
from tests.support.client import eventually


@dataclass
class Bus:
    """What engines have in common: `new_engine()` makes one, as another process has it.

    logged: whether events have ids and are kept. shared: whether several engines hear each other. commands: whether
    messages go from one process to the others.
    """

    new_engine: Callable[[], Engine]
    logged: bool
    shared: bool
    commands: bool = True


Make = Callable[[pytest.FixtureRequest], AbstractContextManager[Bus]]
ENGINES: dict[str, Make] = {}
LOGGED: list[str] = []  # those that keep events


def register(name: str, *, logged: bool) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        ENGINES[name] = make
        if logged:
            LOGGED.append(name)
        return make

    return add


@register("memory, logged", logged=True)
@contextmanager
def _memory(request: pytest.FixtureRequest) -> Iterator[Bus]:
    yield Bus(MemoryEngine, logged=True, shared=False)


@register("memory", logged=False)
@contextmanager
def _memory_without_log(request: pytest.FixtureRequest) -> Iterator[Bus]:
    yield Bus(lambda: MemoryEngine(log=False), logged=False, shared=False)


@register("postgres, logged", logged=True)
@contextmanager
def _postgres(request: pytest.FixtureRequest) -> Iterator[Bus]:
    url = request.getfixturevalue("logged_url")
    yield Bus(lambda: _postgres_engine(url), logged=True, shared=True)


@register("postgres", logged=False)
@contextmanager
def _postgres_without_log(request: pytest.FixtureRequest) -> Iterator[Bus]:
    url = request.getfixturevalue("database_url")
    yield Bus(lambda: _postgres_engine(url), logged=False, shared=True)


def _postgres_engine(url: str) -> Engine:
    dsn = to_dsn(url, "the test")
    return PostgresEngine(lambda: (dsn, dsn), event_log="auto", retention=86400, keys=lambda: ["a key"])


@register("redis", logged=False)
@contextmanager
def _redis(request: pytest.FixtureRequest) -> Iterator[Bus]:
    broker = to_broker(request.getfixturevalue("redis_server").url, "the test")
    yield Bus(lambda: RedisEngine(broker), logged=False, shared=True, commands=False)


@register("redis, RESP3", logged=False)
@contextmanager
def _redis_resp3(request: pytest.FixtureRequest) -> Iterator[Bus]:
    """With redis-py's own reader, which it uses where hiredis is not installed."""
    broker = to_broker(f"unix://{request.getfixturevalue('redis_server').socket}?protocol=3", "the test")
    broker = dataclasses.replace(broker, _options={**broker._options, "parser_class": _RESP3Parser})
    yield Bus(lambda: RedisEngine(broker), logged=False, shared=True, commands=False)


class Recorder:
    """A sink that writes down what it is told, in one list, in the order of the calls."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        self.told.append(("deliver", (list(turn), position)))

    def gap(self, reason: str, position: int) -> None:
        self.told.append(("gap", (reason, position)))

    def pruned(self, through: int) -> None:
        self.told.append(("pruned", through))

    def ready(self, readiness: Readiness, **about: Any) -> None:
        self.told.append(("ready", readiness))

    def caught_up(self) -> None:
        self.told.append(("caught up", None))

    def control(self, message: ControlMessage) -> None:
        self.told.append(("control", message))

    @property
    def items(self) -> list[Item]:
        return list(itertools.chain.from_iterable(told[0] for what, told in list(self.told) if what == "deliver"))

    @property
    def messages(self) -> list[ControlMessage]:
        return [told for what, told in list(self.told) if what == "control"]

    @property
    def position(self) -> int:
        return max([told[1] for what, told in list(self.told) if what == "deliver"], default=0)

    def wait(self, count: int) -> list[Item]:
        eventually(lambda: len(self.items) >= count, 20, f"{count} events are delivered")
        return self.items


class Process:
    """An engine at work with its recorder, as one process has them."""

    def __init__(self, engine: Engine, *channels: str) -> None:
        self.engine = engine
        self.sink = Recorder()
        engine.start(self.sink)
        if channels:
            assert engine.subscribe(channels).wait(20)


def together(*calls: Callable[[], object]) -> None:
    """Run calls at once, each in a thread."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
