"""What the log's functions read in the database, in buffers: it is bounded by what they return, in every state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from tests.support.cluster import VERSIONS
from tests.support.log import connected, run
from tests.support.postgres import Running, binaries_of, connect, execute, fresh_database

# With these, all fits in the cache, and the server does nothing at times of its own.
OPTIONS = {"shared_buffers": "256MB", "autovacuum": "off"}
PAGE = "SELECT * FROM flask_pg_sse.page_v1(%s, %s, %s, %s)"
TAIL = "SELECT * FROM flask_pg_sse.tail_v1(%s, %s, %s)"
LOOK = "SELECT * FROM flask_pg_sse.look_v1(%s)"
CALLS = 10  # after five, a session may use another plan


class Query(NamedTuple):
    """A query of the package. It looks into an index `looks` times, besides what it returns."""

    name: str
    text: str
    args: tuple[Any, ...]
    looks: int = 1


def rooms(count: int) -> list[str]:
    return [f"room-{number}" for number in range(count)]


def nobodys(count: int) -> list[str]:
    return [f"nothing-{number}" for number in range(count)]


def queries(start: int, step: int, events: int) -> list[Query]:
    """Return what streams and listeners ask of a log whose first event has the id `start` + `step`."""
    head, old = start + step * events, start + step
    crowd = 200
    found = [
        Query("page of a busy channel", PAGE, (["busy"], old, 65536, 0)),
        Query("page of a busy channel, from the start", PAGE, (["busy"], 0, 65536, 0)),
        Query("one large event", PAGE, (["busy"], old, 0, 1000)),
        Query("page, 1 quiet channel", PAGE, (["nothing"], old, 65536, 0)),
        Query("page, 17 quiet channels", PAGE, (nobodys(17), old, 65536, 0), 17),
        Query("page, 100 quiet channels", PAGE, (nobodys(100), old, 65536, 0), 100),
        Query("page, 100 channels", PAGE, (rooms(100), old, 65536, 0), 100),
        Query("page, 1 busy and 99 quiet", PAGE, (["busy", *nobodys(99)], old, 65536, 0), 100),
        Query("page, 1000 quiet channels", PAGE, (nobodys(1000), old, 65536, 0), 1000),
        Query("page, 1000 channels, near the end", PAGE, (nobodys(1000), head - 9 * step, 65536, 0)),
        Query("tail of a busy channel", TAIL, (["busy"], [head], 4096)),
        Query("tails of 100 channels", TAIL, (rooms(100), [head] * 100, 16384), 100),
        Query("head", "SELECT flask_pg_sse.head_v1()", ()),
        Query("beat", "SELECT flask_pg_sse.beat_v1('1')", ()),
        Query("look, ids that are there", LOOK, ([old + step * n for n in range(crowd)],), crowd),
        Query("look, ids that are not", LOOK, ([old + step * n + 1 for n in range(100)],), 100),
        Query("look, ids before the log", LOOK, (list(range(1, 101)),), 100),
    ]
    return found


def measured(connection: Any, query: Query) -> tuple[int, int]:
    """Return how many buffers a query touches and how many rows it returns. The functions' own statements count."""
    [(plans,)] = run(connection, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query.text}", query.args)
    plan = plans[0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], round(plan["Actual Rows"])


def bound(query: Query, rows: int) -> int:
    """An index has up to four levels. A row is read twice at most, each time by itself, and so is one beside it."""
    return 60 + 5 * query.looks + 8 * rows


class Log:
    """A log of `events` events: every other one on one channel, the rest on `channels` others."""

    step = 4

    def __init__(self, url: str, events: int, channels: int) -> None:
        self.url = url
        self.events = events
        self.channels = channels
        self.start: int = execute(url, "SELECT flask_pg_sse.head_v1()")[0][0]
        self.queries = queries(self.start, self.step, events)

    def fill(self) -> None:
        query = """
            INSERT INTO flask_pg_sse.event
            SELECT %s + %s * n, CASE WHEN n %% 2 = 0 THEN 'busy' ELSE 'room-' || n / 2 %% %s END, '{}',
                repeat('x', 100), now() - interval '1 day' + n * interval '1 ms'
            FROM generate_series(1, %s) AS n
        """
        execute(self.url, query, (self.start, self.step, self.channels, self.events))

    def check(self, connection: Any, state: str, calls: int = CALLS) -> dict[str, int]:
        """Measure every query in one session, and return the buffers of its last call."""
        found = {}
        wrong = []
        for query in self.queries:
            for call in range(1, calls + 1):
                if 1 < call < calls:
                    run(connection, query.text, query.args)
                    continue
                buffers, rows = measured(connection, query)
                found[query.name] = buffers
                # The first call also reads the catalog.
                if buffers > bound(query, rows) + (2000 if call == 1 else 0):
                    wrong.append((state, query.name, f"call {call}", f"{rows} rows", f"{buffers} buffers"))
            if query.text == PAGE:
                *rows_, (*_, upto, head, refusal) = run(connection, query.text, query.args)
                assert refusal is None, query.name
                assert upto == head or len(rows_) >= (100 if query.args[2] else 1), (
                    query.name,
                    "is read in tiny pages",
                )
        assert not wrong, "\n" + "\n".join(map(str, wrong))
        return found


