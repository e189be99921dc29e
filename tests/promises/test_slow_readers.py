"""Clients that stop reading: they cost bounded memory, nobody else waits for them, and they lose nothing."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from flask_pg_sse.hub import buffer as backlog
from flask_pg_sse.hub import history as recent
from flask_pg_sse.hub import replay
from tests.support.client import eventually
from tests.support.crowd import Crowd, Reader, flood, install, logged, publish, worker
from tests.support.postgres import execute
from tests.support.processes import resident
from tests.support.servers import WebServer, need_open_files
from tools import postgres

Start = Callable[..., WebServer]
LONG = bool(os.environ.get("LONG"))
SMALL_BUFFERS = ("-c", "python:tests.support.apps.small_buffers", "--worker-connections", "3000", "--backlog", "2048")
# A busy machine's clients stop for longer than the usual 30 s.
PATIENT = {"FLASK_SSE_SEND_TIMEOUT": "300"}
BUFFER_BYTES = 262144
# More than the sum of the parts, by what Python's and C's allocators keep of pieces that come and go.
KEPT = 1.25
# What a stream has with the server beside its buffer: the piece in flight, and gunicorn's copy of it with the chunk's
# frame; and Python's own for a greenlet, a request and a socket.
IN_FLIGHT = 2 * backlog.PIECE_BYTES
PER_STREAM = 60_000


def most_for(count: int, buffer_bytes: int) -> int:
    """Return the bytes that so many stalled streams may cost."""
    streams = count * (buffer_bytes + IN_FLIGHT + PER_STREAM)
    return int(KEPT * (streams + recent.TOTAL_BYTES + replay.PAGES_BYTES + 4 * replay.FILL_BYTES))


def stop(readers: list[Reader]) -> None:
    for reader in readers:
        reader.reading = False


def go_on(readers: list[Reader], receive_buffer: int | None = None) -> None:
    for reader in readers:
        reader.reading = True
        if receive_buffer is not None:  # megabytes would take long through a few kilobytes
            reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)


def all_have(readers: list[Reader], count: int) -> Callable[[], bool]:
    return lambda: all(len(reader.events) >= count for reader in readers)


class Memory(threading.Thread):
    """Looks at the memory of a process ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.begun = time.monotonic()
        self.sizes: list[tuple[float, int]] = []
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            self.sizes.append((time.monotonic() - self.begun, resident(self._pid)))

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self.join()

    @property
    def most(self) -> int:
        return max(size for _, size in self.sizes)

    def __str__(self) -> str:
        every = max(1, len(self.sizes) // 15)
        return ", ".join(f"{at:.0f} s {size >> 20} MB" for at, size in self.sizes[::every])


@pytest.mark.parametrize("count", [100, *([1000] if LONG else [])])
def test_stalled_clients_cost_bounded_memory_delay_nobody_and_lose_nothing(
    database_url: str, start_server: Start, count: int
) -> None:
    need_open_files(2 * count + 500)
    install(database_url)
    server = start_server(database_url, *SMALL_BUFFERS, FLASK_SSE_HEARTBEAT="1", **PATIENT)
    channels = [f"own-{number % 50}" for number in range(count)]
    with Crowd(server.port) as crowd:
        slow = [crowd.add("all", channel, receive_buffer=4096) for channel in channels]
        [good] = crowd.open(1, "all")
        crowd.read_until(lambda: all(reader.opened for reader in slow))
        before = resident(worker(server))
        stop(slow)
        stalled_at = [reader.received for reader in slow]
        with Memory(worker(server)) as memory:
            # Small ones, so that each is in the buffer; in all three times what a stream may have waiting.
            for _ in range(3):
                had = len(good.events)
                flood(database_url, ["all"], 260, 1000)
                crowd.read_until(all_have([good], had + 260))
                flood(database_url, sorted(set(channels)), 4, 1000)
            # The good one has everything, and the others have not moved.
            assert [reader.received for reader in slow] == stalled_at
            publish(database_url, ("all", "last"))
            crowd.read_until(all_have([good], 3 * 260 + 1))
            high = memory.most
            go_on(slow)
            expected = {channel: logged(database_url, ["all", channel]) for channel in set(channels)}
            crowd.read_until(lambda: all(len(r.events) == len(expected[r.channels[1]]) for r in slow), 120)
        bound = most_for(count, BUFFER_BYTES)
        print(f"{count} stalled: +{(high - before) >> 20} MB, then at most +{(memory.most - before) >> 20} MB, of")
        print(f"{bound >> 20} MB that may be; before {before >> 20} MB; {memory}")
        for reader in slow:
            assert reader.events == expected[reader.channels[1]]
            assert {name for name, _, _ in reader.control} <= {"sse-open", "sse-cursor"}
        assert good.events == logged(database_url, ["all"])
        assert memory.most - before < bound, str(memory)
        assert "Traceback" not in server.log()


@pytest.mark.slow
def test_stalled_clients_on_channels_of_their_own_cost_no_more(database_url: str, start_server: Start) -> None:
    """Where no two share the bytes that wait for them. And all of it is in small pieces."""
    install(database_url)
    server = start_server(database_url, *SMALL_BUFFERS, FLASK_SSE_BUFFER_BYTES="65536", **PATIENT)
    count = 100
    with Crowd(server.port) as crowd:
        slow = [crowd.add(f"own-{number}", receive_buffer=4096) for number in range(count)]
        [good] = crowd.open(1, "good")
        crowd.read_until(lambda: all(reader.opened for reader in slow))
        before = resident(worker(server))
        stop(slow)
        names = [reader.channels[0] for reader in slow]
        with Memory(worker(server)) as memory:
            for number in range(5):  # in all 625 kB each
                flood(database_url, names, 25, 5000, batch=5)
                publish(database_url, ("good", str(number)))
                crowd.read_until(all_have([good], number + 1))
            go_on(slow, receive_buffer=1 << 18)
            crowd.read_until(all_have(slow, 125))
        bound = most_for(count, 65536)
        print(f"{count} stalled: at most +{(memory.most - before) >> 20} MB of {bound >> 20} MB; {memory}")
        assert all(reader.events == logged(database_url, reader.channels) for reader in slow)
        assert memory.most - before < bound, str(memory)


@pytest.mark.slow
def test_clients_with_the_kernels_own_buffers_lose_nothing_either(database_url: str, start_server: Start) -> None:
    """Those hold megabytes for each client, so that a stream is behind only after a long time."""
    install(database_url)
    server = start_server(database_url, **PATIENT)
    with Crowd(server.port) as crowd:
        slow = crowd.open(6, "a", receive_buffer=4096)
        [good] = crowd.open(1, "a")
        stop(slow)
        for number in range(8):
            flood(database_url, ["a"], 64, 10_000)
            crowd.read_until(all_have([good], 64 * number + 64))
        go_on(slow, receive_buffer=1 << 18)
        crowd.read_until(all_have(slow, 512))
        expected = logged(database_url, ["a"])
        assert all(reader.events == expected for reader in crowd.readers)


@pytest.mark.slow
def test_large_events_on_their_way_to_stalled_clients_have_a_budget(database_url: str, start_server: Start) -> None:
    """Different events of 5 MB, read from the log; those that take nothing give their room to the next, and go on."""
    install(database_url)
    count = 20
    names = [f"large-{number}" for number in range(count)]
    publish(database_url, *((name, "first") for name in names))
    after = {name: logged(database_url, [name])[0][0] for name in names}
    for name in names:
        publish(database_url, (name, name.ljust(5_000_000, "x")), (name, "last"))
    server = start_server(database_url, *SMALL_BUFFERS, **PATIENT)
    with Crowd(server.port) as crowd:
        [good] = crowd.open(1, "good")
        before = resident(worker(server))
        slow = [crowd.add(name, last_event_id=after[name], receive_buffer=4096) for name in names]
        with Memory(worker(server)) as memory:
            for reader in slow:
                reader.stop_after = 50_000  # in the middle of its large event
            crowd.read_until(lambda: not any(reader.reading for reader in slow), 30, "each has its turn")
            publish(database_url, ("good", "delayed by none"))
            crowd.read_until(all_have([good], 1))
            assert not any(reader.events for reader in slow)
            high = memory.most
            go_on(slow, receive_buffer=1 << 18)
            crowd.read_until(all_have(slow, 2), 60)
        for reader in slow:
            assert reader.events == logged(database_url, reader.channels, after[reader.channels[0]])
            assert {name for name, _, _ in reader.control} <= {"sse-open", "sse-cursor"}
        print(f"large: +{(high - before) >> 20} MB, then at most +{(memory.most - before) >> 20} MB; {memory}")
        # Beside the budget: what is being parsed and encoded, several times one event, and what malloc keeps of it.
        assert memory.most - before < 2 * replay.LARGE_BYTES, str(memory)


def test_without_the_log_a_stalled_client_is_told_that_it_is_behind(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, *SMALL_BUFFERS, **PATIENT)
    with Crowd(server.port) as crowd:
        slow = crowd.open(20, "a", receive_buffer=4096)
        [good] = crowd.open(1, "a")
        stop(slow)
        for number in range(4):
            server.post("/flood/a/50/5000")
            crowd.read_until(all_have([good], 50 * number + 50))
        go_on(slow)
        crowd.read_until(lambda: all(reader.closed for reader in slow))
        for reader in slow:
            assert reader.end == "behind" and not reader.finished  # the body breaks off, so that all clients come back
            assert reader.events == good.events[: len(reader.events)] and len(reader.events) < 200


def test_what_is_said_to_a_slow_reader_keeps_its_place(database_url: str, start_server: Start) -> None:
    """Where the log has lost what a stream has yet to read, it is told so between the old and the new."""
    install(database_url)
    server = start_server(database_url, *SMALL_BUFFERS, FLASK_SSE_BUFFER_BYTES="20000", **PATIENT)
    with Crowd(server.port) as crowd:
        [slow] = crowd.open(1, "a", receive_buffer=4096)
        [good] = crowd.open(1, "a")
        stop([slow])
        flood(database_url, ["a"], 400, 1000)
        crowd.read_until(all_have([good], 400))
        old = logged(database_url, ["a"])
        [(deleted,)] = execute(database_url, "SELECT flask_pg_sse.prune_v1('0 s', 10000)")
        assert deleted == 400
        flood(database_url, ["a"], 100, 1000)
        go_on([slow])
        crowd.read_until(lambda: len(slow.control) > 1)
        publish(database_url, ("a", "after the reset"))
        crowd.read_until(lambda: slow.events[-1][1] == "after the reset")
        [(_, reason, go_on_from)] = [block for block in slow.control if block[0] == "sse-reset"]
        assert reason == {"reason": "too-old"} and go_on_from is not None
        received = old + logged(database_url, ["a"])
        kept = [event for event in slow.events if event[0] <= go_on_from]
        assert kept == received[: len(kept)] and len(kept) < 400
        assert slow.events[len(kept) :] == [event for event in received if event[0] > go_on_from]


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "stalled"])
def test_a_stream_that_is_behind_ends_soon_when_the_worker_is_to_stop(
    database_url: str, start_server: Start, reads: bool
) -> None:
    install(database_url)
    # What else would end them takes longer than this test.
    server = start_server(database_url, *SMALL_BUFFERS, "--graceful-timeout", "300", **PATIENT)
    with Crowd(server.port) as crowd:
        slow = crowd.open(10, "a", receive_buffer=4096)
        [good] = crowd.open(1, "a")
        stop(slow)
        for number in range(4):
            flood(database_url, ["a"], 500, 1000)
            crowd.read_until(all_have([good], 500 * number + 500))
        if reads:
            go_on(slow)
            crowd.read_until(lambda: all(len(reader.events) > 50 for reader in slow), every=0)
            assert any(len(reader.events) < 2000 for reader in slow), "they are behind still"
        server.terminate()
        if reads:
            crowd.read_until(lambda: all(reader.closed for reader in slow), 60)
        eventually(lambda: server.process.poll() is not None, 60)
        go_on(slow)
        crowd.read_until(lambda: all(reader.closed for reader in crowd.readers))
        assert good.end == "shutdown"
        assert {reader.end for reader in slow} <= {"shutdown", None}
    after = start_server(database_url, *SMALL_BUFFERS)
    expected = logged(database_url, ["a"])
    with Crowd(after.port) as crowd:
        again = [crowd.add("a", last_event_id=reader.last_event_id) for reader in slow]
        crowd.read_until(lambda: all(len(a.events) + len(b.events) >= 2000 for a, b in zip(slow, again, strict=True)))
        assert all(old.events + new.events == expected for old, new in zip(slow, again, strict=True))


