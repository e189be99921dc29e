"""Measure what it costs to come back to a large event log: by its size, by how far behind a client is, and by how many.

    python -m benchmarks.resuming [--events 1000000,5000000] [--quick]

The log is made by SQL: as if 300 events a second had been published, every other one to one busy channel, the rest to
2,000 rooms in turn. Then queries read it as streams do, and crowds of clients come back to a real server. What each
client receives is compared with the log. The run starts its own PostgreSQL, or uses that of DATABASE_URL. It makes a
database for itself and drops it afterwards.
"""

from __future__ import annotations

import argparse
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.database import Database, database
from benchmarks.servers import PACKAGE, Server
from benchmarks.tables import number, table
from flask_pg_sse.engine.postgres.history import read_page
from flask_pg_sse.engine.raw import Dropped
from flask_pg_sse.hub.replay import PAGE_BYTES

RATE = 300  # events a second
ROOMS = 2000
BUSY = "busy"
_STEP = 4_000_000 // RATE  # between two ids, four of which are a microsecond
_READ = 1 << 18
_PATIENCE = 120.0


class Log:
    """The log of a database. It grows by older events never, by newer ones with `grow()`."""

    def __init__(self, base: Database, most: int) -> None:
        self.base = base
        self.events = 0
        self._first: int = base.value("SELECT flask_pg_sse.head_v1()") - _STEP * (most + 1)
        base.execute("UPDATE flask_pg_sse.retention SET pruned_through = %s", (self._first,))

    def grow(self, events: int) -> float:
        """Add events until there are so many. Return the seconds, without VACUUM's."""
        begun = time.monotonic()
        self.base.execute(
            "INSERT INTO flask_pg_sse.event "
            "SELECT %s + %s::bigint * n, CASE WHEN n %% 2 = 0 THEN %s ELSE concat('room-', n / 2 %% %s) END, '{}', "
            "repeat('x', 100), now() - make_interval(secs => (%s - n) / %s::float8) FROM generate_series(%s, %s) AS n",
            (self._first, _STEP, BUSY, ROOMS, events, RATE, self.events + 1, events),
        )
        took = time.monotonic() - begun
        self.events = events
        self.base.execute("VACUUM (ANALYZE) flask_pg_sse.event")
        return took

    @property
    def head(self) -> int:
        return self.before(0)

    def before(self, events: int) -> int:
        """Return the id of an event that so many events follow, on all channels together."""
        return self._first + _STEP * max(0, self.events - events)

    def ids(self, channel: str, after: int) -> list[int]:
        query = "SELECT id FROM flask_pg_sse.event WHERE channel = %s AND id > %s ORDER BY id"
        return [row[0] for row in self.base.execute(query, (channel, after))]


def rooms(count: int) -> list[str]:
    return [f"room-{one}" for one in range(count)]


def quiet(count: int) -> list[str]:
    return [f"quiet-{one}" for one in range(count)]


# -- queries, one after the other


