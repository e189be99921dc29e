"""disconnect(): it ends streams in every worker on every host, and nobody else can do that."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from flask import Flask
from itsdangerous import URLSafeSerializer

from flask_pg_sse import ConfigurationError, PgSSE, disconnect, schema_sql, sse_bp
from flask_pg_sse.testing import capture, stream
from flask_pg_sse.tokens import Token, sign_disconnect, sign_token
from tests.support.client import Message, Response, eventually, request
from tests.support.clock import needs_faketime, postgres_with_a_clock
from tests.support.link import Link, through
from tests.support.postgres import Running, connect, execute, members
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
KEY = ["a secret"]
REVOKED = {"reason": "revoked"}
EVERYBODY = [("7", "a"), ("7", "b"), ("8", "a"), ("8", "b")]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["without the log", "with the log"])
def url(request: pytest.FixtureRequest, database_url: str) -> str:
    if request.param:
        execute(database_url, schema_sql())
    members(database_url, *EVERYBODY)
    return database_url


@pytest.fixture
def logged_url(logged_url: str) -> str:
    members(logged_url, *EVERYBODY)
    return logged_url


def start_members(start_server: Start, url: str, *options: str, **env: str) -> WebServer:
    return start_server(url, *options, app="tests.support.apps.members:app", **env)


def ask(server: WebServer, user: str, *channels: str) -> Response:
    response = request(server.port, "/sse?" + urlencode([("user", user), *(("channel", name) for name in channels)]))
    assert response.status == 200, response.read()
    return response


def listen(server: WebServer, user: str, *channels: str) -> Response:
    response = ask(server, user, *channels)
    assert response.next().event == "sse-open"
    return response


def end(server: WebServer, **whom: str) -> None:
    server.post("/disconnect", json.dumps(whom).encode())


def event_of(response: Response) -> Message:
    """Return the next event but for what a busy machine may bring besides: a heartbeat with an id, a long outage."""
    message = response.event()
    while message.event in ("sse-cursor", "sse-status"):
        message = response.event()
    return message


def assert_revoked(response: Response) -> None:
    message = event_of(response)
    assert (message.event, message.json) == ("sse-end", REVOKED)
    assert message.retry is not None
    response.wait_closed()


def assert_hears(server: WebServer, streams: list[Response], channel: str, data: str) -> None:
    server.post(f"/notify/{channel}", json.dumps({"data": data}).encode())
    for response in streams:
        message = event_of(response)
        assert (message.event, message.data) == ("message", data)


@pytest.mark.parametrize(
    ("whom", "ended"),
    [
        ({"subject": "7"}, [("7", "a"), ("7", "b"), ("7", "ab")]),
        pytest.param({"channel": "a"}, [("7", "a"), ("8", "a"), ("7", "ab")], marks=pytest.mark.slow),
        pytest.param({"subject": "7", "channel": "a"}, [("7", "a"), ("7", "ab")], marks=pytest.mark.slow),
        pytest.param({"subject": "nobody"}, [], marks=pytest.mark.slow),
        pytest.param({"channel": "A"}, [], marks=pytest.mark.slow),
    ],
)
def test_in_every_worker_on_every_host(
    url: str, start_server: Start, whom: dict[str, str], ended: list[tuple[str, str]]
) -> None:
    hosts = [
        start_members(start_server, url, "-w", "2"),
        start_members(start_server, url, "-k", "gthread", "--threads", "30"),
    ]
    who = [("7", "a"), ("7", "b"), ("7", "ab"), ("8", "a"), ("8", "b")]
    with ExitStack() as stack:
        # Three of each on each host, so that both workers of the first have some.
        streams = [(one, stack.enter_context(listen(host, one[0], *one[1]))) for host in hosts for one in who * 3]
        end(hosts[0], **whom)
        for one, response in streams:
            if one in ended:
                assert_revoked(response)
        for channel in "ab":
            left = [response for one, response in streams if one not in ended and channel in one[1]]
            assert_hears(hosts[1], left, channel, f"still there on {channel}")


@pytest.mark.slow
def test_within_a_second(url: str, start_server: Start) -> None:
    """It does not wait for the next heartbeat or the ticker's next look: the best of a few takes far less time."""
    server = start_members(start_server, url, FLASK_SSE_HEARTBEAT="60", FLASK_SSE_SEND_TIMEOUT="60")
    took = []
    for _ in range(5):
        with listen(server, "7", "a") as response:
            began = time.monotonic()
            end(server, subject="7")
            assert_revoked(response)
            took.append(time.monotonic() - began)
    assert min(took) < 1 and sorted(took)[2] < 3, took


