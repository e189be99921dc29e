"""Clients that catch up, wait for LISTEN or wait for a large event take turns, and nobody else waits for them."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.http.test_limits import streams
from tests.support.client import eventually, open_stream, request
from tests.support.crowd import Crowd, install, worker
from tests.support.postgres import execute
from tests.support.processes import cpu, resident
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
OPTIONS = ("--worker-connections", "3000", "--backlog", "2048")
# How long something may take, in seconds of the CPU that the worker uses for others meanwhile: usually it is a few
# hundredths, and half a second where many streams open. The time of the clock would say how busy the machine is.
LATE = 2.0
PATIENCE = 60.0  # in seconds, for an answer


class Took:
    """What answers have taken, in seconds of a worker's CPU."""

    def __init__(self, pid: int) -> None:
        self.times: list[float] = []
        self._pid = pid

    @contextmanager
    def measured(self) -> Iterator[None]:
        before = cpu(self._pid)
        yield
        self.times.append((cpu(self._pid) - before) / os.sysconf("SC_CLK_TCK"))

    @property
    def most(self) -> float:
        return max(self.times)

    def __str__(self) -> str:
        ordered = sorted(self.times)
        return f"{ordered[len(ordered) // 2]:.2f}, at most {ordered[-1]:.2f} ({len(ordered)})"


def history(url: str, channels: list[str], count: int, size: int) -> int:
    """Write `count` events of `size` bytes for each channel into the log, past its functions; return an id before."""
    [(head,)] = execute(url, "SELECT flask_pg_sse.publish_v1('before', '{\"{}\"}', '{\"\"}')")
    execute(
        url,
        "INSERT INTO flask_pg_sse.event (id, channel, fields, data, created_at) "
        "SELECT %s + row_number() OVER (), channel, '{}', rpad(n || ' ', %s, 'x'), now() "
        "FROM generate_series(1, %s) AS n, unnest(%s) AS channel",
        (head, size, count, channels),
    )
    execute(url, "SELECT setval('flask_pg_sse.event_id', (SELECT max(id) FROM flask_pg_sse.event))")
    return int(head)


@contextmanager
def asking(server: WebServer, *paths: str) -> Iterator[Took]:
    """Ask for the paths all the time; a POST where it begins so."""
    took = Took(worker(server))
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for path in paths:
                method, _, where = path.rpartition(" ")
                options = {"method": method or "GET", "body": b"{}" if method else b"", "timeout": PATIENCE}
                headers = {"Content-Type": "application/json"}
                with took.measured(), request(server.port, where, headers=headers, **options) as response:  # type: ignore[arg-type]
                    response.read()
                if response.status != 200:
                    took.times.append(float("inf"))
            time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield took
    finally:
        done.set()
        thread.join()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a worker stand still: what comes meanwhile, comes for it at once."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("count", "events", "workers"),
    [
        (3, 3000, ()),
        pytest.param(30, 1500, (), marks=pytest.mark.slow),
        pytest.param(100, 1000, (), marks=pytest.mark.slow),
        pytest.param(30, 1500, ("-k", "gthread", "--threads", "60"), marks=pytest.mark.slow),
    ],
    ids=["3", "30", "100", "30 threads"],
)
def test_clients_far_behind_get_on_equally_and_delay_no_page_and_no_publisher(
    database_url: str, start_server: Start, count: int, events: int, workers: tuple[str, ...]
) -> None:
    install(database_url)
    after = history(database_url, ["a"], events, 2000)  # 32 to a page
    server = start_server(database_url, *OPTIONS, *workers, FLASK_SSE_HEARTBEAT="300")  # which would bring a cursor
    with Crowd(server.port) as crowd, asking(server, "/cursor", "POST /notify/b") as took:
        with stopped(worker(server)):
            readers = [crowd.add("a", last_event_id=after) for _ in range(count)]
        crowd.read_until(lambda: all(reader.opened for reader in readers), 60, every=0.01)
        first = [len(reader.events) for reader in readers]
        assert max(first) < 0.5 * events, "some opened only when others had caught up"
        crowd.read_until(lambda: any(len(reader.events) >= 0.9 * events for reader in readers), 60, every=0.01)
        got = sorted(len(reader.events) - had for reader, had in zip(readers, first, strict=True))
        crowd.read_until(lambda: all(len(reader.events) == events for reader in readers), 60)
    print(f"{count} clients: one got {got[0]}, another {got[-1]} events; answers took {took} s of CPU")
    assert all([name for name, _, _ in reader.control] == ["sse-open"] for reader in readers)
    assert got[-1] - got[0] <= 0.2 * events, "a few pages of 32"
    assert took.most < LATE


