"""Many streams for an hour's worth of heartbeats and events, compressed in time; and then all clients vanish at once.

With LONG=1 there are ten thousand of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from benchmarks.crowd import Crowd, Heard, data_of
from benchmarks.machine import many_descriptors
from benchmarks.rig import faults
from flask_pg_sse import schema_sql
from tests.http.test_limits import streams
from tests.support.client import eventually
from tests.support.crowd import worker
from tests.support.far_host import far_host
from tests.support.postgres import connect, execute
from tests.support.processes import cpu, resident
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
LONG = os.environ.get("LONG") == "1"
STREAMS = 10_000 if LONG else 300
MINUTES = 60 if LONG else 8
HEARTBEAT = 1.0 if LONG else 0.1
# In a minute, with heartbeats every 15 s and an event every 10 s.
HEARTBEATS, EVENTS = 4, 6
PADDING = 40


def a_minute(crowd: Crowd, url: str) -> Heard:
    """Send the events of a minute, wait for them, and for heartbeats on all streams."""
    crowd.expect()
    connection = connect(url)
    with closing(connection), connection.cursor() as cursor:
        for number in range(EVENTS):
            data = data_of(number, time.monotonic_ns(), PADDING)
            cursor.execute("SELECT flask_pg_sse.notify('a', %s)", (data,))
            read_until(crowd, lambda sent=number + 1: crowd.heard.deliveries >= sent * STREAMS)  # type: ignore[misc]
    read_until(crowd, lambda: crowd.heard.signs >= HEARTBEATS * STREAMS)
    return crowd.finish([EVENTS])


def cost(minutes: list[tuple[int, int]]) -> float:
    """Return the worker's microseconds for an event or a heartbeat on a stream, from ticks and their number."""
    ticks, deliveries = map(sum, zip(*minutes, strict=True))
    return 1e6 * ticks / os.sysconf("SC_CLK_TCK") / deliveries


def read_until(crowd: Crowd, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, (crowd.heard.deliveries, crowd.heard.signs, crowd.heard.ended)
        crowd.read(0.1)


@pytest.mark.parametrize("direct", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["direct", "generator"])
def test_nothing_grows_and_all_is_freed(database_url: str, start_server: Start, direct: str) -> None:
    execute(database_url, schema_sql())
    with far_host() as far, many_descriptors():
        server = start_server(
            database_url, "--worker-connections", str(2 * STREAMS), "--backlog", "4096", listeners=[far.listener],
            FLASK_SSE_HEARTBEAT=str(HEARTBEAT), FLASK_SSE_SEND_TIMEOUT="1", FLASK_SSE_DIRECT_WRITE=direct,
        )  # fmt: skip
        pid = worker(server)

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{pid}/fd"))

        server.get("/state")
        before = descriptors()
        crowd = Crowd(PADDING)
        with closing(crowd):
            far.there(lambda: crowd.connect(far.port, "/sse?channel=a", 0, STREAMS, 1))
            memory, costs = [], []
            for _ in range(MINUTES):
                before_it = cpu(pid)
                heard = a_minute(crowd, database_url)
                assert faults(heard) == ""
                memory.append(resident(pid))
                # A busy machine has more heartbeats in the time of as many events.
                costs.append((cpu(pid) - before_it, heard.deliveries + heard.signs))
            assert streams(server) == int(server.get("/held")) == STREAMS
            held = descriptors()
            assert held - before - STREAMS in range(13), "the streams', and the package's connections"
            quarter = MINUTES // 4
            early, late = cost(costs[:quarter]), cost(costs[-quarter:])
            print(
                f"{MINUTES} minutes of {STREAMS} streams: {memory[quarter] / 1e6:.1f} MB, at the end "
                f"{memory[-1] / 1e6:.1f} MB; {early:.1f} µs of CPU for a delivery, at the end {late:.1f} µs"
            )
            # What the log's last events take in memory is bounded, and not full yet.
            assert memory[-1] - memory[quarter] < 2e6
            assert late < 3 * early
            far.vanish()
            eventually(lambda: streams(server) == 0, 60)
        eventually(lambda: descriptors() <= before + 13, 30)
        assert server.get("/held") == "0"
        assert worker(server) == pid and server.process.poll() is None
