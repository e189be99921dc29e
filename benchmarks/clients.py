"""Client processes of a benchmark: each has its own connections, and all make their calls at the same time.

They are processes, not threads, so that no two clients share an interpreter. They report their own CPU, because the
figures of a client that is too busy would be its own, not the server's.
"""

from __future__ import annotations

import multiprocessing
import random
import select
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psycopg2

from flask_pg_sse import PgSSE

CHANNEL = "benchmark"
# Events of one notify_many().
MANY = 1000
# Other rows that a transaction writes besides its event.
OWN_ROWS = 10

TABLES = """
CREATE TABLE bare (id bigserial PRIMARY KEY, channel text NOT NULL, data text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE own (id bigserial PRIMARY KEY, dish text NOT NULL);
"""
_BARE = (
    "WITH row AS (INSERT INTO bare (channel, data) VALUES (%s, %s) RETURNING data) SELECT pg_notify(%s, data) FROM row"
)
_BARE_MANY = """
WITH row AS (INSERT INTO bare (channel, data) SELECT %s, data FROM unnest(%s::text[]) AS data RETURNING data)
SELECT count(pg_notify(%s, data)) FROM row
"""
_SQL = "SELECT flask_pg_sse.notify(%s, %s)"
_OWN = "INSERT INTO own (dish) VALUES (%s)"


@dataclass
class Result:
    """One client's round: the seconds of each call, and the client's CPU for them.

    `ended` has the time when each call ended, by the monotonic clock.
    """

    calls: list[float]
    ended: list[float]
    elapsed: float
    cpu: float


class _Client:
    """One client. Every method without an underscore is one measured call."""

    def __init__(self, url: str, number: int) -> None:
        self._random = random.Random(number)
        self._autocommit = psycopg2.connect(url)
        self._autocommit.autocommit = True
        self._connection = psycopg2.connect(url)  # without autocommit: every statement begins a transaction
        self._package = PgSSE(database_url=url)
        self._serial = 0
        self.use(100)

    def use(self, size: int) -> None:
        """Send data of `size` bytes from now on. They do not compress, and no two are equal."""
        self._text = "".join(self._random.choices(string.ascii_letters + string.digits, k=size + 2000))
        self._size = size

    def _data(self) -> str:
        self._serial += 1
        start = self._serial % 2000
        return f"{self._serial:010}{self._text[start : start + self._size - 10]}"

    def _run(self, connection: Any, query: str, args: tuple[Any, ...] = ()) -> None:
        with connection.cursor() as cursor:
            cursor.execute(query, args)

    def bare(self) -> None:
        data = self._data()
        self._run(self._autocommit, _BARE, (CHANNEL, data, CHANNEL))

    def ephemeral(self) -> None:
        self._package.notify(CHANNEL, self._data(), durable=False)

    def logged(self) -> None:
        self._package.notify(CHANNEL, self._data())

    def sql(self) -> None:
        self._run(self._autocommit, _SQL, (CHANNEL, self._data()))

    def transaction(self, act: Callable[[], None] | None = None) -> None:
        for _ in range(OWN_ROWS):
            self._run(self._connection, _OWN, ("soup",))
        if act is not None:
            act()
        self._connection.commit()

    def transaction_bare(self) -> None:
        data = self._data()
        self.transaction(lambda: self._run(self._connection, _BARE, (CHANNEL, data, CHANNEL)))

    def transaction_logged(self) -> None:
        self.transaction(lambda: self.enqueue())

    def enqueue(self) -> None:
        self._package.notify(CHANNEL, self._data(), connection=self._connection)

    def many_bare(self) -> None:
        self._run(self._autocommit, _BARE_MANY, (CHANNEL, [self._data() for _ in range(MANY)], CHANNEL))

    def many(self) -> None:
        self._package.notify_many(CHANNEL, [self._data() for _ in range(MANY)])

    def many_transaction(self) -> None:
        self._package.notify_many(CHANNEL, [self._data() for _ in range(MANY)], connection=self._connection)
        self._connection.commit()

    def mixture(self) -> None:
        """Send 2,100 events, in every way."""
        self.many()
        self.many_transaction()
        for _ in range(100):
            self.enqueue()
            self._connection.commit()


def _serve(url: str, number: int, orders: Connection) -> None:
    """Make the calls that `orders` names, until its other end closes. All processes share the monotonic clock."""
    client = _Client(url, number)
    orders.send("ready")
    try:
        while True:
            name, size, begin, end = orders.recv()
            client.use(size)
            call = getattr(client, name)
            time.sleep(max(0.0, begin - time.monotonic()))
            calls: list[float] = []
            ended: list[float] = []
            cpu, started = time.process_time(), time.perf_counter()
            while True:
                before = time.perf_counter()
                call()
                calls.append(time.perf_counter() - before)
                ended.append(time.monotonic())
                if ended[-1] >= end:
                    break
            orders.send(Result(calls, ended, time.perf_counter() - started, time.process_time() - cpu))
    except (EOFError, KeyboardInterrupt):
        pass


def _listen(url: str, ready: Connection) -> None:
    """Receive all events and ignore them, like the one connection of a worker."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"LISTEN {CHANNEL}")
    ready.send("ready")
    try:
        while ready.fileno() not in select.select([connection.fileno(), ready.fileno()], [], [])[0]:
            connection.poll()
            connection.notifies.clear()
    except KeyboardInterrupt:
        pass


class Clients:
    """`count` client processes, and one that listens."""

    def __init__(self, url: str, count: int) -> None:
        # Not forked: children would inherit a pipe, and the process at its other end would wait for them too.
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for number in range(count + 1):
            ours, theirs = context.Pipe()
            target: Any = _listen if number == count else _serve
            args = (url, theirs) if number == count else (url, number, theirs)
            process = context.Process(target=target, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Clients:
        for pipe in self._pipes:
            pipe.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def start(self, name: str, seconds: float, *, count: int, size: int) -> None:
        """Let the first `count` clients make one call after the other, for `seconds` and at least once."""
        begin = time.monotonic() + 0.02
        for pipe in self._pipes[:count]:
            pipe.send((name, size, begin, begin + seconds))

    def results(self, count: int) -> Sequence[Result]:
        return [pipe.recv() for pipe in self._pipes[:count]]

    def run(self, name: str, seconds: float, *, count: int, size: int) -> Sequence[Result]:
        self.start(name, seconds, count=count, size=size)
        return self.results(count)