class Passing(threading.Thread):
    """A client that opens streams on a hundred channels of its own, so many a second, and leaves each after a while.

    It goes on for five seconds, or longer where the server is too slow for so many: it leaves a stream when that is
    answered, and only as many wait for an answer as come within a fifth of a second.
    """

    def __init__(self, port: int, *, rate: int = 200, stays: float = 0.02, last_event_id: str = "") -> None:
        super().__init__()
        self.goes_on_to = 5 * rate  # streams
        self.opened = 0
        self._port, self._rate, self._stays, self._id = port, rate, stays, last_event_id
        self._done = threading.Event()

    def run(self) -> None:
        left: list[tuple[float, socket.socket]] = []
        most = int(self._rate * (self._stays + 0.2))
        begun = time.monotonic()
        while not self._done.wait(0.001) or left:
            while left and (self._done.is_set() or (left[0][0] <= time.monotonic() and readable(left[0][1]))):
                left.pop(0)[1].close()
            if not self._done.is_set() and len(left) < most and self.opened < (time.monotonic() - begun) * self._rate:
                left.append((time.monotonic() + self._stays, self._open()))
        self.seconds = time.monotonic() - begun

    def _open(self) -> socket.socket:
        query = "&".join(f"channel=n-{self.opened}-{number}" for number in range(100))
        self.opened += 1
        known = f"Last-Event-ID: {self._id}\r\n" if self._id else ""
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.sendall(f"GET /sse?{query} HTTP/1.1\r\nHost: localhost\r\n{known}\r\n".encode())
        return sock

    def __enter__(self) -> Passing:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self.join()


def readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "cap"),
    [((), "5"), ((), ""), (("-k", "gthread", "--threads", "60"), "5")],
    ids=["gevent", "gevent without a cap", "gthread"],
)
def test_one_that_asks_for_ever_new_channels_and_leaves_is_not_noticed(
    database_url: str, start_server: Start, workers: tuple[str, ...], cap: str
) -> None:
    install(database_url)
    env = {"FLASK_SSE_MAX_STREAMS_PER_CLIENT": cap} if cap else {}
    server = start_server(database_url, *OPTIONS, *workers, **env)
    pid = worker(server)
    opening, known, arriving = Took(pid), Took(pid), Took(pid)
    options = {"source": "127.0.0.2", "timeout": PATIENCE}
    with open_stream(server.port, "a", **options) as stays:
        for number in range(5):  # what the worker needs anyway
            open_stream(server.port, f"early-{number}", **options).close()
        before = resident(pid)
        with Passing(server.port) as passing:
            number = 0
            while passing.opened < passing.goes_on_to:
                assert passing.is_alive()
                number += 1
                for channel, took in ((f"own-{number}", opening), ("a", known)):
                    with took.measured():
                        stream = open_stream(server.port, channel, **options)
                    stream.close()
                with arriving.measured():
                    execute(database_url, "SELECT flask_pg_sse.notify('a', %s)", (str(number),))
                    assert stays.event().data == str(number)
            high = resident(pid)
        eventually(lambda: streams(server) == 1, PATIENCE)
        print(
            f"{passing.opened / passing.seconds:.0f} a second; seconds of CPU to open, on a new channel: {opening}; "
            f"on a known one: {known}; for an event to arrive: {arriving}; the worker had "
            f"{before >> 20} MB, {high >> 20} at the end, and {resident(pid) >> 20} then"
        )
    for took in (opening, known, arriving):
        assert took.most < LATE
    assert "Traceback" not in server.log()
    assert high - before < 30 << 20


