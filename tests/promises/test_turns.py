"""Clients that catch up, wait for LISTEN or wait for a large event take turns, and nobody else waits for them."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.http.test_limits import streams
from tests.support.client import eventually, open_stream, request
from tests.support.crowd import Crowd, install, resident, worker
from tests.support.postgres import execute
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
OPTIONS = ("--worker-connections", "3000", "--backlog", "2048")
ATTACK = 5.0  # seconds of it
# Seconds that nothing may take on a machine that many tests keep busy; usually it is a few hundredths. After 10 s a
# stream that waits is told `unavailable`.
LATE = 8.0


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
def asking(server: WebServer, *paths: str) -> Iterator[list[float]]:
    """Ask for the paths all the time; a POST where it begins so. Gives the seconds that each answer has taken."""
    times: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for path in paths:
                method, _, where = path.rpartition(" ")
                begun = time.monotonic()
                headers = {"Content-Type": "application/json"}
                body = b"{}" if method else b""
                with request(server.port, where, method=method or "GET", headers=headers, body=body) as response:
                    response.read()
                    times.append(time.monotonic() - begun if response.status == 200 else float("inf"))
            time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()


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
    server = start_server(database_url, *OPTIONS, *workers)
    with Crowd(server.port) as crowd, asking(server, "/cursor", "POST /notify/b") as times:
        readers = [crowd.add("a", last_event_id=after) for _ in range(count)]
        crowd.read_until(lambda: all(reader.opened for reader in readers), 60, every=0.01)
        first = [len(reader.events) for reader in readers]
        assert max(first) < 0.5 * events, "some opened only when others had caught up"
        crowd.read_until(lambda: any(len(reader.events) >= 0.9 * events for reader in readers), 60, every=0.01)
        got = sorted(len(reader.events) - had for reader, had in zip(readers, first, strict=True))
        crowd.read_until(lambda: all(len(reader.events) == events for reader in readers), 60)
    print(f"{count} clients: one got {got[0]}, another {got[-1]} events; the slowest answer took {max(times):.3f} s")
    assert all([name for name, _, _ in reader.control] == ["sse-open"] for reader in readers)
    assert got[-1] - got[0] <= 0.2 * events, "a few pages of 32"
    assert max(times) < LATE


class Passing(threading.Thread):
    """A client that opens streams on a hundred channels of its own, so many a second, and leaves each after a while."""

    def __init__(self, port: int, *, rate: int = 200, stays: float = 0.02, last_event_id: str = "") -> None:
        super().__init__()
        self.opened = 0
        self._port, self._rate, self._stays, self._id = port, rate, stays, last_event_id
        self._done = threading.Event()

    def run(self) -> None:
        left: list[tuple[float, socket.socket]] = []
        begun = time.monotonic()
        while not self._done.wait(0.001) or left:
            while left and (left[0][0] <= time.monotonic() or self._done.is_set()):
                left.pop(0)[1].close()
            if not self._done.is_set() and self.opened < (time.monotonic() - begun) * self._rate:
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
    opening: list[float] = []
    known: list[float] = []
    arriving: list[float] = []
    pid = worker(server)
    with open_stream(server.port, "a", source="127.0.0.2") as stays:
        for number in range(5):  # what the worker needs anyway
            open_stream(server.port, f"early-{number}", source="127.0.0.2").close()
        before = resident(pid)
        with Passing(server.port) as passing:
            begun = time.monotonic()
            number = 0
            while time.monotonic() < begun + ATTACK:
                number += 1
                for channel, times in ((f"own-{number}", opening), ("a", known)):
                    since = time.monotonic()
                    with open_stream(server.port, channel, source="127.0.0.2"):
                        times.append(time.monotonic() - since)
                since = time.monotonic()
                execute(database_url, "SELECT flask_pg_sse.notify('a', %s)", (str(number),))
                assert stays.event().data == str(number)
                arriving.append(time.monotonic() - since)
            high = resident(pid)
        eventually(lambda: streams(server) == 1, 5)
        print(
            f"{passing.opened / passing.seconds:.0f} a second; seconds to open, on a new channel: {told(opening)}; "
            f"on a known one: {told(known)}; for an event to arrive: {told(arriving)}; the worker had "
            f"{before >> 20} MB, {high >> 20} at the end, and {resident(pid) >> 20} then"
        )
    for times in (opening, known, arriving):
        assert max(times) < LATE
    assert "Traceback" not in server.log()
    assert high - before < 30 << 20


def told(times: list[float]) -> str:
    ordered = sorted(times)
    return f"{ordered[len(ordered) // 2]:.3f}, at most {ordered[-1]:.3f} ({len(ordered)})"


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
    server = start_server(own_postgres.url(), *OPTIONS, *workers, FLASK_SSE_HEARTBEAT="300")
    with open_stream(server.port, "a"):
        own_postgres.stop()
        with Crowd(server.port) as crowd:
            for number in range(20):
                crowd.add(f"b-{number}")
            eventually(lambda: streams(server) == 21, 5)
        begun = time.monotonic()
        eventually(lambda: streams(server) == 1, 5)
        assert time.monotonic() - begun < 2, "and not when its wait of ten seconds ends"
        eventually(lambda: server.get("/held") == "1", 5)


@pytest.mark.slow
def test_one_that_resumes_on_ever_new_channels_is_not_noticed_by_others_that_resume(
    database_url: str, start_server: Start
) -> None:
    """Each of its streams has the log asked for a hundred channels, which are in it."""
    install(database_url)
    after = history(database_url, [f"n-{number}-{which}" for number in range(200) for which in range(100)], 5, 200)
    history(database_url, [f"own-{number}" for number in range(200)], 20, 200)
    server = start_server(database_url, *OPTIONS)
    resuming: list[float] = []
    arriving: list[float] = []
    passing = Passing(server.port, rate=40, stays=1.0, last_event_id=str(after))
    with open_stream(server.port, "a", source="127.0.0.2") as stays, passing:
        begun = time.monotonic()
        number = 0
        while time.monotonic() < begun + ATTACK:
            since = time.monotonic()
            known = {"Last-Event-ID": str(after)}
            with open_stream(server.port, f"own-{number}", source="127.0.0.2", headers=known) as stream:
                assert str(stream.event().data).startswith("1 ")
            resuming.append(time.monotonic() - since)
            since = time.monotonic()
            execute(database_url, "SELECT flask_pg_sse.notify('a', %s)", (str(number),))
            assert stays.event().data == str(number)
            arriving.append(time.monotonic() - since)
            number += 1
    print(f"seconds to resume: {told(resuming)}; for an event to arrive: {told(arriving)}")
    assert statistics.median(resuming) < LATE / 2 and max(arriving) < LATE


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-k", "gthread", "--threads", "60")], ids=["gevent", "gthread"])
def test_clients_that_do_not_read_keep_nobody_from_large_events(
    database_url: str, start_server: Start, workers: tuple[str, ...]
) -> None:
    """They hold thirteen events of 5 MB, which is all the room, and come again before they are cut."""
    install(database_url)
    names = [f"large-{number}" for number in range(18)]
    after = history(database_url, names, 1, 5_000_000)
    small_buffers = ("-c", "python:tests.support.apps.small_buffers")
    server = start_server(database_url, *OPTIONS, *workers, *small_buffers, FLASK_SSE_SEND_TIMEOUT="30")
    took: list[float] = []
    with Crowd(server.port) as crowd:
        for channel in names[13:]:
            idle = [crowd.add(name, last_event_id=after, receive_buffer=4096) for name in names[:13]]
            for reader in idle:
                reader.stop_after = 20_000
            crowd.read_until(lambda: not any(reader.reading for reader in idle), 60)  # noqa: B023
            begun = time.monotonic()
            good = crowd.add(channel, last_event_id=after)
            crowd.read_until(lambda: good.events or good.closed, 20)  # noqa: B023
            took.append(time.monotonic() - begun)
            assert good.end is None and len(good.events) == 1
            if channel == names[-1]:
                for reader in idle:
                    reader.reading = True
                crowd.read_until(lambda: all(reader.events for reader in idle), 60)  # noqa: B023
                assert [reader.ids for reader in idle] == [[after + number] for number in range(1, 14)]
            for reader in [*idle, good]:
                reader.sock.close()
                crowd.readers.remove(reader)
    print(f"seconds to get 5 MB: {told(took)}")
    assert max(took) < LATE
    assert "Traceback" not in server.log()
