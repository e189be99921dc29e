"""Streams under a real server: order, heartbeats, slow and vanished clients, PostgreSQL going and coming back."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

import psycopg2
import pytest

from tests.support.client import eventually, open_stream, request
from tests.support.crowd import worker
from tests.support.postgres import connect, execute
from tests.support.processes import resident
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
WORKERS = pytest.mark.parametrize(
    "options",
    [(), pytest.param(("-k", "gthread", "--threads", "8"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)


def state(server: WebServer) -> dict[str, object]:
    found: dict[str, object] = json.loads(server.get("/state"))
    return found


FIRST_BLOCK = b"retry: 3000\nevent: sse-open\ndata: {}\n\n"


def test_the_first_block_and_the_headers(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_HEARTBEAT="0.2")
    with request(server.port, "/sse?channel=a&channel=b") as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["connection"] == "close"
        while len(response.body) < len(FIRST_BLOCK):
            response._read_more()
        assert response.body == FIRST_BLOCK
    with request(server.port, "/sse/a", method="HEAD") as response:
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    eventually(lambda: state(server)["streams"] == 0)


def test_two_channels_on_one_stream_keep_the_order_of_their_commits(database_url: str, start_server: Start) -> None:
    """Within one turn too: several hundred events of one transaction arrive in one read."""
    server = start_server(database_url)
    with open_stream(server.port, "a", "b") as both, open_stream(server.port, "a") as only_a:
        chooser = random.Random(7)
        sent: list[tuple[str, int]] = []
        connection = connect(database_url)
        with connection.cursor() as cursor:
            for number in range(300):
                channel = chooser.choice("ab")
                sent.append((channel, number))
                cursor.execute("SELECT pg_notify(%s, %s)", (channel, f"{channel} {number}"))
            cursor.execute("BEGIN")
            for number in range(300, 900):
                channel = chooser.choice("ab")
                sent.append((channel, number))
                cursor.execute("SELECT pg_notify(%s, %s)", (channel, f"{channel} {number}"))
            cursor.execute("COMMIT")
        connection.close()
        assert [both.event().data for _ in sent] == [f"{channel} {number}" for channel, number in sent]
        of_a = [f"a {number}" for channel, number in sent if channel == "a"]
        assert [only_a.event().data for _ in of_a] == of_a


def test_nothing_is_missed_after_the_first_block(database_url: str, start_server: Start) -> None:
    """Clients come while a publisher never ends: each sees an unbroken row from its first event on."""
    server = start_server(database_url)
    stop = threading.Event()
    sent, read = [0], [0]

    def publish() -> None:
        connection = connect(database_url)
        with connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute("SELECT pg_notify('row', %s)", (str(sent[0]),))
                sent[0] += 1
                if sent[0] - read[0] > 2000:  # a stream would wait behind all that a busy machine has not read
                    stop.wait(0.01)
        connection.close()

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(30):
            opened_after: int
            with open_stream(server.port, "row", "other") as stream:
                opened_after = sent[0]
                numbers = [int(stream.event().data or "") for _ in range(50)]
            read[0] = numbers[-1]
            assert numbers == list(range(numbers[0], numbers[0] + 50))
            assert numbers[0] <= opened_after + 1, "the first event sent after the first block is there"
    finally:
        stop.set()
        publisher.join()


def test_what_has_no_data_dispatches_nothing(database_url: str, start_server: Start) -> None:
    """Neither a heartbeat nor a NOTIFY of the older projects: there is no blank line, and the next event is whole."""
    server = start_server(database_url, FLASK_SSE_HEARTBEAT="0.2")
    with open_stream(server.port, "orders") as stream:
        for payload in ('{"event": "created"}', '{"comment": "a\nb"}', '{"id": 7, "retry": 5000, "sep": "\r"}'):
            execute(
                database_url, "SELECT pg_notify('orders', %s)", (payload.replace("\n", "\\n").replace("\r", "\\r"),)
            )
        execute(database_url, "NOTIFY orders, 'hello'")
        said = b""
        message = stream.next()
        while message.data is None:  # heartbeats
            message = stream.next()
        assert (message.event, message.data, message.id, message.retry) == ("message", "hello", "7", 5000)
        assert [line for line in message.comments if line != "heartbeat"] == ["a", "b"]
        while said.count(b"heartbeat") < 3:
            stream._read_more()
            said, stream.body = said + stream.body, b""
        assert said == b": heartbeat\n" * said.count(b"heartbeat")
        server.post("/notify/orders", b'{"comment": "only this"}')
        message = stream.next()
        while message.data is None:
            message = stream.next()
        assert (message.data, message.comments[-1:]) == ("", ["only this"]), "notify() dispatches what has no data, too"


@WORKERS
def test_quiet_streams_get_heartbeats_and_busy_ones_do_not(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    server = start_server(database_url, *options, FLASK_SSE_HEARTBEAT="0.4")
    sent_at = time.monotonic()
    with open_stream(server.port, "quiet") as quiet, open_stream(server.port, "busy") as busy:
        connection = connect(database_url)
        with connection.cursor() as cursor:
            beats = 0
            deadline = time.monotonic() + 20
            while beats < 4:
                assert time.monotonic() < deadline, "heartbeats come"
                before, sent_at = sent_at, time.monotonic()
                cursor.execute("NOTIFY busy, 'x'")
                while busy.next().data != "x":  # something stood still, and the stream was quiet meanwhile
                    assert time.monotonic() - before > 0.4, "no heartbeat among events"
                # The quiet one's heartbeats are the clock of this test.
                quiet.sock.settimeout(0.05)
                try:
                    quiet.timeout = 0.05
                    assert quiet.next().comments == ["heartbeat"]
                    beats += 1
                except TimeoutError:
                    pass
        connection.close()


def test_a_client_that_goes_frees_its_subscription_and_its_listen(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_HEARTBEAT="0.2", app="tests.support.apps.no_linger:app")
    kept = open_stream(server.port, "kept")
    for how in ("close", "reset", "shutdown"):
        streams = [open_stream(server.port, "kept", f"room-{n}") for n in range(20)]
        assert state(server)["streams"] == 21
        for stream in streams:
            if how == "reset":
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "shutdown":
                stream.sock.shutdown(socket.SHUT_RDWR)
            stream.close()
        eventually(lambda: state(server) == {"streams": 1, "listened": ["kept"]})
    execute(database_url, "NOTIFY kept, 'still here'")
    assert kept.event().data == "still here"
    kept.close()
    eventually(lambda: state(server) == {"streams": 0, "listened": []})
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_the_memory_of_clients_that_went_is_used_again(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_HEARTBEAT="0.2")
    pid = worker(server)
    sizes = []
    for _ in range(6):
        streams = [open_stream(server.port, "orders") for _ in range(150)]
        for stream in streams:
            stream.close()
        eventually(lambda: state(server)["streams"] == 0)
        sizes.append(resident(pid))
    assert sizes[-1] - sizes[1] < 2000 * 1024, sizes


@pytest.mark.parametrize("app", ["basic", pytest.param("hiding", marks=pytest.mark.slow)])
def test_a_reader_that_is_too_slow_is_told_so_and_others_lose_nothing(
    database_url: str, start_server: Start, app: str
) -> None:
    """And its connection is closed, though it could be kept alive."""
    server = start_server(database_url, "--keep-alive", "75", app=f"tests.support.apps.{app}:app")
    slow = open_stream(server.port, "orders", receive_buffer=65536)
    with open_stream(server.port, "orders") as quick:
        for _ in range(10):  # 14 MB: past the buffer and the kernel's
            server.post("/flood/orders/200/7000")
            for number in range(200):
                assert (quick.event().data or "").split()[0] == str(number)
    received = []
    while (message := slow.event()).event != "sse-end":
        received.append(int((message.data or "").split()[0]))
    assert message.json == {"reason": "behind"}
    assert received == [number % 200 for number in range(len(received))], "what it got is whole and in order"
    assert len(received) < 2000
    slow.wait_closed()
    slow.close()


@WORKERS
def test_a_burst_reaches_every_stream_that_reads(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """One MB in one transaction, four times what may wait for a stream."""
    server = start_server(database_url, *options)
    streams = [open_stream(server.port, "orders") for _ in range(5)]
    server.post("/flood/orders/150/7000")
    for stream in streams:
        assert [int((stream.event().data or "").split()[0]) for _ in range(150)] == list(range(150))
        stream.close()


@WORKERS
def test_streams_outlive_a_restart_of_postgres(
    own_postgres: postgres.Server, start_server: Start, options: tuple[str, ...]
) -> None:
    server = start_server(own_postgres.url(), *options, FLASK_SSE_HEARTBEAT="0.2")
    with open_stream(server.port, "orders") as stream:
        modes: tuple[postgres.StopMode, ...] = ("fast", "immediate")
        for mode in modes:
            execute(own_postgres.url(), "NOTIFY orders, 'before'")
            assert stream.event().data == "before"
            own_postgres.stop(mode)
            for _ in range(3):
                assert stream.next().comments == ["heartbeat"], "the stream goes on"
            own_postgres.start()
            message = stream.event()
            assert (message.event, message.json) == ("sse-reset", {"reason": "reconnected"})
            execute(own_postgres.url(), "NOTIFY orders, 'after'")
            assert stream.event().data == "after"
            # notify() finds its connection dead and takes another.
            server.post("/notify/orders", b'{"data": "from a view"}')
            assert stream.event().data == "from a view"


def test_a_stream_that_reconnects_learns_that_it_may_have_missed_events(database_url: str, start_server: Start) -> None:
    server = start_server(database_url)
    for last_id in ("7", "0", "rubbish", "9" * 3000, "-1", "%00"):
        with open_stream(server.port, "orders", headers={"Last-Event-ID": last_id}) as stream:
            assert stream.event().event == "sse-reset"
    with request(server.port, "/sse?channel=orders&last_event_id=3") as stream:
        assert [stream.event().event, stream.event().event] == ["sse-open", "sse-reset"]


@pytest.mark.slow
def test_a_storm_of_connections_on_as_many_channels(database_url: str, start_server: Start) -> None:
    """500 clients that come at once are all served by few statements, and each hears its own channel."""
    server = start_server(database_url, "--backlog", "1024")
    sockets = []
    for number in range(500):
        sock = socket.create_connection(("127.0.0.1", server.port), 20)
        sock.sendall(f"GET /sse/room-{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        sockets.append(sock)

    def read_until(sock: socket.socket, mark: bytes) -> None:
        answer = b""
        while mark not in answer:
            data = sock.recv(65536)
            assert data, answer
            answer += data

    for sock in sockets:
        sock.settimeout(20)
        read_until(sock, b"sse-open")
    execute(database_url, "SELECT pg_notify('room-' || n, 'for ' || n) FROM generate_series(0, 499) AS n")
    for number, sock in enumerate(sockets):
        read_until(sock, f"data: for {number}\n".encode())
        sock.close()


def test_sql_in_channel_names_does_nothing(database_url: str, start_server: Start) -> None:
    server = start_server(database_url)
    execute(database_url, "CREATE TABLE precious (id int)")
    attacks = [f"x{quote}; DROP TABLE precious; --" for quote in ('"', "'", "\\'", '\\"', "$$")]
    names = [*attacks, 'x"', "*", "%s"]
    with open_stream(server.port, *names) as stream:
        for name in names:
            path = "/notify/" + "".join(f"%{byte:02X}" for byte in name.encode())
            server.post(path, json.dumps({"data": name}).encode())
            assert stream.event().data == name
    assert execute(database_url, "SELECT count(*) FROM precious") == [(0,)]


def test_payloads_of_postgres_limit_and_beyond(database_url: str, start_server: Start) -> None:
    server = start_server(database_url)
    with open_stream(server.port, "orders") as stream:
        execute(database_url, "SELECT pg_notify('orders', %s)", ("x" * 7999,))
        assert stream.event().data == "x" * 7999
        with pytest.raises(psycopg2.Error):
            execute(database_url, "SELECT pg_notify('orders', %s)", ("x" * 8000,))
        server.post("/notify/orders", json.dumps({"data": "é" * 3900}).encode())
        assert stream.event().data == "é" * 3900
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"data": "x" * 8000}).encode()
        with request(server.port, "/notify/orders", method="POST", headers=headers, body=body) as response:
            assert response.status == 500
        assert "PayloadTooLarge" in server.log() and "8000 bytes" in server.log()
        server.post("/notify/orders", b'{"data": "and on"}')
        assert stream.event().data == "and on"


def test_a_forked_worker_shares_nothing_with_the_master(database_url: str, start_server: Start) -> None:
    """An app that notifies while it is loaded, under --preload, has used the database before the fork."""
    server = start_server(database_url, "-w", "2", "--preload", app="tests.support.apps.notifies_at_import:app")
    streams = [open_stream(server.port, "orders") for _ in range(8)]

    def send(start: int) -> None:
        for number in range(start, start + 25):
            server.post("/notify/orders", json.dumps({"data": number}).encode())

    # All at once, so that both workers use their connections at the same time.
    threads = [threading.Thread(target=send, args=(start,)) for start in range(0, 200, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        assert sorted(stream.event().json for _ in range(200)) == list(range(200))
        stream.close()
    assert "Traceback" not in server.log()