def test_a_worker_that_listens_to_all_the_channels_it_can_opens_known_ones(
    database_url: str, start_server: Start
) -> None:
    server = start_server(database_url, app="tests.support.apps.few_channels:app")
    names = [f"room-{number}" for number in range(9)]
    with open_stream(server.port, *names), open_stream(server.port, *names[:2]):
        with request(server.port, "/sse?channel=new&channel=newer") as refused:
            assert refused.next().json == {"reason": "capacity"}
        with open_stream(server.port, "new"):
            assert streams(server) == 3
    eventually(lambda: streams(server) == 0)
    with open_stream(server.port, *(f"other-{number}" for number in range(10))):  # what lingers makes room
        server.post("/notify/other-9", b'{"data": "hello"}')


@pytest.mark.parametrize(
    "workers",
    [(), pytest.param(("-k", "gthread", "--threads", "40"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)
def test_a_stream_that_waits_for_listen_is_let_go_when_its_client_leaves(
    own_postgres: postgres.Server, start_server: Start, workers: tuple[str, ...]
) -> None:
    app = "tests.support.apps.patient:app"
    server = start_server(own_postgres.url(), *OPTIONS, *workers, app=app, FLASK_SSE_HEARTBEAT="300")
    with open_stream(server.port, "a"):
        own_postgres.stop()
        with Crowd(server.port) as crowd:
            for number in range(20):
                crowd.add(f"b-{number}")
            eventually(lambda: streams(server) == 21, PATIENCE)
        eventually(lambda: streams(server) == 1, PATIENCE, "and not when its wait of ten minutes ends")
        eventually(lambda: server.get("/held") == "1", PATIENCE)


@pytest.mark.slow
def test_one_that_resumes_on_ever_new_channels_is_not_noticed_by_others_that_resume(
    database_url: str, start_server: Start
) -> None:
    """Each of its streams has the log asked for a hundred channels, which are in it."""
    install(database_url)
    after = history(database_url, [f"n-{number}-{which}" for number in range(200) for which in range(100)], 5, 200)
    history(database_url, [f"own-{number}" for number in range(200)], 20, 200)
    server = start_server(database_url, *OPTIONS)
    resuming, arriving = Took(worker(server)), Took(worker(server))
    options = {"source": "127.0.0.2", "timeout": PATIENCE}
    passing = Passing(server.port, rate=40, stays=1.0, last_event_id=str(after))
    with open_stream(server.port, "a", **options) as stays, passing:
        number = 0
        while passing.opened < passing.goes_on_to and number < 200:
            known = {"Last-Event-ID": str(after)}
            with resuming.measured(), open_stream(server.port, f"own-{number}", headers=known, **options) as stream:
                assert str(stream.event().data).startswith("1 ")
            with arriving.measured():
                execute(database_url, "SELECT flask_pg_sse.notify('a', %s)", (str(number),))
                assert stays.event().data == str(number)
            number += 1
    print(f"seconds of CPU to resume: {resuming}; for an event to arrive: {arriving}")
    assert resuming.most < LATE and arriving.most < LATE


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-k", "gthread", "--threads", "60")], ids=["gevent", "gthread"])
def test_clients_that_do_not_read_keep_nobody_from_large_events(
    database_url: str, start_server: Start, workers: tuple[str, ...]
) -> None:
    """They hold thirteen events of 5 MB, which is all the room, and are not cut before the others have theirs."""
    install(database_url)
    names = [f"large-{number}" for number in range(18)]
    after = history(database_url, names, 1, 5_000_000)
    small_buffers = ("-c", "python:tests.support.apps.small_buffers")
    server = start_server(database_url, *OPTIONS, *workers, *small_buffers, FLASK_SSE_SEND_TIMEOUT="300")
    with Crowd(server.port) as crowd:
        for channel in names[13:]:
            idle = [crowd.add(name, last_event_id=after, receive_buffer=4096) for name in names[:13]]
            for reader in idle:
                reader.stop_after = 20_000
            crowd.read_until(lambda: not any(reader.reading for reader in idle), 60)  # noqa: B023
            good = crowd.add(channel, last_event_id=after)
            crowd.read_until(lambda: good.events or good.closed, PATIENCE)  # noqa: B023
            assert good.end is None and len(good.events) == 1
            if channel == names[-1]:
                for reader in idle:
                    reader.reading = True
                crowd.read_until(lambda: all(reader.events for reader in idle), 60)  # noqa: B023
                assert [reader.ids for reader in idle] == [[after + number] for number in range(1, 14)]
            for reader in [*idle, good]:
                reader.sock.close()
                crowd.readers.remove(reader)
    assert "Traceback" not in server.log()
