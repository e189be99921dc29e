"""Requests that no page would send: each is answered in one line, at a small cost, and the server stays well."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_pg_sse.tokens import Token, sign_token
from tests.support.client import Response, eventually, open_stream
from tests.support.crowd import worker
from tests.support.postgres import fresh_database
from tests.support.processes import cpu
from tests.support.servers import WebServer, free_port, gunicorn
from tools import postgres

MEGABYTE = 1_000_000
# gunicorn itself refuses lines and fields of more than 8 kB; without a limit of its own they come through to us.
NO_LIMITS = ("--limit-request-line", "0", "--limit-request-field_size", "0", "--worker-connections", "200")
KEY = "a secret"
GOOD = sign_token([KEY], Token(frozenset({"signed"})))


def start(database_url: str, log: Path) -> WebServer:
    port = free_port()
    env = {"DATABASE_URL": database_url, "FLASK_SSE_CHANNELS": '["open", "open-*"]', "FLASK_SECRET_KEY": KEY}
    env |= {"FLASK_SSE_HEARTBEAT": "1", "FLASK_SSE_MAX_CHANNELS": "20"}
    server = WebServer(gunicorn("tests.support.apps.basic:app", port, *NO_LIMITS), port, log, env, "/ping")
    try:
        server.wait_ready()
    except BaseException:
        server.kill()
        raise
    return server


@pytest.fixture(scope="module")
def server(postgres_server: postgres.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """One for all of this file, and at the end it is well."""
    with fresh_database(postgres_server) as url:
        server = start(url, tmp_path_factory.mktemp("hostile") / "server.log")
        try:
            yield server
            assert_well(server)
        finally:
            server.kill()


@pytest.fixture(scope="module")
def server_without_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    server = start(f"postgresql://127.0.0.1:{free_port()}/nowhere", tmp_path_factory.mktemp("alone") / "server.log")
    yield server
    server.kill()


def assert_well(server: WebServer) -> None:
    """No stream is left, other routes answer, events arrive, and nothing was thrown."""
    eventually(lambda: '"streams":0' in server.get("/state"), 20, "all streams have ended")
    with open_stream(server.port, "open") as stream:
        server.post("/notify/open", b'{"data": "well"}')
        assert stream.event().data == "well"
    assert "Traceback" not in server.log()


def raw(server: WebServer, data: bytes, timeout: float = 20.0) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; return status, headers, and the body's beginning: all of it if it is no stream."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout)
    try:
        # The server may have answered and closed before it has read all: what it said counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        with Response(sock, timeout) as response:
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                seen = [response.event()]
                if b"Last-Event-ID" in data:
                    seen.append(response.event())
                return response.status, response.headers, " ".join(message.event for message in seen).encode()
            return response.status, response.headers, response.read()
    finally:
        sock.close()


def get(server: WebServer, target: bytes, *headers: bytes, method: bytes = b"GET") -> tuple[int, dict[str, str], bytes]:
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    return raw(server, b"\r\n".join(lines) + b"\r\n\r\n")


def assert_refused(answer: tuple[int, dict[str, str], bytes], status: int, *words: str) -> None:
    found, headers, body = answer
    assert found == status, (found, body[:500])
    assert headers["content-type"].startswith("text/plain")
    text = body.decode()
    assert text.count("\n") == 1 and len(text) < 1000, "one line"
    for word in words:
        assert word in text


def channels(count: int, name: str = "open-{}") -> bytes:
    return "&".join("channel=" + name.format(number) for number in range(count)).encode()


LONG = {
    "10,000 channels": (b"/sse?" + channels(10_000), 414, "bytes"),
    "10,000 times one channel": (b"/sse?" + channels(10_000, "open"), 414, "bytes"),
    "10,000 other parameters": (b"/sse?channel=open&" + b"&".join(b"x%d=" % n for n in range(10_000)), 414, "bytes"),
    "a million empty parameters": (b"/sse?channel=open" + b"&" * MEGABYTE, 414, "bytes"),
    "a query of 1 MB": (b"/sse?channel=open&x=" + b"x" * MEGABYTE, 414, "bytes"),
    "1,000 parameters": (b"/sse?channel=open" + b"&" * 1000, 414, "parameters"),
    "a channel of 1 MB": (b"/sse?channel=" + b"x" * MEGABYTE, 414, "bytes"),
    "a channel of 1 MB in the path": (b"/sse/" + b"x" * MEGABYTE, 400, "255"),
    "1 MB of percent signs in the path": (b"/sse/" + b"%" * MEGABYTE, 400, "255"),
    "500,000 slashes": (b"/sse/" + b"a/" * 500_000, 400, "255"),
    "a token of 1 MB": (b"/sse?channel=closed&token=" + b"x" * MEGABYTE, 414, "bytes"),
    "a token of 10 kB": (b"/sse?channel=closed&token=" + b"x" * 10_000, 403, "token is not one"),
    "a token of 10 kB of dots": (b"/sse?channel=closed&token=" + b"." * 10_000, 403, "token is not one"),
    "a Last-Event-ID of 1 MB in the query": (b"/sse?channel=open&last_event_id=" + b"1" * MEGABYTE, 414, "bytes"),
    "a channel of 256 bytes": (b"/sse?channel=" + b"x" * 256, 400, "255"),
    "a channel of 300 bytes": (b"/sse/" + b"x" * 300, 400, "255"),
    "a channel of 256 bytes of UTF-8": (b"/sse?channel=" + b"%C3%A9" * 128, 400, "255"),
    "21 channels": (b"/sse?" + channels(21), 400, "at most 20"),
}  # fmt: skip
ODD = {
    "NUL": b"a%00b",
    "a line end": b"a%0Ab",
    "CR LF": b"a%0D%0Adata:%20x",
    "DEL": b"a%7Fb",
    "a control character of Latin 1": b"a%C2%85b",
    "a lone surrogate": b"%ED%A0%80",
    "bytes that are no UTF-8": b"%FF%FE",
    "an overlong slash": b"%C0%AF",
    "bytes above 127 as they are": b"\xff\xfe",
    "half a character": b"%C3",
    "beyond Unicode": b"%F4%90%80%80",
}


@pytest.mark.parametrize("name", LONG)
def test_what_is_too_much_is_refused_in_one_line(server: WebServer, name: str) -> None:
    target, status, word = LONG[name]
    assert_refused(get(server, target), status, word)


@pytest.mark.parametrize("place", [b"/sse?channel=", b"/sse?channel=open&channel=", b"/sse/"])
@pytest.mark.parametrize("name", ODD)
def test_what_is_no_name_is_refused(server: WebServer, name: str, place: bytes) -> None:
    answer = get(server, place + ODD[name])
    if place == b"/sse/" and b"%0A" in ODD[name]:
        assert answer[0] == 404  # Flask finds no route for a path with a line end in it
    elif b"\xff" in ODD[name]:
        assert answer[0] == 400  # gunicorn's own
    else:
        assert_refused(answer, 400, "channel")


@pytest.mark.parametrize(
    "rubbish", [b"%", b"%%", b"%zz", b"%u0041", b"%4", b"a%2", b"%25%", b"+%+", b"&&&", b"=", b";", b"%80", b"1%ff"]
)
def test_percent_rubbish_is_a_name_or_none_but_never_an_error(server: WebServer, rubbish: bytes) -> None:
    status, _, body = get(server, b"/sse?channel=" + rubbish)
    assert status in (400, 403) and body.count(b"\n") == 1
    status, _, body = get(server, b"/sse?channel=open&other=" + rubbish + b"&" + rubbish)
    assert (status, body.split()[0]) == (200, b"sse-open")
    for parameter in (b"token=", b"last_event_id="):
        status, _, body = get(server, b"/sse?channel=open&" + parameter + rubbish)
        assert (status, body.split()[0]) == (200, b"sse-open")


@pytest.mark.parametrize(
    "value",
    [b"1" * 8000, b"x" * 8000, b"9" * 19, b"-1", b"\xff\xfe", b"1 2", b"%00", b"'; --", b"1e9", b"\xd9\xa1"],
)
def test_no_last_event_id_is_an_error(server: WebServer, value: bytes) -> None:
    """A browser sends the id that it got last, even from another server under the URL: the stream gets a reset."""
    status, _, body = get(server, b"/sse?channel=open", b"Last-Event-ID: " + value)
    assert (status, body) == (200, b"sse-open sse-reset")


def test_a_last_event_id_of_a_megabyte_is_gunicorns_to_refuse(server: WebServer) -> None:
    status, _, body = get(server, b"/sse?channel=open", b"Last-Event-ID: " + b"1" * MEGABYTE)
    assert status == 431 and b"Traceback" not in body


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"PROPFIND", b"X" * 19])
@pytest.mark.parametrize("path", [b"/sse", b"/sse/open"])
def test_other_methods_are_refused(server: WebServer, method: bytes, path: bytes) -> None:
    status, headers, body = get(server, path + b"?channel=open", method=method)
    assert status in (400, 405) and b"Traceback" not in body
    if status == 405:
        assert {name.strip() for name in headers["allow"].split(",")} == {"GET", "HEAD", "OPTIONS"}


@pytest.mark.parametrize(
    "head",
    [
        b"GET /sse?channel=open HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET  /sse?channel=open\r\n\r\n",
        b"GET /sse?channel=open HTTP/1.1\r\nHost\r\n\r\n",
        b"GET /sse?channel=open HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /sse?channel=open HTTP/1.1\r\nTransfer-Encoding: rubbish\r\n\r\n",
        b"GET /sse?channel=open HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_the_servers_to_refuse(server: WebServer, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as sock, contextlib.suppress(ConnectionResetError):
        sock.sendall(head)
        answer = sock.recv(65536)
        assert answer == b"" or answer.split()[1][:1] == b"4" or answer.split()[1] in (b"501", b"505")
        assert b"Traceback" not in answer


def test_a_body_with_the_request_is_left_unread(server: WebServer) -> None:
    head = b"GET /sse?channel=open HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n"
    assert raw(server, head + b"x" * 100_000)[2].startswith(b"sse-open")


def test_odd_but_legal_requests_are_served(server: WebServer) -> None:
    for target in (
        b"http://other.example/sse?channel=open",
        b"/sse?channel=open&channel=open",
        b"/sse?channel=open&token=" + GOOD.encode() + b"&token=x",
        b"/sse?&&&=&channel=open",
        b"/sse?%63hannel=%6Fpen",
        b"/sse?" + channels(20),
    ):
        status, _, body = get(server, target)
        assert (status, body.split()[:1]) == (200, [b"sse-open"]), body


@pytest.mark.parametrize("name", [name for name, (target, *_) in LONG.items() if len(target) < 20_000])
def test_refusals_need_no_database(server_without_database: WebServer, name: str) -> None:
    """A client without permission costs no query: without a database the answer is the same, and comes at once."""
    target, status, word = LONG[name]
    assert_refused(get(server_without_database, target), status, word)


def cost(server: WebServer, target: bytes, times: int) -> int:
    before = cpu(worker(server))
    for _ in range(times):
        get(server, target)
    return cpu(worker(server)) - before


@pytest.mark.parametrize(
    "name",
    [
        "10,000 channels",
        "a million empty parameters",
        "a token of 1 MB",
        pytest.param("500,000 slashes", marks=pytest.mark.slow),
    ],
)
def test_a_large_request_costs_little_more_than_its_reading(server: WebServer, name: str) -> None:
    """Beside a route that looks at none of it: most of the cost is gunicorn's, which reads piece by piece."""
    target = LONG[name][0]
    times = 3_000_000 // len(target)
    same_size = b"/ping?" + b"x" * (len(target) - 6)
    ratios = [cost(server, target, times) / max(cost(server, same_size, times), 1) for _ in range(3)]
    assert min(ratios) < 3, ratios