class Reading:
    """What queries cost: their number, events, seconds, and the blocks that PostgreSQL touched."""

    def __init__(self, base: Database) -> None:
        self._base = base
        self.queries = self.events = self.blocks = 0
        self.seconds = 0.0

    def run(self, query: str, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        [(plans,)] = self._base.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {query}", args)
        plan = plans[0]["Plan"]
        self.blocks += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        begun = time.perf_counter()
        rows = self._base.execute(query, args)
        self.seconds += time.perf_counter() - begun
        self.queries += 1
        return rows

    def catch_up(self, channels: Sequence[str], after: int) -> None:
        """Read pages to the end of the log, as a stream that is far behind does."""
        while True:
            page = read_page(self.run, channels, after, PAGE_BYTES, 0, Dropped())
            assert page.refusal is None and page.too_large is None
            self.events += len(page.items)
            after = page.upto
            if after >= page.head:
                return

    def row(self, what: str) -> Sequence[object]:
        each = number(self.blocks / self.events) if self.events else "-"
        return what, f"{self.queries:,}", f"{self.events:,}", number(1000 * self.seconds), f"{self.blocks:,}", each


def queries(log: Log) -> Iterator[Sequence[object]]:
    everything, hour = log.events, 3600 * RATE
    for what, channels, behind in [
        ("1 busy channel, 10 s behind", [BUSY], 10 * RATE),
        ("1 busy channel, 10 min behind", [BUSY], 600 * RATE),
        ("1 room, all of the log behind", rooms(1), everything),
        ("17 rooms, 1 h behind", rooms(17), hour),
        ("100 rooms, 1 h behind", rooms(100), hour),
        ("2,000 rooms, 1 min behind", rooms(ROOMS), 60 * RATE),
        ("1 quiet channel, all of the log behind", quiet(1), everything),
        ("17 quiet channels, all of the log behind", quiet(17), everything),
        ("100 quiet channels, all of the log behind", quiet(100), everything),
    ]:
        reading = Reading(log.base)
        reading.catch_up(channels, log.before(min(behind, everything - 1)))
        yield reading.row(what)
    for what, query, args, events in [
        ("the last events of 200 rooms, 16 kB each", "SELECT * FROM flask_pg_sse.tail_v1(%s, %s, 16384)",
         (rooms(200), [log.head] * 200), True),
        ("the last events of the busy channel, 256 kB", "SELECT * FROM flask_pg_sse.tail_v1(%s, %s, 262144)",
         ([BUSY], [log.head]), True),
        ("a look at 1,000 ids", "SELECT * FROM flask_pg_sse.look_v1(%s)",
         ([log.before(one) for one in range(1000)],), False),
        ("the head of the log", "SELECT flask_pg_sse.head_v1()", (), False),
    ]:  # fmt: skip
        reading = Reading(log.base)
        rows = reading.run(query, args)
        reading.events = len(rows) if events else 0
        yield reading.row(what)


# -- crowds that come back


@dataclass
class Client:
    """A stream that resumes after an id. `ids` are those that it must receive, in this order."""

    channel: str
    after: int
    ids: list[int]
    got: list[int] = field(default_factory=list)  # by connections that have ended
    refused: int = 0
    received: bytearray = field(default_factory=bytearray)

    def connect(self, port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port))
        request = f"GET /sse?channel={self.channel}&last_event_id={self.after} HTTP/1.1\r\nHost: x\r\n\r\n"
        sock.sendall(request.encode())
        return sock

    @property
    def complete(self) -> bool:
        return b"id: %d\n" % self.ids[-1] in self.received[-4096:] and self.received.endswith(b"\n\r\n")

    def end(self) -> None:
        """Take what the connection has brought. The next one goes on after it."""
        body, rest = b"", bytes(self.received).partition(b"\r\n\r\n")[2]
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body, rest = body + rest[:length], rest[length + 2 :]
        self.got += [int(one) for one in re.findall(rb"id: (\d+)\ndata: x", body)]
        self.after = self.got[-1] if self.got else self.after
        self.received.clear()


def come_back(port: int, clients: Sequence[Client]) -> float:
    """Open all streams at once, and return the seconds until each has received its last event.

    A client that is refused comes back after a second, as browsers do.
    """
    begun = time.monotonic()
    later: list[tuple[float, Client]] = []
    with selectors.DefaultSelector() as selector:
        try:
            for client in clients:
                selector.register(client.connect(port), selectors.EVENT_READ, client)
            left = set(map(id, clients))
            while left:
                if time.monotonic() > begun + _PATIENCE:
                    raise TimeoutError(f"{len(left)} of {len(clients)} clients do not have all after {_PATIENCE:.0f} s")
                while later and later[0][0] <= time.monotonic():
                    client = later.pop(0)[1]
                    selector.register(client.connect(port), selectors.EVENT_READ, client)
                for key, _ in selector.select(0.1):
                    client, sock = key.data, key.fileobj
                    assert isinstance(sock, socket.socket)
                    data = sock.recv(_READ)
                    client.received += data
                    if not data:
                        selector.unregister(sock)
                        sock.close()
                        client.end()
                        client.refused += 1
                        later.append((time.monotonic() + 1, client))
                    elif id(client) in left and client.complete:
                        left.discard(id(client))
            return time.monotonic() - begun
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]