def test_whose_right_is_gone_is_refused_at_the_reconnect(url: str, start_server: Start) -> None:
    server = start_members(start_server, url)
    with listen(server, "7", "a") as seven, listen(server, "8", "a") as eight:
        execute(url, "DELETE FROM membership WHERE member = '7'")
        end(server, channel="a")
        assert_revoked(seven)
        assert_revoked(eight)
    with request(server.port, "/sse?user=7&channel=a") as response:
        assert response.status == 403
    with listen(server, "8", "a") as eight:
        assert_hears(server, [eight], "a", "again")


@pytest.mark.slow
def test_by_the_subject_of_a_token(url: str, start_server: Start) -> None:
    server = start_members(start_server, url)
    token = sign_token(KEY, Token(frozenset("x"), None, "who has the URL"))
    with request(server.port, f"/sse?user=7&channel=x&token={token}") as response:
        assert response.next().event == "sse-open"
        end(server, subject="who has the URL")
        assert_revoked(response)
    with request(server.port, f"/sse?user=7&channel=x&token={token}") as response:
        assert response.next().event == "sse-open", "the token opens until it expires"
        end(server, subject="7")
        assert_revoked(response)


@pytest.mark.slow
def test_what_waits_for_a_client_that_reads_slowly_is_not_for_it_any_more(url: str, start_server: Start) -> None:
    server = start_members(start_server, url, FLASK_SSE_BUFFER_BYTES="50000000")
    with request(server.port, "/sse?user=7&channel=a", receive_buffer=4096) as slow, listen(server, "8", "a") as other:
        assert slow.next().event == "sse-open"
        server.post("/flood/a/2000/5000")
        for _ in range(2000):
            assert other.event().event in ("message", "sse-cursor")
        end(server, subject="7")
        eventually(lambda: json.loads(server.get("/state"))["streams"] == 1)
        heard = b""
        slow.sock.settimeout(10)
        try:
            while data := slow.sock.recv(65536):
                heard += data
        except ConnectionResetError:
            pass
        assert 0 < heard.count(b"data: ") < 2000


# -- rights that are taken away while they are asked for


def test_a_right_that_is_taken_away_while_it_is_asked_for(url: str) -> None:
    """The authorizer has seen the old state, and the order comes before the stream stands in any table."""
    app = Flask("tests")
    app.config.update(SECRET_KEY="x", SSE_CHANNELS=["open"], SSE_DATABASE_URL=url)
    obeyed = threading.Event()

    def may_listen(channel: str) -> bool:
        hub = app.extensions["pg_sse"].runtime.worker.streams[0]
        # On a busy machine that may be later than the check begins, which does not wait for long.
        eventually(hub.admission._answered.is_set, what="it hears commands")
        disconnect(subject=7)
        eventually(lambda: hub.admission._commands)
        obeyed.set()
        return True

    app.register_blueprint(sse_bp, authorize=may_listen, subject=lambda: 7)
    client = app.test_client()
    events = stream(client, "/sse?channel=a")  # the first stream of the process: nothing listened before it
    event = next(events)
    assert obeyed.is_set() and (event.event, event.json) == ("sse-end", REVOKED)
    events = stream(client, "/sse?channel=open")
    assert next(events).event == "sse-open", "who is asked for later has a right of its own"
    events.close()
    app.extensions["pg_sse"].close()