@pytest.mark.slow
def test_a_stream_that_is_behind_waits_for_postgres(own_postgres: postgres.Server, start_server: Start) -> None:
    url = own_postgres.url()
    install(url)
    server = start_server(url, *SMALL_BUFFERS, FLASK_SSE_HEARTBEAT="0.3", **PATIENT)
    with Crowd(server.port) as crowd:
        slow = crowd.open(10, "a", receive_buffer=4096)
        [good] = crowd.open(1, "a")
        stop(slow)
        flood(url, ["a"], 1000, 1000)
        crowd.read_until(all_have([good], 1000))
        own_postgres.stop("fast")
        go_on(slow)
        seen = [reader.comments for reader in slow]
        crowd.read_until(lambda: all(r.comments >= n + 3 for r, n in zip(slow, seen, strict=True)), 20, "heartbeats")
        assert all(len(reader.events) < 1000 and not reader.closed for reader in slow)
        own_postgres.start()
        crowd.read_until(all_have(slow, 1000))
        publish(url, ("a", "live again"))
        crowd.read_until(all_have([*slow, good], 1001))
        expected = logged(url, ["a"])
        for reader in crowd.readers:
            assert reader.events == expected
            assert {name for name, _, _ in reader.control} <= {"sse-open", "sse-cursor"}