def crowds(log: Log, counts: Sequence[int]) -> Iterator[Sequence[object]]:
    base = log.base
    kinds: list[tuple[str, int, Callable[[int], str]]] = [
        ("to one room", 75 * 2 * ROOMS, lambda _: "room-0"),
        ("to a room each", 75 * 2 * ROOMS, lambda one: f"room-{one % ROOMS}"),
        ("to the busy channel", 2 * 75, lambda _: BUSY),
        ("to the busy channel", 2 * 1000, lambda _: BUSY),
    ]
    for count in counts:
        for where, behind, channel_of in kinds:
            after = log.before(min(behind, log.events - 1))
            expected = {channel: log.ids(channel, after) for channel in {channel_of(one) for one in range(count)}}
            clients = [Client(channel_of(one), after, expected[channel_of(one)]) for one in range(count)]
            with Server(PACKAGE, base.url, room=count + 200) as server:
                server.wait()
                come_back(server.port, [Client(BUSY, log.before(10), log.ids(BUSY, log.before(10)))])  # all is loaded
                cpu, postgres, memory = server.cpu(), base.cpu(), server.resident()
                seconds = come_back(server.port, clients)
                cpu, memory = server.cpu() - cpu, server.resident() - memory
                spent = sum(used - postgres.get(pid, 0.0) for pid, used in base.cpu().items())
            for client in clients:
                client.end()
            if wrong := [client for client in clients if client.got != client.ids]:
                raise RuntimeError(f"{len(wrong)} of {count} clients received something else than the log has")
            events = sum(len(client.ids) for client in clients)
            yield (
                f"{count:,} {where}", f"{len(clients[0].ids):,}", number(seconds), number(1000 * cpu / count),
                number(1000 * spent / count) if base.cpu() else "-", number(1e6 * (cpu + spent) / events),
                number(memory / 1e6), sum(client.refused for client in clients),
            )  # fmt: skip


# -- the whole


def report(base: Database, sizes: Sequence[int], counts: Sequence[int]) -> Iterator[str]:
    yield f"{machine.describe()}, {base.value('''SELECT split_part(version(), ' on ', 1)''')}."
    log = Log(base, max(sizes))
    for size in sizes:
        took = log.grow(size)
        bytes_ = base.value("SELECT pg_total_relation_size('flask_pg_sse.event')")
        yield ""
        yield f"### A log of {size:,} events"
        yield ""
        yield f"{size / RATE / 3600:.1f} hours at {RATE} events/s; {bytes_ / 1e6:,.0f} MB, filled in {took:.0f} s."
        yield ""
        yield from table(("read by", "queries", "events", "ms", "blocks", "blocks an event"), queries(log))
        yield ""
        names = (
            "clients that come back at once", "events each has missed", "s until all have them",
            "CPU ms a client: worker", "PostgreSQL", "CPU us an event, both", "MB that the worker grew",
            "refused meanwhile",
        )  # fmt: skip
        yield from table(names, crowds(log, counts))


def numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resuming", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything: some seconds")
    parser.add_argument("--events", type=numbers, metavar="N,N", help="sizes of the log (1000000)")
    parser.add_argument("--clients", type=numbers, metavar="N,N", help="how many come back at once (100,1000)")
    args = parser.parse_args(arguments)
    sizes = args.events or [20_000 if args.quick else 1_000_000]
    counts = args.clients or ([10] if args.quick else [100, 1000])
    with machine.many_descriptors(), database("off") as base:
        for line in report(base, sizes, counts):
            print(line, flush=True)


if __name__ == "__main__":
    main()
