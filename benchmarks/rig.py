"""One measurement: publish events to a server with streams, and return the cost and the deliveries."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.crowd import Heard
from benchmarks.database import Database
from benchmarks.listeners import Listeners
from benchmarks.publisher import Publisher
from benchmarks.servers import VARIANTS, Server, Variant

# Padding that makes an event's data about 100 bytes, as in benchmarks/publishing.py. The floor has no ids, so its
# events get _ID more bytes each, the length of a line with an id of the log.
PADDING = 55
_ID = 21


@dataclass
class Measured:
    """The figures of one server in one measurement. CPU in seconds, latencies in ms."""

    events: int
    deliveries: int
    seconds: float
    cpu: float
    postgres: float
    load: float  # CPU of the load generator, as a share of one core
    p50: float
    p99: float
    late: float  # seconds by which the publisher's last event came too late
    drained: float  # seconds from the first event's publishing to the last one's delivery

    @property
    def us(self) -> float:
        """Microseconds of CPU per delivery."""
        return 1e6 * self.cpu / max(1, self.deliveries)

    @property
    def us_an_event(self) -> float:
        return 1e6 * self.cpu / self.events

    @property
    def postgres_us(self) -> float:
        """Microseconds of PostgreSQL's CPU per event."""
        return 1e6 * self.postgres / self.events

    @property
    def share(self) -> float:
        """CPU of the server, as a share of one core."""
        return self.cpu / self.seconds


@dataclass
class Running:
    """A server with its streams and their publisher. The channels are named `prefix` + a number."""

    server: Server
    prefix: str
    listeners: Listeners
    publisher: Publisher
    clients: int = 0
    channels: int = 1

    @property
    def variant(self) -> Variant:
        return self.server.variant

    def connect(self, clients: int, channels: int = 1) -> None:
        """Open more streams, up to `clients`, on `channels` channels in turn."""
        path = f"/sse?channel={self.prefix}{{channel}}"
        self.listeners.connect(self.server.port, path, self.clients, clients, channels)
        self.clients, self.channels = clients, channels


@dataclass
class Rig:
    """The parts that all measurements of a run share, and their results so far."""

    args: argparse.Namespace
    base: Database
    cores: Collection[int]  # of the servers
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    deliveries: int = 0
    faults: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[int, list[Measured]]]] = field(default_factory=dict)  # by clients, for the plot

    @property
    def rounds(self) -> str:
        return f"{self.args.rounds} round{'s' if self.args.rounds > 1 else ''} of {self.args.seconds:g} s"

    def steps(self, section: str, count: int) -> Callable[[str], None]:
        """Return a function that announces the next step of a section."""
        at = iter(range(1, count + 1))
        return lambda text: self.say(f"{section}, {next(at)} of {count}: {text}")

    @contextlib.contextmanager
    def running(
        self,
        variants: Sequence[Variant] = VARIANTS,
        *,
        room: int,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[list[Running]]:
        """Start servers at the same time, without streams; each worker has room for `room` of them."""
        with contextlib.ExitStack() as stack:
            # Twice the room: the package keeps a tenth of it for other requests, and workers get unequal shares.
            started = [
                stack.enter_context(
                    Server(one, self.base.url, room=2 * room, cores=self.cores, workers=workers, settings=settings)
                )
                for one in variants
            ]
            # No two servers that run at once hear the same channels.
            found = [stack.enter_context(self.streams(server, f"{server.variant.name}_")) for server in started]
            for server in started:
                server.wait()
            yield found

    @contextlib.contextmanager
    def streams(self, server: Server, prefix: str, padding: int = PADDING) -> Iterator[Running]:
        """Give a server a load generator and a publisher."""
        log = server.variant.log
        padding += 0 if log else _ID
        publisher = Publisher(self.base.url, prefix, padding, log=log)
        with contextlib.closing(publisher), Listeners(padding) as listeners:
            yield Running(server, prefix, listeners, publisher)

    def measure(self, running: Running, where: str, rate: float, seconds: float, *, may_lose: bool = False) -> Measured:
        """Publish, wait for all deliveries, return the figures, and record faults."""
        running.listeners.expect()
        postgres, cpu = self.base.cpu(), running.server.cpu()
        published = running.publisher.publish(rate, seconds, running.channels)
        wanted = sum(
            count * len(range(channel, running.clients, running.channels))
            for channel, count in enumerate(published.counts)
        )
        heard = running.listeners.finish(wanted, published.counts)
        cpu = running.server.cpu() - cpu
        used = sum(after - postgres.get(pid, 0.0) for pid, after in self.base.cpu().items())
        self.deliveries += heard.deliveries
        wrong = faults(heard)
        if wrong and not may_lose:
            self.faults.append(f"{where}, {running.variant.title}: {wrong}")
            self.say(f"!! {self.faults[-1]}")
        p50, p99 = percentiles(heard.latencies, heard.brought)
        return Measured(
            sum(published.counts), heard.deliveries, heard.seconds, cpu, used, heard.cpu / heard.seconds,
            1000 * p50, 1000 * p99, published.late, heard.last_at - published.begun,
        )  # fmt: skip


def faults(heard: Heard) -> str:
    """Return the faults of the deliveries; an empty text if there were none."""
    wrong = {
        "lost": heard.missing, "repeated": heard.repeated, "out of order": heard.disordered, "torn": heard.torn,
        "of the streams ended": heard.ended,
    }  # fmt: skip
    return ", ".join(f"{count:,} {what}" for what, count in wrong.items() if count)


def percentiles(values: Sequence[float], weights: Sequence[int] | None = None) -> tuple[float, float]:
    """Return the 50th and the 99th percentile of weighted values; NaN if there are none."""
    if not values:
        return float("nan"), float("nan")
    ordered = sorted(zip(values, weights or [1] * len(values), strict=True))
    upto = list(itertools.accumulate(weight for _, weight in ordered))
    p50, p99 = (ordered[bisect.bisect_left(upto, part * upto[-1])][0] for part in (0.5, 0.99))
    return p50, p99


def median(measured: Sequence[Measured], field: str) -> float:
    return float(statistics.median(getattr(one, field) for one in measured))


def ratio(measured: Sequence[Measured], floor: Sequence[Measured], field: str) -> float:
    """Return the median of the rounds' ratios."""
    pairs = zip(measured, floor, strict=True)
    return float(statistics.median(getattr(one, field) / getattr(other, field) for one, other in pairs))
