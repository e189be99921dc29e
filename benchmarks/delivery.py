"""Measure the cost and the time of a delivery by the number of clients, and the largest rate of events."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.fits import sentence
from benchmarks.publisher import SINGLE
from benchmarks.rig import Measured, Rig, median, ratio
from benchmarks.servers import FLOOR, PACKAGE, VARIANTS
from benchmarks.tables import load, number, share, table

# A rate holds if 99 % of the events are read within _P99 milliseconds, and the last event is read at most _AFTER times
# the step's time after it was due.
_P99 = 1000.0
_AFTER = 0.25


def clients(rig: Rig) -> Iterator[str]:
    args = rig.args
    step = rig.steps("clients", len(args.clients) * args.rounds * len(VARIANTS))
    found: dict[int, dict[str, list[Measured]]] = {}
    rates = {count: min(SINGLE, args.deliveries / count) for count in args.clients}
    with rig.running(room=max(args.clients)) as servers:
        for count, rate in rates.items():
            where = f"{count:,} clients"
            for one in servers:
                rig.say(f"clients: opening {count:,} streams of {one.variant.title}")
                one.connect(count)
                rig.measure(one, where, rate, 0)  # warm up
            rounds = found[count] = {one.variant.name: [] for one in servers}
            for _ in range(args.rounds):
                for one in servers:
                    step(f"{where}, {one.variant.title}")
                    rounds[one.variant.name].append(rig.measure(one, where, rate, args.seconds))
    for variant in VARIANTS:
        rig.curves[variant.name] = [(count, rounds[variant.name]) for count, rounds in found.items()]
    yield "### Clients"
    yield ""
    yield (
        f"{args.deliveries:,} deliveries a second at every size, but no more than {SINGLE:,} events, each in a "
        f"transaction of its own; {rig.rounds}."
    )
    names = (
        "clients", "events/s", "", "CPU µs a delivery", "times the floor", "p50 ms", "p99 ms",
        "CPU of the load generator",
    )  # fmt: skip
    yield ""
    yield from table(
        names,
        (
            (
                f"{count:,}", number(rates[count]), variant.title, number(median(one, "us")),
                f"{ratio(one, rounds[FLOOR.name], 'us'):.2f}", number(median(one, "p50")), number(median(one, "p99")),
                load(median(one, "load")),
            )
            for count, rounds in found.items() for variant in VARIANTS for one in [rounds[variant.name]]
        ),
    )  # fmt: skip
    yield ""
    for variant in VARIANTS:
        points = [(count, median(rounds[variant.name], "us_an_event")) for count, rounds in found.items()]
        yield f"- {sentence(f'An event to n clients costs {variant.title}', points, 'n', 'clients', 'µs')}"
    points = [(count, median(rounds[PACKAGE.name], "p50")) for count, rounds in found.items()]
    yield f"- {sentence('Half of n clients have an event of this package after', points, 'n', 'clients', 'ms')}"


def events(rig: Rig) -> Iterator[str]:
    args = rig.args
    rates = [args.rate * 2**n for n in range(args.doublings)]
    tried: dict[str, dict[float, list[Measured]]] = {one.name: {rate: [] for rate in rates} for one in VARIANTS}
    rounds = min(2, args.rounds)
    with rig.running(room=args.crowd) as servers:
        for one in servers:
            one.connect(args.crowd)
            rig.measure(one, "events", 1, 0)
        for turn in range(rounds):
            left = list(servers)
            for rate in rates:
                for one in list(left):
                    where = f"{rate:,.0f} events/s to {args.crowd:,} clients"
                    rig.say(f"events, round {turn + 1} of {rounds}: {where}, {one.variant.title}")
                    done = rig.measure(one, where, rate, args.seconds, may_lose=one.variant is FLOOR)
                    tried[one.variant.name][rate].append(done)
                    if _why_not(done, args.crowd, args.seconds):
                        left.remove(one)
    yield "### Events"
    yield ""
    yield (
        f"{args.crowd:,} clients. The rate doubles, from {args.rate:,} events a second, until the server falls behind: "
        f"until fewer than 99 % of the events are read within a second, the last event is read late, or events are "
        f"lost (the floor does not wait for slow clients). Above {SINGLE:,} events a second, the events of each "
        f"hundredth of a second are published in one transaction. Each rate runs for {args.seconds:g} s; a rate held "
        f"if it did so {'twice' if rounds > 1 else 'once'}."
    )
    names = (
        "", "events/s that held", "deliveries/s", "CPU µs a delivery", "p50 ms", "p99 ms", "CPU of the server",
        "CPU of the load generator", "at twice the rate", "most deliveries/s seen",
    )  # fmt: skip
    yield ""
    yield from table(names, (_ceiling(variant.title, tried[variant.name], rig) for variant in VARIANTS))


def _ceiling(title: str, tried: dict[float, list[Measured]], rig: Rig) -> tuple[str, ...]:
    crowd, seconds = rig.args.crowd, rig.args.seconds
    most = max(one.deliveries / max(one.drained, 1e-9) for rounds in tried.values() for one in rounds)
    held, then = 0.0, "was not tried"
    for rate, rounds in tried.items():
        reasons = [reason for one in rounds if (reason := _why_not(one, crowd, seconds))]
        if not rounds or reasons:
            then = reasons[0] if reasons else then
            break
        held = rate
    if not held:
        return (title, "none", *[""] * 6, then, number(most))
    one = tried[held]
    return (
        title, number(held), number(held * crowd), number(median(one, "us")), number(median(one, "p50")),
        number(median(one, "p99")), share(median(one, "share")), load(median(one, "load")), then, number(most),
    )  # fmt: skip


def _why_not(measured: Measured, clients: int, seconds: float) -> str:
    """Return why a rate did not hold; an empty text if it did."""
    lost = measured.events * clients - measured.deliveries
    late = _AFTER * seconds + 0.1
    if lost:
        return f"{lost:,} deliveries were lost"
    if measured.late > late:
        return f"publishing was {measured.late:.1f} s late"
    if measured.p99 >= _P99:
        return f"p99 was {number(measured.p99)} ms"
    if measured.drained > seconds + late:
        return f"the last event was read {measured.drained - seconds:.1f} s late"
    return ""