# -- anything at all

NAMES = st.sampled_from(["channel", "token", "last_event_id", "x", "", "channel[]", "Channel"])
VALUES = st.one_of(
    st.sampled_from([b"open", b"open-1", b"closed", b"flask_pg_sse", GOOD.encode(), b"", b"0", b"1", b"9" * 30]),
    st.binary(max_size=300),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
ENCODINGS = st.sampled_from([quote_from_bytes, lambda value: "".join(f"%{byte:02x}" for byte in value)])
QUERIES = st.lists(st.tuples(NAMES, VALUES, ENCODINGS), max_size=30).map(
    lambda items: "&".join(f"{name}={encode(value)}" for name, value, encode in items).encode()
)
IN_A_LINE = st.binary(max_size=200).map(lambda value: bytes(byte for byte in value if byte not in b"\r\n"))
TARGETS = st.one_of(
    st.builds(lambda path, query: path + b"?" + query, st.sampled_from([b"/sse", b"/sse/", b"/sse/open"]), QUERIES),
    VALUES.map(lambda value: b"/sse/" + quote_from_bytes(value).encode()),
    IN_A_LINE.map(lambda value: b"/sse?" + value.replace(b" ", b"")),
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([
            b"Last-Event-ID", b"Origin", b"Accept", b"Cookie", b"Host", b"Connection", b"Range", b"X-Forwarded-For",
            b"Upgrade", b"Accept-Encoding", b"If-None-Match", b"Access-Control-Request-Method", b"Content-Type",
        ]),
        IN_A_LINE,
    ),
    max_size=5,
)  # fmt: skip
METHODS = st.one_of(st.sampled_from([b"GET", b"HEAD", b"OPTIONS", b"POST"]), st.binary(max_size=5))
REQUESTS = st.one_of(
    st.builds(
        lambda method, target, version, headers: b"\r\n".join(
            [method + b" " + target + b" HTTP/" + version, *(name + b": " + value for name, value in headers)]
        ),
        METHODS,
        TARGETS,
        st.sampled_from([b"1.1", b"1.0"]),
        HEADERS,
    ),
    st.binary(max_size=500),
).map(lambda head: head + b"\r\n\r\n")


@pytest.mark.slow
@given(REQUESTS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_an_error_of_the_server(server: WebServer, data: bytes) -> None:
    """The first line of the answer says it; whether the server is still well, the fixture looks at the end."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
        sock.sendall(data)
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (more := sock.recv(65536)):
                answer += more
        except ConnectionResetError:  # it was closed before all of this was read
            pass
        if answer:
            status = int(answer.split()[1])
            assert status < 500 or status in (501, 505), answer
            assert b"Traceback" not in answer
