"""Measure what publishing costs, with and without the event log, and what a million events leave behind.

    python -m benchmarks.publishing [--quick] [--fsync off]

Each round measures every variant, one after the other, and compares it with the first variant of that round, because
the machine may be slower or faster a minute later. The run starts its own PostgreSQL with PostgreSQL's defaults, or
uses that of DATABASE_URL. It makes a database for itself and drops it afterwards. One connection listens all the time.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.clients import MANY, OWN_ROWS, TABLES, Clients
from benchmarks.database import Database, database
from flask_pg_sse.engine.postgres.retention import BATCH
from tools import postgres

# Name of the call in clients.py, its description, and its number of events.
SINGLE = [
    ("bare", "bare INSERT + pg_notify", 1),
    ("ephemeral", "notify(durable=False)", 1),
    ("logged", "notify()", 1),
    ("sql", "SELECT flask_pg_sse.notify()", 1),
]
TRANSACTIONS = [
    ("transaction", f"{OWN_ROWS} INSERTs", 0),
    ("transaction_bare", f"{OWN_ROWS} INSERTs, bare INSERT + pg_notify", 1),
    ("transaction_logged", f"{OWN_ROWS} INSERTs, notify(connection=)", 1),
]
BULK = [
    ("many_bare", f"bare INSERT + pg_notify of {MANY:,}, one statement", MANY),
    ("many", f"notify_many() of {MANY:,}", MANY),
    ("many_transaction", f"notify_many(connection=) of {MANY:,}", MANY),
]
LOGGED = {"logged", "sql", "transaction_logged", "many", "many_transaction"}


def empty(base: Database) -> None:
    base.execute("TRUNCATE bare, own, flask_pg_sse.event, flask_pg_sse.pending; UPDATE flask_pg_sse.retention SET "
                 "pruned_through = (SELECT last_value FROM flask_pg_sse.event_id)")  # fmt: skip
    base.execute("CHECKPOINT")


# -- the cost of a publish


@dataclass
class Round:
    """One variant in one round: milliseconds per call (median), calls per second, microseconds of CPU per call."""

    ms: float
    rate: float
    server_us: float
    client_us: float
    calls: int


def measure(base: Database, clients: Clients, name: str, seconds: float, count: int, size: int) -> Round:
    before = base.cpu()
    results = clients.run(name, seconds, count=count, size=size)
    server = sum(cpu - before.get(pid, 0.0) for pid, cpu in base.cpu().items())
    calls = sum(len(result.calls) for result in results)
    return Round(
        1000 * statistics.median(call for result in results for call in result.calls),
        sum(len(result.calls) / result.elapsed for result in results),
        1e6 * server / calls,
        1e6 * sum(result.cpu for result in results) / calls,
        calls,
    )


def compare(
    base: Database, clients: Clients, variants: Sequence[tuple[str, str, int]], args: argparse.Namespace, size: int
) -> dict[int, dict[str, list[Round]]]:
    """Measure variants round by round, for each number of clients."""
    found: dict[int, dict[str, list[Round]]] = {}
    for count in args.clients:
        empty(base)
        rounds: dict[str, list[Round]] = {name: [] for name, _, _ in variants}
        published = 0
        for name, _, _ in variants:  # connections open, caches fill
            published += measure(base, clients, name, 0, count, size).calls * events_of(name)
        for _ in range(args.rounds):
            for name, _, _ in variants:
                done = measure(base, clients, name, args.seconds, count, size)
                published += done.calls * events_of(name)
                rounds[name].append(done)
        logged = base.value("SELECT count(*) FROM flask_pg_sse.event")
        assert logged == published, f"{published} events were published, and {logged} are in the log"
        found[count] = rounds
    return found


def events_of(name: str) -> int:
    """Return the number of events that a call adds to the log."""
    if name not in LOGGED:
        return 0
    return next(events for known, _, events in [*SINGLE, *TRANSACTIONS, *BULK] if known == name)


def median(rounds: Sequence[Round], field: str) -> float:
    return float(statistics.median(getattr(one, field) for one in rounds))


def ratio(rounds: Sequence[Round], bare: Sequence[Round], field: str) -> float:
    """Return the median of the rounds' ratios."""
    pairs = zip(rounds, bare, strict=True)
    return float(statistics.median(getattr(one, field) / getattr(other, field) for one, other in pairs))


def cpu_of(us: float, base: Database) -> str:
    return f"{us:.0f}" if base.cpu() else "-"


def single(found: dict[int, dict[str, list[Round]]], size: int, base: Database) -> Iterator[Sequence[object]]:
    yield "data", "clients", "", "ms a call", "x", "events/s", "x", "CPU us an event: PostgreSQL", "client"
    for count, rounds in found.items():
        bare = rounds["bare"]
        for name, title, _ in SINGLE:
            one = rounds[name]
            yield (
                f"{size:,} B", count, title, f"{median(one, 'ms'):.2f}", f"{ratio(one, bare, 'ms'):.2f}",
                f"{median(one, 'rate'):,.0f}", f"{ratio(one, bare, 'rate'):.2f}",
                cpu_of(median(one, "server_us"), base), f"{median(one, 'client_us'):.0f}",
            )  # fmt: skip


