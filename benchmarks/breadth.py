"""Measure what more channels cost, and more workers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.fits import sentence
from benchmarks.publisher import SINGLE
from benchmarks.rig import Measured, Rig, median, ratio
from benchmarks.servers import FLOOR, PACKAGE, VARIANTS
from benchmarks.tables import load, number, table


def channels(rig: Rig) -> Iterator[str]:
    args = rig.args
    step = rig.steps("channels", len(args.channels) * args.rounds * len(VARIANTS))
    found: dict[int, dict[str, list[Measured]]] = {}
    with rig.running(room=max(args.channels)) as servers:
        for count in args.channels:
            where = f"{count:,} channels"
            for one in servers:
                one.connect(count, count)
                rig.measure(one, where, SINGLE, 0)
            rounds = found[count] = {one.variant.name: [] for one in servers}
            for _ in range(args.rounds):
                for one in servers:
                    step(f"{where}, {one.variant.title}")
                    rounds[one.variant.name].append(rig.measure(one, where, SINGLE, args.seconds))
    yield "### Channels"
    yield ""
    yield (
        f"As many clients as channels, one client on each. {SINGLE:,} events a second go to the channels in turn, so "
        f"each is delivered once; {rig.rounds}."
    )
    names = ("channels", "", "CPU µs an event", "times the floor", "p50 ms", "p99 ms", "CPU of the load generator")
    yield ""
    yield from table(
        names,
        (
            (
                f"{count:,}", variant.title, number(median(one, "us_an_event")),
                f"{ratio(one, rounds[FLOOR.name], 'us_an_event'):.2f}", number(median(one, "p50")),
                number(median(one, "p99")), load(median(one, "load")),
            )
            for count, rounds in found.items() for variant in VARIANTS for one in [rounds[variant.name]]
        ),
    )  # fmt: skip
    yield ""
    for variant in VARIANTS:
        points = [(count, median(rounds[variant.name], "us_an_event")) for count, rounds in found.items()]
        yield f"- {sentence(f'An event on one of n channels costs {variant.title}', points, 'n', 'channels', 'µs')}"


def workers(rig: Rig) -> Iterator[str]:
    args = rig.args
    step = rig.steps("workers", len(args.workers) * args.rounds)
    found: dict[int, list[Measured]] = {count: [] for count in args.workers}
    rate = min(SINGLE, args.deliveries / args.crowd)
    for _ in range(args.rounds):
        for count in args.workers:
            where = f"{args.crowd:,} clients, {count} worker{'s' if count > 1 else ''}"
            step(where)
            # One server at a time: PostgreSQL would wake the connections of the others too.
            with rig.running([PACKAGE], room=args.crowd, workers=count) as [one]:
                one.connect(args.crowd)
                rig.measure(one, where, rate, 0)
                found[count].append(rig.measure(one, where, rate, args.seconds))
    postgres = bool(rig.base.cpu())
    yield "### Workers"
    yield ""
    yield (
        f"{args.crowd:,} clients, {number(rate)} events a second, and all workers on one core: compare the work, not "
        f"the time. {rig.rounds}."
    )
    names = (
        "workers", "CPU µs a delivery, all workers", "CPU µs an event, all workers", "PostgreSQL's CPU µs an event",
        "p50 ms", "p99 ms", "CPU of the load generator",
    )  # fmt: skip
    yield ""
    yield from table(
        names,
        (
            (
                count, number(median(one, "us")), number(median(one, "us_an_event")),
                number(median(one, "postgres_us")) if postgres else "-", number(median(one, "p50")),
                number(median(one, "p99")), load(median(one, "load")),
            )
            for count, one in found.items()
        ),
    )  # fmt: skip
    yield ""
    points = [(count, median(one, "us_an_event")) for count, one in found.items()]
    yield f"- {sentence(f'An event to {args.crowd:,} clients costs w workers together', points, 'w', 'workers', 'µs')}"
    if postgres:
        points = [(count, median(one, "postgres_us")) for count, one in found.items()]
        yield f"- {sentence('With w workers that listen, an event costs PostgreSQL', points, 'w', 'workers', 'µs')}"
