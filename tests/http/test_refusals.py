"""The app's log of refused streams: one line of a kind at once, with an example, and the others counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import pytest
from flask import Flask, abort, redirect
from flask import request as flask_request

from flask_pg_sse import repeats
from flask_pg_sse.testing import stream
from flask_pg_sse.tokens import Token, sign_token
from flask_pg_sse.web import refusals
from tests.support.client import open_stream, request
from tests.support.servers import WebServer

MakeApp = Callable[..., Flask]
Start = Callable[..., WebServer]

EXPIRED = sign_token(["x"], Token(frozenset({"orders"}), expires_at=time.time() - 60))


def ask(app: Flask, url: str, **headers: str) -> int:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with app.test_client().get(url, headers=fields) as answer:
        return answer.status_code


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the log of refusals sees."""
    now = [1000.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(refusals, "time", Clock)
    return now


@pytest.mark.parametrize(
    ("url", "headers", "words"),
    [
        ("/sse/closed", {}, ["'closed'", 'app.config["SSE_CHANNELS"] = ["orders", "news", "room-*", "closed"]']),
        ("/sse/Orders", {}, ["'Orders'", "Did you mean 'orders'? Upper and lower case differ."]),
        ("/sse/ROOM-1", {}, ["'ROOM-1'", "Did you mean one that 'room-*' opens? Upper and lower case differ."]),
        ("/sse/orders%20", {}, ["'orders '", "Did you mean 'orders'? Blanks belong to a name."]),
        ("/sse?channel=orders,news", {}, ["'orders,news'", "?channel=orders&channel=news"]),
        ("/sse", {}, ["400", "names no channel"]),
        ("/sse/flask_pg_sse", {}, ["400", "reserved"]),
        ("/sse/orders?" + "&" * 300, {}, ["414", "301 parameters"]),
        ("/sse/orders", {"Sec_Fetch_Site": "cross-site"}, ["403", "SSE_ALLOWED_ORIGINS"]),
    ],
)
def test_a_refusal_is_a_line_with_its_remedy_and_the_next_ones_are_counted(
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    clock: list[float],
    url: str,
    headers: dict[str, str],
    words: list[str],
) -> None:
    app = make_app(SSE_CHANNELS=["orders", "news", "room-*"])
    for _ in range(10):
        assert ask(app, url, **headers) >= 400
        clock[0] += 5
    (record,) = caplog.records
    assert record.name.startswith("flask_pg_sse.") and record.levelno == logging.WARNING
    assert not [word for word in words if word not in record.getMessage()], record.getMessage()
    clock[0] += 11
    ask(app, url, **headers)
    assert [record.getMessage().endswith(repeats.times(10)) for record in caplog.records] == [False, True]


def test_in_debug_each_refusal_is_logged(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(SSE_CHANNELS=["orders"])
    app.debug = True
    for _ in range(3):
        ask(app, "/sse/Orders")
    assert len(caplog.records) == 3
    assert "Did you mean 'orders'?" in app.test_client().get("/sse/Orders").text


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/sse?channel=orders,news", "Did you mean several channels? They are written as ?channel=orders&channel=news"),
        ("/sse?channel=room-*", "Channel 'room-*' is one channel of exactly that name"),
        ("/sse/room-[0-9]", "Channel 'room-[0-9]' is one channel of exactly that name"),
    ],
)
def test_a_stream_that_may_hear_nothing_is_open_and_says_why(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture, debug: bool, url: str, words: str
) -> None:
    app = make_app(database_url, SSE_CHANNELS=["*"])
    app.debug = debug
    for _ in range(3):
        with app.test_client().get(url) as answer:
            pieces = answer.iter_encoded()
            opening = (next(pieces) + next(pieces)).decode()
        assert "event: sse-open" in opening
        assert (f": {words}" in opening or f" {words}" in opening) == debug, opening
    assert [record.levelname for record in caplog.records if words in record.getMessage()] == ["WARNING"]
    caplog.clear()
    with closing(stream(app.test_client(), "/sse/plain")) as events:
        assert next(events).event == "sse-open"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_http_answer_of_a_hook_is_a_line_too(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    def may_listen(channel: str) -> bool:
        abort(redirect("/login") if channel == "redirects" else 401)

    app = make_app(authorize=may_listen, SSE_CHANNELS=[], SSE_BROKER_URL="memory://")
    for _ in range(3):
        assert (ask(app, "/sse/a"), ask(app, "/sse/redirects")) == (401, 302)
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "may_listen() answered 401 UNAUTHORIZED" in line


def test_names_that_clients_choose_make_no_lines_of_their_own(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(SSE_CHANNELS=["orders"])
    for number in range(500):
        ask(app, f"/sse/room-{number}")
        ask(app, f"/sse/flask_pg_sse-{number}")
    assert len(caplog.records) == 2


def test_an_expired_url_is_planned_and_no_warning(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(database_url, SSE_CHANNELS=[], SECRET_KEY="x")
    assert ask(app, f"/sse/orders?token={EXPIRED}") == 200
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_hook_that_fails_for_many_clients_writes_one_traceback_a_minute(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    failing = True

    def may_listen(channel: str) -> bool:
        if failing:
            raise OSError("the users' database is away")
        return True

    def retry() -> int:
        with app.test_client().get("/sse/orders") as answer:
            return int(next(iter(answer.iter_encoded())).decode().partition("retry: ")[2].split("\n")[0])

    app = make_app(database_url, authorize=may_listen, SSE_CHANNELS=[], SSE_RETRY=1000)
    early = retry()
    for _ in range(300):
        clock[0] += 0.1
        retry()
    (record,) = caplog.records
    assert record.exc_info and "may_listen() failed" in record.getMessage()
    # After half a minute clients wait about as long again, and never longer than a minute: each with a spread of half.
    assert early < 2000 < 14_000 < retry()
    clock[0] += 3600
    assert retry() < 90_001
    failing = False
    assert ask(app, "/sse/orders") == 200
    failing = True
    assert retry() < 2000, "it is a new trouble"


def test_clients_that_have_all_their_streams_make_one_line(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever their names begin with."""
    app = make_app(database_url, subject=lambda: flask_request.args["user"], SSE_MAX_STREAMS_PER_CLIENT=1)
    for user in ("ann", "bob", "cem"):
        with closing(stream(app.test_client(), f"/sse/orders?user={user}")) as events:
            assert next(events).event == "sse-open"
            assert ask(app, f"/sse/orders?user={user}") == 200
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "subject ann has 1 streams" in line and "ProxyFix" not in line


@pytest.mark.slow
def test_full_workers_and_clients_with_too_many_streams_are_named(database_url: str, start_server: Start) -> None:
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS="3", FLASK_SSE_MAX_STREAMS_PER_CLIENT="2")
    with ExitStack() as streams:
        for _ in range(2):
            streams.enter_context(open_stream(server.port, "orders"))
        with request(server.port, "/sse?channel=orders") as refused:
            assert refused.event().json == {"reason": "capacity"}
        assert "address 127.0.0.1 has 2 streams" in server.log() and "SSE_MAX_STREAMS_PER_CLIENT" in server.log()
        assert "behind a proxy, werkzeug's ProxyFix" in server.log()
    server = start_server(database_url, FLASK_SSE_MAX_STREAMS="2")
    with ExitStack() as streams:
        for _ in range(2):
            streams.enter_context(open_stream(server.port, "orders"))
        for _ in range(20):
            with request(server.port, "/sse?channel=orders") as refused:
                assert refused.event().json == {"reason": "capacity"}
        assert server.log().count("room for 2 streams") == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-k", "gthread", "--threads", "10")], ids=["gevent", "gthread"])
def test_a_hook_that_ends_by_any_exception_does_not_end_the_page(
    database_url: str, start_server: Start, options: tuple[str, ...]
) -> None:
    """A browser's EventSource never comes back after a 500."""
    server = start_server(database_url, *options, app="tests.support.apps.failing:app")
    for name in ("Timeout", "SystemExit", "GreenletExit", "GeneratorExit", "KeyboardInterrupt", "BaseException"):
        for hook in ("authorize", "subject"):
            with request(server.port, f"/sse?channel={name}&hook={hook}") as answer:
                assert (answer.status, answer.event().json) == (200, {"reason": "unavailable"}), (name, hook)
    with open_stream(server.port, "fine"):
        pass
