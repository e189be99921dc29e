"""The positions that clients send, right or wrong, over real servers; and how long a position stays valid."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote

import pytest

from tests.support.client import Message, Response, open_stream, request
from tests.support.postgres import connect, execute, fresh_database
from tests.support.servers import WebServer, starting
from tools import postgres

Start = Callable[..., WebServer]


@pytest.fixture
def url(logged_url: str) -> str:
    return logged_url


def publish(url: str, channel: str, data: str) -> str:
    query = "SELECT flask_pg_sse.publish_v1(%s, ARRAY['{}'::json], ARRAY[%s])"
    return str(execute(url, query, (channel, data))[0][0])


def head(url: str) -> str:
    return str(execute(url, "SELECT flask_pg_sse.head_v1()")[0][0])


def come_back(port: int, last_event_id: str, channel: str = "a") -> Response:
    return open_stream(port, channel, headers={"Last-Event-ID": last_event_id})


def logged_event(stream: Response) -> tuple[str | None, str | None]:
    """Return id and data of the next event that is none of the package's own."""
    while (message := stream.event()).event == "sse-cursor":
        pass
    assert message.event == "message", message
    return message.id, message.data


def reset_of(stream: Response) -> Message:
    message = stream.event()
    assert message.event == "sse-reset", message
    return message


NONSENSE = [
    ("abc", "unknown-id"),
    ("-1", "unknown-id"),
    ("+5", "unknown-id"),
    ("1e3", "unknown-id"),
    ("007", "unknown-id"),
    ("1 2", "unknown-id"),
    ("٣", "unknown-id"),
    ("5" * 20, "unknown-id"),
    ("9" * 19, "unknown-id"),
    ("x" * 3500, "unknown-id"),
    ("9" * 3500, "unknown-id"),
    (str(2**63 - 1), "future-id"),
    ("5", "too-old"),
]


def test_no_last_event_id_is_an_error(url: str, start_server: Start) -> None:
    server = start_server(url)
    publish(url, "a", "before")
    for asked, reason in NONSENSE:
        for way in ("header", "query"):
            headers = {"Last-Event-ID": asked.encode().decode("latin-1")} if way == "header" else {}
            query = f"&last_event_id={quote(asked)}" if way == "query" else ""
            if way == "header" and not asked.isascii():
                continue  # the test's client writes ASCII alone
            with request(server.port, f"/sse?channel=a{query}", headers=headers) as stream:
                assert stream.status == 200, (asked[:30], way, stream.status)
                assert stream.next().event == "sse-open"
                reset = reset_of(stream)
                assert (reset.json, reset.id) == ({"reason": reason}, head(url)), (asked[:30], way)
                log_id = publish(url, "a", "after")
                assert logged_event(stream) == (log_id, "after")
    for asked in (" 5", "5 "):
        with open_stream(server.port, "a", path=f"/sse/a?last_event_id={quote(asked)}&") as stream:
            assert reset_of(stream).json == {"reason": "unknown-id"}
    with come_back(server.port, "x" * 8000) as stream:
        assert reset_of(stream).json == {"reason": "unknown-id"}


class Shared(NamedTuple):
    url: str
    port: int


