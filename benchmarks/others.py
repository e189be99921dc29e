"""Measure how long other requests of the app wait while their worker serves many streams."""

from __future__ import annotations

import contextlib
import http.client
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.publisher import SINGLE
from benchmarks.rig import Rig, percentiles
from benchmarks.servers import PACKAGE
from benchmarks.tables import number, table

# Clients of large events; bytes of such an event, and events a second.
_FEW = 5
_LARGE = 1_000_000
_LARGE_RATE = 1.0
# Seconds between an answer and the next request.
_PAUSE = 0.01


def others(rig: Rig) -> Iterator[str]:
    args = rig.args
    count = max(args.clients)
    rate = min(SINGLE, args.deliveries / count)
    titles = [
        "nothing is sent",
        f"{number(rate)} events/s to {count:,} clients",
        f"the same, and {_LARGE_RATE:g}/s of 1 MB to {_FEW} more clients",
    ]
    step = rig.steps("other requests", len(titles) * args.rounds)
    found: dict[str, list[list[float]]] = {title: [] for title in titles}
    with (
        rig.running([PACKAGE], room=count + _FEW) as [many],
        rig.streams(many.server, "large_", _LARGE) as few,
        ThreadPoolExecutor(2) as pool,
    ):
        rig.say(f"other requests: opening {count:,} streams")
        many.connect(count)
        few.connect(_FEW)
        for one in (many, few):
            rig.measure(one, "other requests", 1, 0)
        for _ in range(args.rounds):
            for number_of, title in enumerate(titles):
                step(title)
                ended = threading.Event()
                answers = pool.submit(_ping, many.server.port, ended)
                large = pool.submit(rig.measure, few, title, _LARGE_RATE, args.seconds) if number_of == 2 else None
                try:
                    if number_of:
                        rig.measure(many, title, rate, args.seconds)
                    else:
                        time.sleep(args.seconds)
                    if large is not None:
                        large.result()
                finally:
                    ended.set()
                found[title].append(answers.result())
    yield "### Other requests"
    yield ""
    yield (f"`GET /ping`, served by the same worker, one request after the other on one connection; {rig.rounds}.")
    rows = []
    for title, rounds in found.items():
        p50, p99 = (statistics.median(part) for part in zip(*map(percentiles, rounds), strict=True))
        times = [p50, p99, max(map(max, rounds))]
        rows.append((title, *[number(1000 * one) for one in times], f"{sum(map(len, rounds)):,}"))
    yield ""
    yield from table(("while", "p50 ms", "p99 ms", "longest ms", "requests"), rows)


def _ping(port: int, ended: threading.Event) -> list[float]:
    """Send requests until `ended` is set, at least one, and return the seconds of each."""
    took: list[float] = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        while not took or not ended.wait(_PAUSE):
            begun = time.perf_counter()
            connection.request("GET", "/ping")
            answer = connection.getresponse().read()
            took.append(time.perf_counter() - begun)
            if answer != b"pong":
                raise ConnectionError(f"GET /ping was answered with {answer[:200]!r}")
    return took