@contextmanager
def log(running: Running, version: str | None, events: int, channels: int) -> Iterator[Log]:
    bin_dir = None if version is None else binaries_of(version)
    with running(bin_dir=bin_dir, **OPTIONS) as server, fresh_database(server, logged=True) as url:
        yield Log(url, events, channels)


def sessions(url: str, ends: ExitStack) -> list[tuple[str, Any]]:
    """New sessions, which have no plans yet, for both costs that are set in the world: discs that turn, and others."""
    found = []
    for cost in ("4", "1.1"):
        connection = connect(url)
        ends.callback(connection.close)
        run(connection, f"SET random_page_cost = {cost}")
        found.append((f"random_page_cost {cost}", connection))
    return found


def test_a_query_reads_what_it_returns(running_postgres: Running) -> None:
    with log(running_postgres, None, 10_000, 1000) as made:
        made.fill()
        execute(made.url, "ANALYZE flask_pg_sse.event")
        with connected(made.url, transactions=False) as connection:
            made.check(connection, "analysed", 2)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [20, 100_000])
@pytest.mark.parametrize("version", VERSIONS)
def test_no_plan_hangs_on_statistics(running_postgres: Running, version: str, channels: int) -> None:
    table: dict[str, dict[str, int]] = {}
    with log(running_postgres, version, 60_000, channels) as made, ExitStack() as ends:
        early = sessions(made.url, ends)[:1]
        for _, connection in early:  # their plans are those for an empty log
            for query in made.queries:
                for _ in range(CALLS):
                    run(connection, query.text, query.args)
        made.fill()
        for state, statement in (
            ("never analysed", "SELECT 1"),
            ("analysed", "ANALYZE flask_pg_sse.event"),
            ("vacuumed", "VACUUM flask_pg_sse.event"),
        ):
            execute(made.url, statement)
            known = [(f"{cost}, a session from the start", connection) for cost, connection in early]
            for cost, connection in known + sessions(made.url, ends):
                table[f"{state}, {cost}"] = made.check(connection, f"{state}, {cost}")
    print(f"\nPostgreSQL {version}, {channels} channels: buffers of the tenth call")
    for query in made.queries:
        seen = [row[query.name] for row in table.values()]
        print(f"{query.name:40} {min(seen):6} to {max(seen):6}")


PRUNE = "SELECT flask_pg_sse.prune_v1(interval '1 hour', %s)"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["18", "15"])
def test_pruned_events_cost_nothing_while_somebody_keeps_them(running_postgres: Running, version: str) -> None:
    """An old snapshot keeps the dead rows, and their index entries, from being removed."""
    with log(running_postgres, version, 50_000, 1000) as made:
        made.fill()
        execute(made.url, "ANALYZE flask_pg_sse.event")
        with connected(made.url) as snapshot, connected(made.url, transactions=False) as connection:
            run(snapshot, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            run(snapshot, "SELECT 1")
            for batch in range(8):
                buffers, _ = measured(connection, Query("prune", PRUNE, (5000,)))
                # Each deleted row is read a few times, by the look for the end and by the deletion.
                assert buffers < 100 + 8 * 5000, (batch, buffers)
            [(pruned,)] = run(connection, "SELECT pruned_through FROM flask_pg_sse.retention")
            assert pruned == made.start + made.step * 40_000
            head = made.start + made.step * made.events
            asked: Sequence[Query] = [
                Query("page from the start", PAGE, (["busy"], 0, 65536, 0)),
                Query("page from what was pruned last", PAGE, (nobodys(100), pruned, 65536, 0), 100),
                Query("page from before", PAGE, (["busy"], made.start, 65536, 0)),
                Query("tail", TAIL, (["busy", "nothing"], [head, head], 10**9), 2),
                Query("look", LOOK, ([0, 1, made.start, pruned - 1, pruned, head],), 6),
                Query("head", "SELECT flask_pg_sse.head_v1()", ()),
            ]
            for query in asked:
                for _ in range(CALLS):
                    buffers, rows = measured(connection, query)
                print(f"{query.name:40} {buffers:6}")
                assert buffers <= bound(query, rows), (query.name, buffers)