@pytest.mark.slow
def test_clients_that_keep_coming_while_their_right_is_taken_away(url: str, start_server: Start) -> None:
    server = start_members(start_server, url, "-w", "2")
    for _ in range(10):
        members(url, ("9", "a"))
        streams: list[Response] = []
        stop = threading.Event()

        def come(streams: list[Response] = streams, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                streams.append(request(server.port, "/sse?user=9&channel=a"))

        threads = [threading.Thread(target=come) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(partial(len, streams))
        execute(url, "DELETE FROM membership WHERE member = '9'")
        end(server, subject="9")
        stop.set()
        for thread in threads:
            thread.join()
        for response in streams:
            response.read()  # comes to an end: none of them is left open
            response.close()
    assert server.get("/state") and "Traceback" not in server.log()


# -- a worker that does not hear


@pytest.fixture
def line(database_url: str) -> Iterator[Link]:
    port = urlsplit(database_url).port
    assert port is not None
    with Link(port) as link:
        yield link


@pytest.mark.slow
@pytest.mark.parametrize("frozen_for", [1, 70])
def test_a_worker_that_was_frozen_obeys_before_it_sends_what_came_then(
    url: str, start_server: Start, frozen_for: int
) -> None:
    """As a machine that is suspended; no clock decides, so the time does not matter."""
    here = start_members(start_server, url)
    frozen = start_members(start_server, url, "--timeout", "0")
    with listen(frozen, "7", "a") as seven, listen(frozen, "8", "a") as eight, listen(here, "7", "a") as near:
        os.killpg(frozen.process.pid, signal.SIGSTOP)
        end(here, subject="7")
        here.post("/notify/a", json.dumps({"data": "private"}).encode())
        assert_revoked(near)
        threading.Event().wait(frozen_for)
        os.killpg(frozen.process.pid, signal.SIGCONT)
        assert_revoked(seven)
        message = event_of(eight)
        assert (message.event, message.data) == ("message", "private")


@pytest.mark.slow
@needs_faketime
@pytest.mark.parametrize("logged", [False, True])
def test_no_step_of_postgresqls_clock_loses_a_command(
    running_postgres: Running, start_server: Start, logged: bool
) -> None:
    """By an hour, forwards and back, as NTP or a machine that resumes does."""
    with postgres_with_a_clock(running_postgres) as (url, put_off):
        members(url, *EVERYBODY)
        if logged:
            execute(url, schema_sql())
        server = start_members(start_server, url)
        for step in ("+3600", "-3600"):
            with listen(server, "7", "a") as seven:
                put_off(step)
                end(server, subject="7")
                assert_revoked(seven)


@pytest.mark.slow
def test_a_worker_that_was_away_obeys_when_it_is_back(logged_url: str, line: Link, start_server: Start) -> None:
    here = start_members(start_server, logged_url)
    away = start_members(
        start_server, logged_url, FLASK_SSE_LISTEN_URL=through(line, logged_url), FLASK_SSE_HEARTBEAT="1"
    )
    with listen(away, "7", "a") as seven, listen(away, "8", "a") as eight, listen(here, "7", "a") as near:
        line.cut()
        end(here, subject="7")
        assert_revoked(near)
        line.restore()
        assert_revoked(seven)
        assert_hears(here, [eight], "a", "still there")


@pytest.mark.slow
def test_a_right_that_was_checked_before_the_worker_heard_commands(
    request: pytest.FixtureRequest, url: str, line: Link, start_server: Start
) -> None:
    """Its streams wait for LISTEN: the kept commands tell which of them must ask again; without a log all must."""
    logged = request.node.callspec.params["url"]
    here = start_members(start_server, url)
    deaf = start_members(start_server, url, FLASK_SSE_LISTEN_URL=through(line, url))
    line.cut()
    with ask(deaf, "7", "a") as seven, ask(deaf, "8", "a") as eight:
        for response in (seven, eight):
            assert response.next_line() == b"retry: 3000\n", "the app has said yes"
        end(here, subject="7")
        line.restore()
        message = seven.event()
        assert (message.event, message.json) == ("sse-end", {"reason": "unavailable"})
        assert message.retry is not None and message.retry <= 300
        assert eight.event().event == ("sse-open" if logged else "sse-end")
    with listen(deaf, "7", "a"), listen(deaf, "8", "a"):
        pass


# -- nobody else


@pytest.fixture
def forger(url: str) -> Iterator[Any]:
    """A connection of a role that may do nothing but connect; it hears the control channel, as anybody may."""
    execute(url, "CREATE ROLE forger LOGIN")
    connection = connect(url.replace("postgres@", "forger@"))
    try:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN flask_pg_sse")
        yield connection
    finally:
        connection.close()
        execute(url, "DROP ROLE forger")


def say(forger: Any, payload: str) -> None:
    with forger.cursor() as cursor:
        cursor.execute("SELECT pg_notify('flask_pg_sse', %s)", (payload,))


def by(transaction: int, keys: list[str] = KEY) -> str:
    """Return an order that says that this transaction sends it."""
    return sign_disconnect(keys, "7", None, transaction)


@pytest.mark.slow
def test_forged_orders_do_nothing(url: str, start_server: Start, forger: Any) -> None:
    [(ended,)] = execute(url, "SELECT txid_current()")
    server = start_members(start_server, url)
    to_come = ended + 100_000
    content = {"s": "7", "c": None, "t": to_come, "n": "1"}
    orders: list[Any] = [
        "", "x", "7", None, 7, True, [], {}, {"subject": "7"}, ["7"], "." * 5000, "é😀",
        json.dumps(content),
        by(to_come, ["another key"]),
        by(to_come)[:-1], by(to_come) + "x", "x" + by(to_come),
        sign_token(KEY, Token(frozenset("a"), None, "7")),
        URLSafeSerializer(KEY[0]).dumps(content),
        by(0), by(-1), by(ended - 1),
        by(ended),  # given before this server was there
    ]  # fmt: skip
    payloads = [json.dumps({"disconnect": order}) for order in orders]
    payloads += [
        "", "x", "{", "[]", "null", "7", '"x"', json.dumps("7"), "[" * 5000, '{"disconnect": ' + "[" * 3000,
        '{"beat": 1, "head": 9}', '{"pruned": "x"}', "\x1e", "\x1e1", "\x1e1{}", "\x1e1{}\nx", "\x1e9{}\nx",
        "\x1e1" + json.dumps({"i": 1}) + "\n" + by(to_come, ["another key"]),
        "\x1e1" + json.dumps({"i": 2**62}) + "\n" + by(ended),
    ]  # fmt: skip
    with listen(server, "7", "a") as response:
        for number, payload in enumerate(payloads):
            say(forger, payload)
            if not number % 10:
                assert_hears(server, [response], "a", str(number))
        assert_hears(server, [response], "a", "at last")
        say(forger, json.dumps({"disconnect": by(to_come)}))  # with the key: so it would have been noticed
        assert_revoked(response)
    assert server.log().count("Ignored a command to end streams") == 1, "and then rarely"
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_an_order_that_is_sent_again_does_nothing(url: str, start_server: Start, forger: Any) -> None:
    """Whatever the forger has heard, word for word: neither in the same worker nor on a host that comes later."""
    server = start_members(start_server, url)
    with listen(server, "7", "a") as response:
        end(server, subject="7")
        assert_revoked(response)

    def orders_heard() -> list[str]:
        forger.poll()
        return [notification.payload for notification in forger.notifies if "beat" not in notification.payload]

    orders = eventually(orders_heard)
    assert len(orders) == 1
    later = start_members(start_server, url)
    with listen(server, "7", "a") as response, listen(later, "7", "a") as there:
        for payload in orders * 3:
            say(forger, payload)
        assert_hears(server, [response, there], "a", "still there")


# -- calls that are none


def test_calls_that_are_none(make_app: Callable[..., Flask]) -> None:
    app = make_app(SECRET_KEY="x")
    with app.app_context():
        calls: list[tuple[dict[str, Any], type[Exception]]] = [
            ({}, TypeError), ({"subject": None, "channel": None}, TypeError), ({"subject": True}, TypeError),
            ({"subject": ["7"]}, TypeError), ({"subject": ""}, ValueError), ({"subject": "x" * 256}, ValueError),
            ({"channel": ""}, ValueError), ({"channel": "flask_pg_sse"}, ValueError), ({"channel": "a\n"}, ValueError),
        ]  # fmt: skip
        for wrong, error in calls:
            with pytest.raises(error):
                disconnect(**wrong)
        with pytest.raises(TypeError):
            disconnect("7")  # type: ignore[call-arg]


def test_without_a_key(make_app: Callable[..., Flask]) -> None:
    with make_app().app_context(), pytest.raises(ConfigurationError, match=r"disconnect\(\) needs a secret key"):
        disconnect(subject="7")


def test_in_users_own_tests_no_database_is_needed(make_app: Callable[..., Flask]) -> None:
    app = make_app(SECRET_KEY="x")
    with app.app_context(), capture(app) as events:
        disconnect(subject="7")
    assert events == []


def test_on_the_extension_object(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    app = Flask("tests")
    app.config.update(SECRET_KEY="x", SSE_CHANNELS=["*"])
    sse = PgSSE(app, database_url=url, subject=lambda: 7)
    events = stream(app.test_client(), "/sse?channel=a")
    assert next(events).event == "sse-open"
    sse.disconnect(subject=7)
    event = next(events)
    assert (event.event, event.json) == ("sse-end", REVOKED)
    sse.close()
    assert not caplog.records
