"""Caps on streams, of a worker and of a client: the contract's soft refusal past them, and room for other routes."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse.hub.admission import StreamLimiter, _taken_here
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.server.capacity import room_for_streams
from flask_pg_sse.testing import parse, stream
from flask_pg_sse.tokens import Token, sign_token
from flask_pg_sse.web.authorize import counted_under
from tests.support.client import eventually, open_stream, request
from tests.support.crowd import Crowd, worker
from tests.support.postgres import execute, members
from tests.support.processes import resident
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]
FULL = ("sse-end", {"reason": "capacity"})


def refused(port: int, path: str = "/sse?channel=a", **options: Any) -> bool:
    """Tell whether a stream is refused for want of room; the connection must then be closed."""
    with request(port, path, **options) as response:
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        message = response.next()
        if message.event == "sse-open":
            return False
        assert (message.event, message.json) == FULL and message.retry is not None
        assert response.read() == b""
        response.wait_closed()
        return True


def streams(server: WebServer) -> int:
    return int(server.get("/state").split('"streams":')[1].split("}")[0].split(",")[0])


# -- a worker


def worker_of(kind: str, connections: int, threads: int = 1) -> Any:
    return SimpleNamespace(cfg=SimpleNamespace(worker_class_str=kind, worker_connections=connections, threads=threads))


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (None, (1000, None)),
        (worker_of("gevent", 1000), (900, 1000)),
        (worker_of("gevent", 10), (9, 10)),
        (worker_of("gevent", 2), (1, 2)),
        (worker_of("gevent", 1), (1, 1)),
        (worker_of("eventlet", 10_000), (9000, 10_000)),
        (worker_of("gthread", 1000, 8), (7, 8)),
        (worker_of("gthread", 1000, 2), (1, 2)),
        (worker_of("gthread", 5, 8), (4, 5)),
    ],
)
def test_the_default_leaves_room_for_other_requests(of: Any, expected: tuple[int, int | None]) -> None:
    assert room_for_streams(of) == expected


@pytest.mark.parametrize(
    ("options", "room"),
    [(("--worker-connections", "20"), 18), (("-k", "gthread", "--threads", "5"), 4)],
    ids=["gevent", "gthread"],
)
def test_a_worker_full_of_streams_answers_other_routes(
    database_url: str, start_server: Start, options: tuple[str, ...], room: int
) -> None:
    server = start_server(database_url, *options, FLASK_SSE_HEARTBEAT="1")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_stream(server.port, "a")) for _ in range(room)]
        for _ in range(30):
            assert refused(server.port)
            assert server.get("/ping") == "pong"
        opened[0].close()
        eventually(lambda: not refused(server.port), 40)  # as soon as it is noticed
    assert "Traceback" not in server.log()


def test_two_apps_in_one_worker_have_its_room_together(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, "--worker-connections", "10", app="tests.support.apps.two:app")
    with ExitStack() as stack:
        for number in range(9):
            stack.enter_context(open_stream(server.port, "a", path="/two/sse" if number % 2 else "/sse"))
        for path in ("/sse?channel=a", "/two/sse?channel=a"):
            assert refused(server.port, path)
        assert server.get("/ping") == server.get("/two/ping") == "pong"


def test_a_worker_that_notifies_before_its_first_stream_knows_its_room(database_url: str, start_server: Start) -> None:
    """Under --preload the worker finds out what it is only once it is used."""
    server = start_server(database_url, "--preload", "--worker-connections", "10")
    server.post("/notify/a", b'{"data": "x"}')
    with ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(open_stream(server.port, "a"))
        assert refused(server.port)


def test_a_configured_cap(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS="2")
    with open_stream(server.port, "a"), open_stream(server.port, "b"):
        assert refused(server.port) and refused(server.port, "/sse/b")
    assert "holds" not in server.log()


@pytest.mark.parametrize("most", ["20", "21", pytest.param("100000", marks=pytest.mark.slow)])
def test_more_than_the_worker_can_hold_is_warned_about(database_url: str, start_server: Start, most: str) -> None:
    server = start_server(database_url, "--worker-connections", "20", FLASK_SSE_MAX_STREAMS=most)
    with open_stream(server.port, "a"), open_stream(server.port, "a"):
        assert server.log().count(f"SSE_MAX_STREAMS is {most}, and this worker holds 20 connections at once") == 1


def test_a_refused_stream_leaves_nothing_behind(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_MAX_STREAMS=1)
    first = opened(app, "/sse?channel=a")
    hub = app.extensions["pg_sse"].runtime.worker.streams[0]
    for _ in range(100):
        events = stream(app.test_client(), "/sse?channel=b")
        assert [(event.event, event.json) for event in events] == [FULL]
    assert len(hub) == 1 and len(hub.admission.limiter._taken) == 1
    first.close()
    opened(app, "/sse?channel=b").close()


def test_who_is_refused_keeps_its_position(database_url: str, make_app: MakeApp) -> None:
    """A page that fetches a new URL then can go on from there."""
    app = make_app(database_url, SSE_MAX_STREAMS=1)
    first = opened(app, "/sse?channel=a")
    for url, known in (("/sse?channel=b&last_event_id=1234", ""), ("/sse?channel=b", "1234")):
        [end] = parse(app.test_client().get(url, headers={"Last-Event-ID": known}).iter_encoded())
        assert (end.event, end.json, end.id) == (*FULL, "1234")
    first.close()


def test_what_a_forked_process_gives_back_was_its_parents() -> None:
    limiter, one = StreamLimiter(1, None, most_here=1000), Subscription(["a"], 1)
    assert limiter.acquire(one)
    child = os.fork()
    if not child:
        limiter.release(one)
        limiter.release(one)
        os._exit(len(_taken_here))
    assert os.waitpid(child, 0)[1] == 0
    limiter.release(one)


def opened(app: Flask, url: str, **options: Any) -> Any:
    events = stream(app.test_client(), url)
    assert next(events).event == "sse-open"
    return events


# -- a client


def test_streams_of_one_address(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS_PER_CLIENT="3")
    with open_stream(server.port, "a"), open_stream(server.port, "b"), open_stream(server.port, "a", "b"):
        assert refused(server.port)
        assert refused(server.port, headers={"X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.2"})


def test_a_page_that_is_loaded_anew_does_not_stand_in_its_own_way(database_url: str, start_server: Start) -> None:
    """Long before a heartbeat finds out that the old stream has gone."""
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS_PER_CLIENT="1", FLASK_SSE_HEARTBEAT="3600")
    for _ in range(20):
        with open_stream(server.port, "a"):
            pass
    with open_stream(server.port, "a"):
        assert refused(server.port)


def test_behind_a_proxy_it_is_the_address_that_proxyfix_gives(database_url: str, start_server: Start) -> None:
    limits = {"FLASK_SSE_MAX_STREAMS_PER_CLIENT": "1"}
    server = start_server(database_url, app="tests.support.apps.behind_proxy:app", **limits)
    first = {"X-Forwarded-For": "10.0.0.1"}
    other = {"X-Forwarded-For": "10.0.0.1, 10.0.0.2"}  # the last one is the proxy's word
    with open_stream(server.port, "a", headers=first):
        assert refused(server.port, headers=first)
        assert not refused(server.port, headers=other)


@pytest.mark.slow
def test_streams_of_one_subject(database_url: str, start_server: Start) -> None:
    """Whatever its address; and others at that address are not concerned."""
    members(database_url, ("ann", "a"), ("bob", "a"))
    server = start_server(database_url, app="tests.support.apps.members:app", FLASK_SSE_MAX_STREAMS_PER_CLIENT="2")
    token = sign_token(["a secret"], Token(frozenset("a"), None, "ann"))
    with ExitStack() as stack:
        for path in ("/sse?user=ann&channel=a", f"/sse?channel=a&token={token}"):
            response = stack.enter_context(request(server.port, path))
            assert response.next().event == "sse-open"
        assert refused(server.port, "/sse?user=ann&channel=a")
        assert refused(server.port, f"/sse?channel=a&token={token}")
        assert refused(server.port, f"/sse?user=bob&channel=a&token={token}"), "it is ann's as well"
        assert not refused(server.port, "/sse?user=bob&channel=a")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::1", "127.0.0.1", False),
        ("", None, True),
        ("unix:", "", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        # As a gateway wrote it into X-Forwarded-For.
        ("10.0.0.1:50001", "10.0.0.1:50002", True),
        ("10.0.0.1:50001", "10.0.0.1", True),
        ("10.0.0.1:50001", "10.0.0.2:50001", False),
        ("[2001:db8::1]:50001", "[2001:db8::2]:50002", True),
        ("[2001:db8::1]:50001", "2001:db8::1", True),
        ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1", False),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1", True),
        ("[]:1", "[x]:1", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str | None, same: bool) -> None:
    assert (counted_under([], one) == counted_under([], other)) is same


def test_an_address_is_no_subject() -> None:
    assert set(counted_under(["10.0.0.1"], None)).isdisjoint(counted_under([], "10.0.0.1"))
    assert counted_under(["7", "8"], "10.0.0.1") == counted_under(["8", "7"], "10.0.0.2")


def test_a_place_is_given_back_once() -> None:
    before = len(_taken_here)
    limiter = StreamLimiter(1, None, most_here=1000)
    one, other = Subscription("a", 1000), Subscription("a", 1000)
    assert limiter.acquire(one) and not limiter.acquire(other)
    limiter.release(other)  # which has none
    assert not limiter.acquire(other)
    limiter.release(one)
    limiter.release(one)
    assert limiter.acquire(other) and not limiter.acquire(one)
    assert len(_taken_here) == before + 1
    limiter.release(other)
    assert len(_taken_here) == before


def test_many_at_once_get_as_many_as_there_are_places(database_url: str, start_server: Start) -> None:
    """All ask before the first has its place."""
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS_PER_CLIENT="5")
    with Crowd(server.port) as crowd:
        readers = [crowd.add("a") for _ in range(60)]
        crowd.read_until(lambda: all(reader.control for reader in readers))
        assert sum(reader.opened for reader in readers) == 5
        assert sum(reader.end == "capacity" for reader in readers) == 55


def test_clients_that_have_gone_are_forgotten(database_url: str, make_app: MakeApp) -> None:
    """The table of clients grows with those that listen, not with those that have ever listened."""
    app = make_app(database_url, SSE_MAX_STREAMS_PER_CLIENT=2, SECRET_KEY="x")
    for number in range(50):
        token = sign_token(["x"], Token(frozenset("a"), None, str(number)))
        opened(app, f"/sse?channel=a&token={token}").close()
    hub = app.extensions["pg_sse"].runtime.worker.streams[0]
    eventually(lambda: not hub.admission.limiter._of)


# -- a flood


@pytest.mark.slow
def test_a_flood_from_one_address_leaves_the_worker_as_it_was(database_url: str, start_server: Start) -> None:
    """2,500 connections, of which 20 may stream; those that are refused read nothing and do not close."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    server = start_server(database_url, "--worker-connections", "1000", FLASK_SSE_MAX_STREAMS_PER_CLIENT="20")
    waits: list[float] = []
    stop = threading.Event()

    def ask_other_routes() -> None:
        while not stop.is_set():
            began = time.monotonic()
            assert server.get("/ping") == "pong"
            waits.append(time.monotonic() - began)

    pid = worker(server)
    other = threading.Thread(target=ask_other_routes)
    try:
        with Crowd(server.port) as crowd:
            crowd.open(20, "a")
            for _ in range(2000):  # the first flood, of more than it takes at once, makes room for every later one
                crowd.add("a").reading = False
            eventually(lambda: server.get("/ping"))
            before = resident(pid)
            other.start()
            for _ in range(5):
                asked = [crowd.add("a") for _ in range(500)]
                for reader in asked:
                    reader.reading = False
            eventually(lambda: len(waits) > 2, 60, "others are answered while the flood's connections are there")
            stop.set()
            other.join()
            asked = crowd.readers[20:]
            for reader in asked:
                reader.reading = True
            crowd.read_until(lambda: all(reader.closed for reader in asked), 60)
            assert {reader.end for reader in asked} == {"capacity"}
            assert resident(pid) - before < 8 << 20, (before, resident(pid))
            execute(database_url, "NOTIFY a, 'hello'")
            crowd.read_until(lambda: all(reader.events for reader in crowd.readers[:20]))
    finally:
        stop.set()
        if other.is_alive():
            other.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Traceback" not in server.log()
