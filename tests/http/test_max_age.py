"""SSE_MAX_AGE and the expiry of tokens, under real servers: a browser that reconnects is checked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from flask_pg_sse.tokens import Token, sign_token
from tests.support.client import Response, eventually, open_stream, opened, request
from tests.support.postgres import execute, members
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
WORKERS = pytest.mark.parametrize(
    "options",
    [(), pytest.param(("-k", "gthread", "--threads", "60"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)


@WORKERS
def test_every_stream_ends_at_its_own_time(database_url: str, start_server: Start, options: tuple[str, ...]) -> None:
    """In the last tenth of that time, so that streams which opened together do not all come back together.

    The ticker looks four times a heartbeat, and no less than once a second: here often enough to see it.
    """
    server = start_server(database_url, *options, FLASK_SSE_MAX_AGE="4", FLASK_SSE_HEARTBEAT="0.2")

    def age_of(began: float, stream: Response) -> float:
        message = stream.event()
        assert (message.event, message.json) == ("sse-end", {"reason": "max_age"})
        assert message.retry is not None and 1500 <= message.retry <= 4500
        stream.wait_closed()
        return time.monotonic() - began

    with ExitStack() as stack, ThreadPoolExecutor(30) as readers:
        streams = [(time.monotonic(), stack.enter_context(open_stream(server.port, "a"))) for _ in range(30)]
        ages = [reading.result() for reading in [readers.submit(age_of, *stream) for stream in streams]]
    assert min(ages) > 3.5, ages
    assert len({round(age, 1) for age in ages}) > 1, ages


@pytest.mark.slow
@WORKERS
def test_a_right_that_was_forgotten_ends_with_the_stream(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    members(database_url, ("ann", "a"), ("bob", "a"))
    server = start_server(database_url, *options, app="tests.support.apps.members:app", FLASK_SSE_MAX_AGE="1")
    urls = [f"/sse?user={name}&channel=a" for name in ("ann", "bob")]
    with opened(lambda: request(server.port, urls[0])) as ann, opened(lambda: request(server.port, urls[1])) as bob:
        execute(database_url, "DELETE FROM membership WHERE member = 'ann'")
        assert [stream.event().json for stream in (ann, bob)] == [{"reason": "max_age"}] * 2
    with request(server.port, urls[0]) as ann:
        assert ann.status == 403
    opened(lambda: request(server.port, urls[1])).close()


@pytest.mark.slow
@WORKERS
def test_what_comes_first_ends_the_stream(database_url: str, start_server: Start, options: tuple[str, ...]) -> None:
    server = start_server(database_url, *options, FLASK_SSE_MAX_AGE="3600", FLASK_SECRET_KEY="x")
    with open_stream(server.port, "b", path=f"/sse?token={sign_token(['x'], Token(frozenset('b')))}&x="):
        token = sign_token(["x"], Token(frozenset("a"), time.time() + 3))  # while it listens already
    with opened(lambda: request(server.port, f"/sse?channel=a&token={token}")) as stream:
        assert stream.event().json == {"reason": "expired"}
        stream.wait_closed()
    for _ in range(3):
        with request(server.port, f"/sse?channel=a&token={token}") as response:
            message = response.next()
            assert (response.status, message.event, message.json) == (200, "sse-end", {"reason": "expired"})
            assert response.read() == b""
            response.wait_closed()
    eventually(lambda: '"streams":0' in server.get("/state"))