def transactions(found: dict[int, dict[str, list[Round]]], size: int, base: Database) -> Iterator[Sequence[object]]:
    yield (
        "data", "clients", "transaction of", "ms", "more than without an event", "x", "transactions/s",
        "CPU us a transaction: PostgreSQL", "client",
    )  # fmt: skip
    for count, rounds in found.items():
        alone = rounds["transaction"]
        extra = {
            name: statistics.median(one.ms - other.ms for one, other in zip(rounds[name], alone, strict=True))
            for name, _, _ in TRANSACTIONS
        }
        bare = extra["transaction_bare"]
        for name, title, events in TRANSACTIONS:
            one = rounds[name]
            yield (
                f"{size:,} B", count, title, f"{median(one, 'ms'):.2f}", f"{extra[name]:.2f}" if events else "",
                f"{extra[name] / bare:.2f}" if events and bare > 0 else "", f"{median(one, 'rate'):,.0f}",
                cpu_of(median(one, "server_us"), base), f"{median(one, 'client_us'):.0f}",
            )  # fmt: skip


def bulk(found: dict[int, dict[str, list[Round]]], size: int, base: Database) -> Iterator[Sequence[object]]:
    yield (
        "data", "clients", "", "us an event, all clients together", "x", "events/s", "CPU us an event: PostgreSQL",
        "client",
    )  # fmt: skip
    for count, rounds in found.items():
        bare = rounds["many_bare"]
        for name, title, events in BULK:
            one = rounds[name]
            rate = median(one, "rate") * events
            yield (
                f"{size:,} B", count, title, f"{1e6 / rate:.1f}", f"{1 / ratio(one, bare, 'rate'):.1f}", f"{rate:,.0f}",
                cpu_of(median(one, "server_us") / events, base), f"{median(one, 'client_us') / events:.1f}",
            )  # fmt: skip


def show(rows: Iterator[Sequence[object]], *, header: bool) -> None:
    names = next(rows)
    if header:
        print_row(names)
        print_row(["---"] * len(names))
    for row in rows:
        print_row(row)


