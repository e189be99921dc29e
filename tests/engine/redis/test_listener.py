"""The listener on Redis: what it subscribes to, what it says when Redis goes, hangs or refuses, and how it returns."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flask_pg_sse.engine.base import Disconnect, Readiness
from flask_pg_sse.engine.broker import Broker, to_broker
from flask_pg_sse.engine.redis.engine import RedisEngine
from flask_pg_sse.engine.redis.listener import RedisListener
from flask_pg_sse.errors import DatabaseUnavailable
from flask_pg_sse.event import Event
from tests.support.client import eventually
from tests.support.engines import Process, Recorder
from tests.support.link import Link
from tests.support.redis import RedisServer, RunRedis, certificates
from tests.support.servers import free_port

Start = Callable[..., Process]
SECRET = "s3cr3t"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an engine on a URL. With channels it waits until they are heard."""
    started: list[RedisEngine] = []

    def start(url: str, *channels: str) -> Process:
        started.append(RedisEngine(to_broker(url, "REDIS_URL")))
        return Process(started[-1], *channels)

    yield start
    for engine in started:
        engine.stop(5)


def payloads(process: Process) -> list[bytes]:
    return [data.removeprefix(b"data: ").strip() for _, data, _ in process.sink.items]


def gaps(process: Process) -> list[str]:
    return [told[0] for what, told in list(process.sink.told) if what == "gap"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def hears(server: RedisServer, process: Process, text: str) -> None:
    """Send a message, and see that it arrives."""
    eventually(lambda: server.publish("a", text), 20, "the channel has a subscriber again")
    eventually(lambda: text.encode() in payloads(process), 20, f"{text} arrives")


# -- what it subscribes to


def test_channels_are_subscribed_in_batches_and_left_later(redis_server: RedisServer) -> None:
    names = [f"room {number} ü" for number in range(1200)]
    before = redis_server.ask("INFO", "commandstats").get("cmdstat_subscribe", {"calls": 0})["calls"]
    listener = RedisListener(to_broker(redis_server.url, "x"), Recorder(), linger=60)
    listener.start()
    try:
        eventually(lambda: listener.status().readiness is Readiness.READY)
        redis_server.freeze()  # they ask while the listener waits for an answer, as streams do that come at once
        try:
            tickets = [listener.subscribe([name]) for name in names]
        finally:
            redis_server.thaw()
        assert all(ticket.wait(20) for ticket in tickets)
        assert redis_server.channels() == set(names)
        calls = redis_server.ask("INFO", "commandstats")["cmdstat_subscribe"]["calls"] - before
        assert calls < 10, "one command for each channel would hold up the events"
        listener.unsubscribe(names)
        assert redis_server.channels() == set(names), "a page that reloads costs nothing"
        listener._listens._linger = 0.2
        listener._wakeup.set()
        eventually(lambda: not redis_server.channels())
        assert listener.subscribe(names[:1]).wait(20)
    finally:
        listener.stop(5)


def test_one_refused_channel_does_not_hold_up_the_others(
    run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = run_redis()
    server.ask(
        "ACL", "SETUSER", "reader", "on", f">{SECRET}", "-@all", "+subscribe", "+unsubscribe", "resetchannels", "&open*"
    )
    process = start(f"redis://reader:{SECRET}@127.0.0.1:{server.port}")
    tickets = {name: process.engine.subscribe([name]) for name in ["open1", "closed", "open2", "shut", "open3"]}
    assert {name: ticket.wait(10) for name, ticket in tickets.items()} == {
        "open1": True, "closed": False, "open2": True, "shut": False, "open3": True,
    }  # fmt: skip
    assert server.channels() == {"open1", "open2", "open3"}
    said = [text for text in warnings(caplog) if "refuses SUBSCRIBE" in text]
    assert len(said) == 1 and "permissions to access" in said[0] and SECRET not in caplog.text
    # A right that is taken away ends the streams that had it: they would hear nothing, and nobody would know.
    server.ask("ACL", "SETUSER", "reader", "resetchannels", "&open1")
    eventually(lambda: {Disconnect(None, "open2"), Disconnect(None, "open3")} <= set(process.sink.messages), 10)
    assert Disconnect(None, "open1") not in process.sink.messages
    eventually(lambda: server.channels() == {"open1"})


# -- Redis goes, and comes back


def test_after_a_restart_the_gap_is_told_once_every_channel_is_heard_again(
    run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = run_redis()
    names = ["a", *(f"room {number}" for number in range(999))]
    process = start(server.url, *names)
    assert not gaps(process) and not warnings(caplog)
    heard: list[int] = []
    gap = process.sink.gap

    def told(reason: str, position: int) -> None:
        heard.append(len(server.channels()))
        gap(reason, position)

    process.sink.gap = told  # type: ignore[method-assign]
    server.stop()
    eventually(lambda: process.engine.status().readiness is Readiness.AWAY)
    late = process.engine.subscribe(["late"])
    assert not late.wait(0.5)
    server.start()
    assert late.wait(20)
    hears(server, process, "again")
    assert gaps(process) == ["reconnected"] and heard == [1001], "what is loaded at the reset misses nothing"
    assert process.engine.status().readiness is Readiness.READY
    said = warnings(caplog)
    assert said[0].startswith("Lost the listener's connection: Connection closed by server. Next attempt in ")
    assert re.fullmatch(r"Listening to Redis at .* works again after [0-9.]+ s, at attempt \d+\.", said[-2])
    assert said[-1] == f"Events since the connection to Redis at 127.0.0.1:{server.port} broke are lost."
    causes = [text.split(". Next attempt")[0] for text in said[:-2]]
    assert len(causes) == len(set(causes)), "each cause once"


def test_a_redis_that_is_away_at_start(run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = run_redis(started=False)
    process = start(server.url)
    ticket = process.engine.subscribe(["a"])
    assert not ticket.wait(0.7) and process.engine.status().readiness is Readiness.AWAY
    with pytest.raises(DatabaseUnavailable, match=r"cannot be reached.*REDIS_URL is right"):
        process.engine.publish("a", [Event("x")])
    server.start()
    assert ticket.wait(20)
    hears(server, process, "there")
    assert not gaps(process), "nothing was heard before"
    assert len([text for text in warnings(caplog) if text.startswith("Cannot listen: ")]) == 1


def test_the_listeners_connection_is_killed_and_no_later_event_is_missed(run_redis: RunRedis, start: Start) -> None:
    server = run_redis()
    process = start(server.url, "a")
    for number in range(3):
        server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        hears(server, process, str(number))
    eventually(lambda: len(gaps(process)) == 3)


def test_a_sending_connection_that_was_closed_meanwhile_is_replaced(run_redis: RunRedis, start: Start) -> None:
    server = run_redis()
    process = start(server.url, "a")
    for number in range(3):
        process.engine.publish("a", [Event(str(number))])
        server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    eventually(lambda: payloads(process) == [b"0", b"1", b"2"])


def test_a_reader_that_redis_cuts_off_for_its_backlog_comes_back(run_redis: RunRedis, start: Start) -> None:
    server = run_redis()
    server.ask("CONFIG", "SET", "client-output-buffer-limit", "pubsub 200000 0 0")
    process = start(server.url, "a")
    server.ask("EVAL", "for n = 1, 20 do redis.call('PUBLISH', 'a', string.rep('x', 100000)) end", 0)
    eventually(lambda: gaps(process) == ["reconnected"], 20)
    hears(server, process, "after it")


# -- Redis hangs


@pytest.mark.parametrize("how", ["frozen", pytest.param("silent link", marks=pytest.mark.slow)])
def test_a_redis_that_hangs_is_noticed_within_seconds(
    run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "frozen":  # in seconds less than the default's, which the other case takes
        monkeypatch.setattr("flask_pg_sse.engine.redis.listener.BEAT_EVERY", 0.2)
        monkeypatch.setattr("flask_pg_sse.engine.redis.engine.BEAT_EVERY", 0.2)
        monkeypatch.setattr("flask_pg_sse.engine.redis.listener.ANSWER_WITHIN", 0.5)
        monkeypatch.setattr("flask_pg_sse.engine.redis.subscriber.ANSWER_WITHIN", 0.5)
    server = run_redis()
    with Link(server.port) as link:
        process = start(f"redis://127.0.0.1:{link.port}", "a")
        before, began = len(gaps(process)), time.monotonic()
        server.freeze() if how == "frozen" else link.silence()
        eventually(lambda: process.engine.status().readiness is Readiness.AWAY, 20)
        assert time.monotonic() - began < 15  # three until it is asked, and five for the answer
        assert "Redis has said nothing for" in eventually(lambda: warnings(caplog))[0]
        server.thaw() if how == "frozen" else link.restore()
        eventually(lambda: gaps(process)[before:] == ["reconnected"], 20)
        hears(server, process, "again")


def test_a_redis_that_is_silent_but_there_is_not_left(
    run_redis: RunRedis, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers to PING are enough, with and without a channel, also where the user may not PING."""
    monkeypatch.setattr("flask_pg_sse.engine.redis.engine.BEAT_EVERY", 0.02)
    monkeypatch.setattr("flask_pg_sse.engine.redis.subscriber.ANSWER_WITHIN", 0.5)
    server = run_redis()
    server.ask("ACL", "SETUSER", "reader", "on", ">x", "-@all", "+subscribe", "allchannels")
    processes = [start(server.url), start(server.url, "a"), start(f"{server.url}?protocol=3", "a")]
    processes += [start(f"redis://reader:x@127.0.0.1:{server.port}", "a")]

    def pings() -> int:
        return int(server.ask("INFO", "commandstats").get("cmdstat_ping", {"calls": 0})["calls"])

    def a_second_without_a_gap() -> bool:
        since, asked, before = time.monotonic(), pings(), list(map(gaps, processes))
        eventually(lambda: time.monotonic() > since + 1 and pings() > asked + 20, 20)
        return list(map(gaps, processes)) == before

    # Not every second: on a busy machine Redis itself may stand still for half of one.
    eventually(a_second_without_a_gap, 30)
    eventually(lambda: all(process.engine.status().readiness is Readiness.READY for process in processes), 20)


@pytest.mark.slow
def test_senders_do_not_wait_for_ever_for_a_redis_that_hangs(run_redis: RunRedis, start: Start) -> None:
    server = run_redis()
    engine = start(server.url).engine
    server.freeze()
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match=r"cannot be reached.*: Timeout"):
        engine.publish("a", [Event("x")])
    assert time.monotonic() - began < 8
    engine.stop(5)
    assert time.monotonic() - began < 14


# -- ways to it, and refusals


@pytest.mark.parametrize("way", ["TLS", "socket", "password", "user", "database"])
def test_ways_to_redis(run_redis: RunRedis, start: Start, way: str) -> None:
    server = run_redis(started=False)
    host = f"127.0.0.1:{server.port}"
    url = {
        "socket": f"unix://{server.socket}?db=3",
        "password": f"redis://:{SECRET}@{host}",
        "user": f"redis://ann:{SECRET}@{host}/2",
        "database": f"redis://{host}/7",
    }.get(way, "")
    if way == "TLS":
        server.options = certificates(server.folder)
        url = f"rediss://127.0.0.1:{server.options['tls-port']}/0?ssl_ca_certs={server.folder}/ca.pem"
    if way == "password":
        server.options = {"requirepass": SECRET}
    if way == "user":
        server.options = {"user": f"ann on >{SECRET} +@all allchannels allkeys"}
    server.start()
    process = start(url, "a")
    # Redis Pub/Sub is the same in every database, and a large message comes in many pieces.
    process.engine.publish("a", [Event("x" * 3_000_000), Event("two")])
    eventually(lambda: [len(data) for data in payloads(process)] == [3_000_000, 3], 20)


@contextmanager
def talker(text: bytes) -> Iterator[int]:
    """A server that is no Redis: it says the same to everybody."""
    listener = socket.create_server(("127.0.0.1", 0))
    clients = []

    def run() -> None:
        while True:
            try:
                clients.append(listener.accept()[0])
            except OSError:
                return
            clients[-1].sendall(text)
            clients[-1].shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for sock in (*clients, listener):
            sock.close()


def refusal(start: Start, caplog: pytest.LogCaptureFixture, url: str, attempts: int = 3) -> str:
    """Return what is said of a URL that does not work, after some attempts: one line, and no password."""
    process = start(url)
    listener: Any = process.engine._listener  # type: ignore[attr-defined]
    eventually(lambda: listener._outage._repeats._messages >= attempts and warnings(caplog), 30)
    assert len(warnings(caplog)) == 1, warnings(caplog)
    with pytest.raises(DatabaseUnavailable) as caught:
        process.engine.publish("a", [Event("x")])
    for said in (warnings(caplog)[0], str(caught.value)):
        assert SECRET not in said and "\n" not in said and len(said) < 500
    return warnings(caplog)[0].split(". Next attempt in")[0]


@pytest.mark.parametrize(
    ("options", "login", "words"),
    [
        (
            {"requirepass": SECRET},
            "",
            r"refused the login: .*uthenticat.*\. Check the user and the password in REDIS_URL",
        ),
        ({"requirepass": "other"}, f":{SECRET}@", "refused the login: invalid username-password pair"),
        ({"user": "default off"}, f"ann:{SECRET}@", "refused the login: invalid username-password pair"),
        ({}, f":{SECRET}@", "refused the login: "),
        ({"maxclients": "1"}, "", "max number of clients reached"),
    ],
    ids=["no password", "wrong password", "wrong user", "no password there", "full"],
)
def test_a_redis_that_refuses(
    run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture, options: dict[str, str], login: str, words: str
) -> None:
    server = run_redis(**options)
    with socket.create_connection(("127.0.0.1", server.port)):  # the one client that it has room for
        eventually(lambda: "maxclients" not in options or (server.folder and _is_full(server)))
        said = refusal(start, caplog, f"redis://{login}127.0.0.1:{server.port}")
    assert re.search(f"^Cannot listen: Redis at 127.0.0.1:{server.port} .*{words}", said), said


def _is_full(server: RedisServer) -> bool:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        return client.recv(100).startswith(b"-ERR max")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            b"-DENIED Redis is running in protected mode because protected mode is enabled. Lots of text.\r\n",
            "protected mode",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "did not answer as Redis does: Protocol error"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "did not answer as Redis does: Protocol error"),
        (b"$x\r\n", "did not answer as Redis does"),
        (b"*14\r\n$4\r\nmode\r\n$8\r\nsentinel\r\n" + b"$1\r\nx\r\n" * 12, "it is a Sentinel"),
        (b"", "cannot be reached: "),
    ],
    ids=["protected", "HTTP", "SSH", "garbage", "Sentinel", "silent"],
)
def test_what_is_no_redis(start: Start, caplog: pytest.LogCaptureFixture, text: bytes, words: str) -> None:
    with talker(text) as port:
        said = refusal(start, caplog, f"redis://127.0.0.1:{port}")
        assert re.search(f"^Cannot listen: Redis at 127.0.0.1:{port} .*{words}.*REDIS_URL", said), said


@pytest.mark.slow
def test_tls_where_there_is_none(run_redis: RunRedis, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = run_redis()
    said = refusal(start, caplog, f"rediss://:{SECRET}@127.0.0.1:{server.port}", attempts=1)
    assert "cannot be reached: Timeout" in said and "rediss:// is TLS" in said


def test_nobody_is_there(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    said = refusal(start, caplog, f"redis://:{SECRET}@127.0.0.1:{free_port()}")
    assert "cannot be reached" in said and "refused" in said
    with pytest.raises(DatabaseUnavailable, match=r"nowhere\.invalid:6379 cannot be reached"):
        broker: Broker = to_broker("redis://nowhere.invalid", "REDIS_URL")
        broker.connect()


def test_a_callers_transaction_is_refused_in_words(redis_server: RedisServer, start: Start) -> None:
    with pytest.raises(TypeError, match="here Redis carries the events"):
        start(redis_server.url).engine.publish("a", [Event("x")], connection=object())