@pytest.fixture(scope="module")
def shared(postgres_server: postgres.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A database with the log and a web server, for cases that have a channel each."""
    folder = tmp_path_factory.mktemp("shared")
    with fresh_database(postgres_server, logged=True) as url, starting(folder) as start:
        yield Shared(url, start(url).port)


@pytest.mark.parametrize(
    "query",
    [
        "lastEventId={}",
        "Last-Event-ID={}",
        "last_event_id=&lastEventId={}",
        "last_event_id={0}&Last-Event-ID=",
        # The page's URL has its own cursor, and what the client adds behind it is newer.
        "last_event_id=0&lastEventId={}",
        "lastEventId={}&last_event_id=0",
        "last_event_id=0&Last-Event-ID={}",
        "lastEventId=0&lastEventId={}",
        "last_event_id=0&last_event_id={}",
    ],
)
def test_a_client_that_cannot_set_the_header_resumes_by_any_of_the_parameters(shared: Shared, query: str) -> None:
    url, port = shared
    channel = uuid.uuid4().hex
    publish(url, channel, "seen")
    seen = publish(url, channel, "seen too")
    missed = publish(url, channel, "missed")
    path = f"/sse/{channel}?{query.format(seen)}&"
    with open_stream(port, channel, path=path) as stream:
        assert logged_event(stream) == (missed, "missed")
    with open_stream(port, channel, path=path, headers={"Last-Event-ID": str(missed)}) as stream:
        assert logged_id_after(stream, url, channel), "the header beats them all"


def test_an_empty_last_event_id_is_none(url: str, start_server: Start) -> None:
    server = start_server(url)
    publish(url, "a", "before")
    for query in ("", "&last_event_id="):
        with request(server.port, f"/sse?channel=a{query}", headers={"Last-Event-ID": ""}) as stream:
            opening = stream.next()
            assert (opening.event, opening.id) == ("sse-open", head(url))
            log_id = publish(url, "a", "after")
            assert logged_event(stream) == (log_id, "after")


def test_zero_is_the_beginning_of_what_is_kept(url: str, start_server: Start) -> None:
    server = start_server(url)
    query = "SELECT flask_pg_sse.publish_v1('a', ARRAY['{}'::json], ARRAY[n::text]) FROM generate_series(0, 299) AS n"
    ids = [str(log_id) for (log_id,) in execute(url, query)]
    execute(url, "UPDATE flask_pg_sse.event SET created_at = now() - interval '2 hours' WHERE id < %s", (ids[200],))
    for _ in range(2):  # as it is, and after pruning
        kept = [str(row[0]) for row in execute(url, "SELECT id FROM flask_pg_sse.event ORDER BY id")]
        with come_back(server.port, "0") as stream:
            assert [logged_event(stream)[0] for _ in kept] == kept
            assert logged_id_after(stream, url)
        execute(url, "SELECT flask_pg_sse.prune_v1(interval '1 hour', 5000)")
    assert kept == ids[200:] + kept[100:]
    with come_back(server.port, ids[198]) as stream:
        reset = reset_of(stream)
        assert (reset.json, reset.id) == ({"reason": "too-old"}, head(url))
    with come_back(server.port, ids[199]) as stream:  # the last that is gone: nothing after it is missing
        assert logged_event(stream) == (ids[200], "200")


def logged_id_after(stream: Response, url: str, channel: str = "a") -> bool:
    log_id = publish(url, channel, "live")
    return logged_event(stream) == (log_id, "live")


def test_the_header_beats_the_query(url: str, start_server: Start) -> None:
    """A page's URL keeps the position of the moment when it was rendered; the browser knows better."""
    server = start_server(url)
    ids = [publish(url, "a", str(number)) for number in range(5)]
    for query in (ids[0], "0", "abc"):
        path = f"/sse?channel=a&last_event_id={query}"
        with request(server.port, path, headers={"Last-Event-ID": ids[3]}) as stream:
            assert stream.next().id == ids[3]
            assert logged_event(stream) == (ids[4], "4")


@contextmanager
def busy(url: str, query: str) -> Iterator[None]:
    """Run a statement time and again."""
    stop = threading.Event()

    def run() -> None:
        connection = connect(url)
        with connection.cursor() as cursor:
            while not stop.wait(0.02):
                cursor.execute(query)
        connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("on_it", ["nothing", "events that are in no log"])
def test_a_quiet_channel_never_grows_too_old(url: str, start_server: Start, on_it: str) -> None:
    """All its own events were pruned long ago, and other channels are busy: its streams are told how far the log is."""
    server = start_server(url, FLASK_SSE_HEARTBEAT="0.3")
    typing = "SELECT pg_notify('quiet', 'typing')" if on_it != "nothing" else "SELECT 1"
    with busy(url, typing):
        with open_stream(server.port, "quiet") as stream:
            publish(url, "quiet", "long ago")
            told: list[str] = []
            got: list[str | None] = []

            def read() -> None:
                assert time.monotonic() < deadline, told
                message = stream.next()
                if message.data not in ("typing", "{}", None):
                    got.append(message.data)
                if message.id is not None:
                    told.append(message.id)

            deadline = time.monotonic() + 60
            with busy(url, "SELECT flask_pg_sse.notify('busy', 'x')"):
                while len(set(told)) < 8:  # its own event, and how far the others have come
                    read()
            while told[-1] != head(url):
                read()
        assert got == ["long ago"]
        execute(url, "SELECT flask_pg_sse.prune_v1('0 s', 100000)")
        missed = publish(url, "quiet", "while it was away")
        with come_back(server.port, told[-1], "quiet") as stream:
            while (message := stream.event()).data == "typing" or message.event == "sse-cursor":
                pass
            assert (message.id, message.data) == (missed, "while it was away")


@pytest.mark.slow
def test_a_worker_that_lags_takes_a_client_from_a_faster_one(url: str, start_server: Start) -> None:
    slow = start_server(url)
    with open_stream(slow.port, "a") as stays:
        [(pid,)] = execute(
            url,
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener' "
            "AND datname = current_database()",
        )
        fast = start_server(url)
        with open_stream(fast.port, "a") as other:
            ids = [publish(url, "a", "0")]
            assert logged_event(stays) == logged_event(other) == (ids[0], "0")
            os.kill(pid, signal.SIGSTOP)
            try:
                ids += [publish(url, "a", str(number)) for number in range(1, 4)]
                assert [logged_event(other)[0] for _ in range(3)] == ids[1:]
                with come_back(slow.port, ids[3]) as newest, come_back(slow.port, ids[1]) as older:
                    assert [logged_event(older)[0] for _ in range(2)] == ids[2:]
                    os.kill(pid, signal.SIGCONT)
                    assert [logged_event(stays)[0] for _ in range(3)] == ids[1:]
                    last = publish(url, "a", "last")
                    for stream in (stays, other, newest, older):
                        assert logged_event(stream) == (last, "last")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def test_the_logs_id_leaves_in_the_same_write_as_the_senders_own(url: str, start_server: Start) -> None:
    server = start_server(url)
    with open_stream(server.port, "a") as stream:
        execute(url, "SELECT flask_pg_sse.notify('a', 'x', id => '1')")
        while not stream.body:
            stream._read_more()  # one chunk: what the server wrote in one piece
        assert stream.body == f"id: 1\ndata: x\n\nevent: sse-cursor\nid: {head(url)}\ndata: {{}}\n\n".encode()


def test_a_client_that_comes_back_to_a_quiet_channel_is_told_how_far_the_log_is(url: str, start_server: Start) -> None:
    """The log was read to its end for it; its own last event may be pruned before anything more is published."""
    server = start_server(url, FLASK_SSE_HEARTBEAT="0.2")
    own = publish(url, "a", "its last")
    newest = publish(url, "b", "of another channel")
    with come_back(server.port, own) as stream:
        cursor = stream.event()
        assert (cursor.event, cursor.id) == ("sse-cursor", newest)
        for _ in range(3):
            assert stream.next().comments == ["heartbeat"], "it is told once"
    execute(url, "SELECT flask_pg_sse.prune_v1(interval '0', 100)")
    with come_back(server.port, newest) as stream:
        assert stream.event().event == "sse-cursor", "no reset"