def print_row(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# -- what events leave behind


def state(base: Database, when: str, most: int | None = None) -> None:
    row = [when]
    for table in ("event", "pending"):
        total, heap, dead, vacuums = base.execute(
            "SELECT pg_total_relation_size(relid), pg_relation_size(relid), n_dead_tup, autovacuum_count "
            "FROM pg_stat_user_tables WHERE schemaname = 'flask_pg_sse' AND relname = %s", (table,)
        )[0]  # fmt: skip
        row += [f"{total / 1e6:,.1f}", f"{heap / 1e6:,.1f}", f"{dead:,}", f"{vacuums}"]
    print_row([*row, f"{most / 1e6:,.1f}" if most is not None else ""])


def fill(base: Database, clients: Clients, events: int, count: int) -> tuple[int, float, int]:
    """Publish at least `events`; return their number, the seconds, and the largest size of `pending`."""
    begun, most = time.monotonic(), 0
    first = base.value("SELECT flask_pg_sse.head_v1()")
    done = 0
    while done < events:
        clients.start("mixture", 2.0, count=count, size=100)
        time.sleep(1.0)
        most = max(most, base.value("SELECT pg_total_relation_size('flask_pg_sse.pending')"))
        clients.results(count)
        done = base.value("SELECT count(*) FROM flask_pg_sse.event WHERE id > %s", (first,))
    return done, time.monotonic() - begun, most


def latencies(base: Database, clients: Clients, seconds: float) -> list[float]:
    results = clients.run("logged", seconds, count=2, size=100)
    return sorted(1000 * call for result in results for call in result.calls)


def percentiles(calls: Sequence[float]) -> str:
    if not calls:  # pruning ended before the first call
        return "- | - | - | 0"
    at = [calls[min(len(calls) - 1, int(len(calls) * part))] for part in (0.5, 0.99)]
    return f"{at[0]:.2f} | {at[1]:.2f} | {calls[-1]:.2f} | {len(calls):,}"


def bloat(base: Database, clients: Clients, args: argparse.Namespace) -> None:
    empty(base)
    base.execute("SELECT pg_stat_reset()")
    count, took, most = fill(base, clients, args.events, 4)
    # When pruning begins, all these events are older than the time since here.
    filled_at = time.monotonic()
    print(f"{count:,} events of 100 B by 4 clients in {took:.0f} s, 95 % of them by notify_many(), half of those and "
          "all others in the caller's transactions. Sizes in MB, autovacuum's defaults.\n")  # fmt: skip
    print("| | `event` with indexes | its heap | dead | autovacuums | `pending` | its heap | dead | autovacuums "
          "| `pending` at most |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    time.sleep(1.1)  # a session reports what it did once a second
    state(base, "all published", most)

    before = latencies(base, clients, args.watch)
    batches: list[float] = []

    def timed(query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        begun = time.perf_counter()
        rows = base.execute(query, values)
        batches.append(1000 * (time.perf_counter() - begun))
        return rows

    # Clients run for a fixed time; their calls after the end of the pruning do not count.
    max_age = time.monotonic() - filled_at
    busy: list[float] = []
    deleted, took, more = 0, 0.0, True
    while more:
        clients.start("logged", args.prune_slice, count=2, size=100)
        begun = time.monotonic()
        while more and time.monotonic() < begun + args.prune_slice:
            [(batch,)] = timed("SELECT flask_pg_sse.prune_v1(make_interval(secs => %s), %s)", (max_age, BATCH))
            deleted += batch
            more = batch == BATCH
        ended = time.monotonic()
        took += ended - begun
        for result in clients.results(2):
            busy += [1000 * call for call, at in zip(result.calls, result.ended, strict=True) if at <= ended]
    busy.sort()
    time.sleep(1.1)
    state(base, "pruned")
    wait_for_autovacuum(base, args.patience)
    state(base, "after autovacuum, or the wait for it")
    more_events, _, most = fill(base, clients, args.events // 4, 4)
    time.sleep(1.1)
    state(base, f"{more_events:,} more published", most)
    print(f"\nPruned {deleted:,} events in {took:.1f} s, in {len(batches)} batches of {BATCH:,}: median "
          f"{statistics.median(batches):.1f} ms, longest {max(batches):.1f} ms.\n")  # fmt: skip
    print("| `notify()`, 2 clients | p50 ms | p99 ms | most | calls |\n|---|---|---|---|---|")
    print(f"| before pruning | {percentiles(before)} |\n| meanwhile | {percentiles(busy)} |")


def wait_for_autovacuum(base: Database, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        dead = base.value("SELECT max(n_dead_tup) FROM pg_stat_user_tables WHERE schemaname = 'flask_pg_sse' "
                          "AND relname IN ('event', 'pending')")  # fmt: skip
        if dead < 5000:
            return
        time.sleep(1.0)


# -- the whole


def describe(base: Database, args: argparse.Namespace) -> None:
    version, = base.execute("SELECT split_part(version(), ' on ', 1), current_setting('fsync'), "
                            "current_setting('synchronous_commit'), current_setting('shared_buffers')")  # fmt: skip
    seconds = f"{args.rounds} rounds of {args.seconds:g} s"
    print(f"{version[0]}, fsync {version[1]}, synchronous_commit {version[2]}, shared_buffers {version[3]}; "
          f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs; clients are processes; "
          f"{seconds} a variant, medians; load average at the start {load()}.")  # fmt: skip
    if base.cpu():
        print(f"An fsync of one page takes {fsync_ms():.2f} ms here (median).")


def load() -> str:
    return " ".join(f"{one:.2f}" for one in os.getloadavg())


def fsync_ms() -> float:
    """Return the milliseconds of a write of 8 kB with fdatasync, as in a commit, in the folder of the server's data."""
    folder = postgres.scratch()
    took = []
    try:
        with (folder / "page").open("wb", buffering=0) as file:
            for _ in range(100):
                file.seek(0)
                begun = time.perf_counter()
                file.write(os.urandom(8192))
                os.fdatasync(file.fileno())
                took.append(1000 * (time.perf_counter() - begun))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(took)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publishing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--fsync", choices=["on", "off"], default="on", help="of this run's own server (on)")
    parser.add_argument("--clients", type=numbers, metavar="N,N", help="how many at once (1,4,16)")
    parser.add_argument("--sizes", type=numbers, metavar="N,N", help="bytes of data (100,5000)")
    parser.add_argument("--only", choices=["events"], help="only the part about what events leave behind")
    parser.add_argument("--rounds", type=int, help="(7)")
    parser.add_argument("--seconds", type=float, help="of a variant in a round (0.7)")
    parser.add_argument("--events", type=int, help="published and pruned (1000000); 0: leave that part out")
    args = parser.parse_args(arguments)
    full = {"clients": [1, 4, 16], "sizes": [100, 5000], "rounds": 7, "seconds": 0.7, "events": 1_000_000}
    quick = {"clients": [1, 4], "sizes": [100, 5000], "rounds": 3, "seconds": 0.2, "events": 40_000}
    for key, default in (quick if args.quick else full).items():
        if getattr(args, key) is None:
            setattr(args, key, default)
    args.watch, args.prune_slice, args.patience = (1.0, 0.5, 0.0) if args.quick else (15.0, 2.0, 180.0)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with database(args.fsync) as base, Clients(base.url, max(4, *args.clients)) as clients:
        base.execute(TABLES)
        describe(base, args)
        parts = [
            ("One event", SINGLE, single),
            (f"One event in a transaction with {OWN_ROWS} other INSERTs", TRANSACTIONS, transactions),
            ("Many events in one transaction", BULK, bulk),
        ]
        for title, variants, rows in [] if args.only == "events" else parts:
            print(f"\n## {title}\n", flush=True)
            for size in args.sizes:
                show(rows(compare(base, clients, variants, args, size), size, base), header=size == args.sizes[0])
        if args.events:
            print("\n## What events leave behind\n", flush=True)
            bloat(base, clients, args)
        print(f"\nLoad average at the end, including this run: {load()}.")


if __name__ == "__main__":
    main()
