"""Measure what idle streams cost: memory, heartbeats, and opening them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.fits import sentence
from benchmarks.rig import Rig
from benchmarks.servers import PACKAGE
from benchmarks.tables import number, share, table

# Seconds between heartbeats by default. Here they come after _SHORT times the seconds of a round, to save time.
_DEFAULT = 15.0
_SHORT = 1.5
# Heartbeats of each stream to wait for.
_BEATS = 2
# Streams that open before the measurement: the first one also creates the parts that all share.
_FIRST = 1


def rest(rig: Rig) -> Iterator[str]:
    sizes = rig.args.clients[-3:]
    heartbeat = _SHORT * rig.args.seconds
    step = rig.steps("at rest", 2 * len(sizes))
    rows, memory = [], []
    with rig.running([PACKAGE], room=max(sizes), settings={"SSE_HEARTBEAT": str(heartbeat)}) as [one]:
        one.connect(_FIRST)
        resident = one.server.resident()
        for count in sizes:
            step(f"{count:,} clients connect")
            new = count - one.clients
            begun, cpu = time.monotonic(), one.server.cpu()
            one.connect(count)
            took, a_connect = time.monotonic() - begun, 1e6 * (one.server.cpu() - cpu) / new
            memory.append((count, (one.server.resident() - resident) / 1000))
            step(f"{count:,} clients and no events")
            one.listeners.expect()
            cpu = one.server.cpu()
            time.sleep(_BEATS * heartbeat)
            heard = one.listeners.finish(0, [0])
            cpu = one.server.cpu() - cpu
            a_sign = 1e6 * cpu / heard.signs if heard.signs else float("nan")
            rows.append((
                f"{count:,}", number(memory[-1][1] / (count - _FIRST)), number(a_connect), number(new / took),
                number(a_sign), share(count * a_sign / 1e6 / _DEFAULT),
            ))  # fmt: skip
    yield "### At rest"
    yield ""
    yield (
        f"Only this package. Memory is the growth of the worker's resident memory, without the kernel's memory for the "
        f"connections. The clients connect as fast as one process can, fifty at a time. Heartbeats came every "
        f"{heartbeat:g} s here; the last column is converted to {_DEFAULT:g} s, the default."
    )
    names = ("streams", "kB a stream", "CPU µs a connect", "connects/s", "CPU µs a heartbeat", "CPU at rest")
    yield ""
    yield from table(names, rows)
    yield ""
    yield f"- {sentence('n streams take', memory, 'n', 'streams', 'kB')}"
