"""Clients whose host or network is gone do not close their connection; TCP itself would try for 15 minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.http.test_limits import streams
from tests.support.client import eventually, open_stream
from tests.support.crowd import worker
from tests.support.far_host import far_host
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
CLIENTS = 30
WORKERS = [(), pytest.param(("-k", "gthread", "--threads", "40"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("options", WORKERS, ids=["gevent", "gthread"])
@pytest.mark.parametrize("direct", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["direct", "generator"])
def test_all_that_they_held_is_freed(
    database_url: str, start_server: Start, options: tuple[str, ...], direct: str
) -> None:
    with far_host() as far, ExitStack() as stack:
        server = start_server(
            database_url, *options, listeners=[far.listener], FLASK_SSE_HEARTBEAT="0.3", FLASK_SSE_SEND_TIMEOUT="0.5",
            FLASK_SSE_DIRECT_WRITE=direct,
        )  # fmt: skip
        staying = stack.enter_context(open_stream(server.port, "a"))
        descriptors = f"/proc/{worker(server)}/fd"
        before = len(os.listdir(descriptors))
        for _ in range(CLIENTS):
            stream = far.there(lambda: open_stream(far.port, "a", "b"))
            stack.callback(stream.close)
        assert streams(server) == CLIENTS + 1
        began = time.monotonic()
        far.vanish()
        eventually(lambda: streams(server) == 1, 20)
        assert time.monotonic() - began > 1, "they were to have time to come back"
        eventually(lambda: len(os.listdir(descriptors)) <= before, 5)
        server.post("/notify/a", b'{"data": "hello"}')
        assert staying.event().data == "hello"
    # Where a generator writes at the very moment, gunicorn says that the connection has timed out.
    others = server.log().replace("TimeoutError: [Errno 110]", "")
    assert ("Traceback" not in others) or (direct == "0" and "Error: " not in others)
