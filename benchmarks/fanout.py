"""Measure what the package costs: by clients, events, channels, workers, at rest, and for the app's other requests.

    python -m benchmarks.fanout [--quick] [--only clients,rest] [--into docs/performance.md --plot docs/performance.svg]

Each round measures every variant, one after the other, and compares it with the floor of that round, because the
machine may be slower or faster a minute later. Every delivery is checked. If one is lost, repeated, out of order or
torn, the exit status is 1. The run starts its own PostgreSQL or uses that of DATABASE_URL. It makes a database for
itself and drops it afterwards.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks import breadth, delivery, machine, others, rest
from benchmarks.database import Database, database
from benchmarks.rig import Rig
from benchmarks.servers import ServerError
from tools.postgres import PostgresError

SECTIONS: dict[str, Callable[[Rig], Iterator[str]]] = {
    "clients": delivery.clients,
    "events": delivery.events,
    "channels": breadth.channels,
    "workers": breadth.workers,
    "rest": rest.rest,
    "others": others.others,
}
# Descriptors that a process of the run needs besides its streams.
_SPARE = 200
MEASURED = re.compile(r"(<!-- measured: .*? -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def report(rig: Rig, left_out: Sequence[int]) -> Iterator[str]:
    """Run the sections in `args.only`, and yield the lines of their reports."""
    args = rig.args
    begun = time.monotonic()
    yield f"{machine.describe()}, {rig.base.value('''SELECT split_part(version(), ' on ', 1)''')}. {_places(rig)}"
    if left_out:
        sizes = " and ".join(f"{count:,}" for count in left_out)
        yield ""
        yield (
            f"Left out: {sizes} clients. A process here may not have that many sockets (`ulimit -Hn`, or LimitNOFILE= "
            "of the service)."
        )
    for name in args.only:
        yield ""
        yield from SECTIONS[name](rig)
    yield ""
    if rig.faults:
        yield f"**WRONG**, among {rig.deliveries:,} deliveries that were checked:"
        yield ""
        yield from (f"- {fault}" for fault in rig.faults)
    else:
        yield (
            f"{rig.deliveries:,} deliveries were checked: none was lost, repeated, out of order or torn. "
            f"The run took {(time.monotonic() - begun) / 60:.1f} minutes."
        )


def _places(rig: Rig) -> str:
    where = (
        "The server ran on its own core; PostgreSQL, the publisher and the load generator ran on the others"
        if rig.cores
        else "Everything ran on one core, including the load generator"
    )
    log = "PostgreSQL did not wait for the disk (fsync off)" if rig.base.cpu() else "It was that of DATABASE_URL"
    return f"{where}. {log}. An event has about 100 bytes of data."


def put_into(file: Path, lines: Sequence[str]) -> None:
    """Replace the report between a document's two comments."""
    text = file.read_text(encoding="utf-8")
    body = "\n".join(lines)
    file.write_text(MEASURED.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", text), encoding="utf-8")


# -- the command line


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise ValueError
    return numbers


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}; there are {', '.join(SECTIONS)}")
    return names


def _document(text: str) -> Path:
    file = Path(text)
    if not file.is_file() or not MEASURED.search(file.read_text(encoding="utf-8")):
        raise argparse.ArgumentTypeError(f"{text} has no comments <!-- measured: … --> and <!-- measured: end -->")
    return file


# What --quick changes. `deliveries` are per second. `doublings` is the number of rates, beginning with `rate`.
_FULL = {
    "clients": [100, 1000, 5000, 10_000], "crowd": 1000, "channels": [100, 500, 2000], "workers": [1, 2, 4],
    "rounds": 3, "seconds": 2.0, "deliveries": 20_000, "rate": 100, "doublings": 8,
}  # fmt: skip
_QUICK = {
    "clients": [50, 200, 800], "crowd": 200, "channels": [20, 80, 320], "workers": [1, 2, 3],
    "rounds": 1, "seconds": 0.5, "deliveries": 10_000, "rate": 400, "doublings": 6,
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./benchmarks/run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--only", type=_sections, default=list(SECTIONS), metavar="NAME,…", help=", ".join(SECTIONS))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/fanout.svg"), help="(benchmarks/fanout.svg)")
    parser.add_argument("--into", type=_document, help="a document with the two comments for the report")
    parser.add_argument("--clients", type=_numbers, metavar="N,…", help="how many at once (100,1000,5000,10000)")
    parser.add_argument("--crowd", type=int, help="clients of events and workers (1000)")
    parser.add_argument("--channels", type=_numbers, metavar="N,…", help="(100,500,2000)")
    parser.add_argument("--workers", type=_numbers, metavar="N,…", help="(1,2,4)")
    parser.add_argument("--rounds", type=int, help="(3)")
    parser.add_argument("--seconds", type=float, help="of a variant in a round (2)")
    parser.add_argument("--doublings", type=int, help="rates of events to try at most (8)")
    args = parser.parse_args(arguments)
    for key, default in (_QUICK if args.quick else _FULL).items():
        if getattr(args, key, None) is None:
            setattr(args, key, default)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not machine.measures_cpu():
        print(
            "benchmarks/run needs Linux: it reads the CPU of a server from /proc/PID/schedstat, which this system does "
            "not have. Run it in a Linux virtual machine or container.",
            file=sys.stderr,
        )
        return 2
    server_cores, other_cores = machine.divide()
    with machine.many_descriptors() as most, machine.on(other_cores), database("off") as base:
        left_out = [count for count in args.clients if count > most - _SPARE]
        args.clients = [count for count in args.clients if count not in left_out]
        return _run(args, base, server_cores, left_out)


def _run(args: argparse.Namespace, base: Database, cores: set[int], left_out: Sequence[int]) -> int:
    rig = Rig(args, base, cores)
    lines = []
    for line in report(rig, left_out):
        print(line, flush=True)
        lines.append(line)
    if rig.curves:
        # Not at the top of the module: the import takes a second, and each load generator imports this module.
        from benchmarks import plot

        plot.draw(rig.curves, args.plot)
        rig.say(f"The plot is in {args.plot}.")
    if rig.faults:
        rig.say("Deliveries went wrong, see the end of the report.")
        return 1
    if args.into is not None:
        put_into(args.into, lines)
    return 0


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)  # on the way out, context managers end everything that was started


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except (ServerError, ConnectionError, PostgresError) as error:
        sys.exit(f"benchmarks/run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
