"""Equal parts of what gunicorn keeps of two streams' requests become one object, with the same value."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http.parser import RequestParser
from gunicorn.http.wsgi import FileWrapper, create

from flask_pg_sse.hub.subscription import Subscription, Terms
from flask_pg_sse.server import interning
from flask_pg_sse.server.connection import Connection
from flask_pg_sse.server.gunicorn import intern_request
from tests.support.model import ModelLog, World

REQUEST = (
    b"GET /sse?channel=orders HTTP/1.1\r\nHost: example.org\r\nUser-Agent: a browser\r\nAccept: text/event-stream\r\n"
    b"Cookie: session=%b\r\n\r\n"
)


def begun(cookie: bytes, rest: bytes = b"", config: Config | None = None) -> tuple[Any, Any, Any]:
    """Return request, response and environ as gunicorn has them when a response has begun."""
    config = config or Config()
    request = next(RequestParser(config, [REQUEST % cookie + rest], ("10.0.0.1", 1234)))
    ours, theirs = socket.socketpair()
    theirs.close()
    response, environ = create(request, ours, ("10.0.0.1", 1234), ("127.0.0.1", 80), config)
    response.start_response("200 OK", [("Content-Type", "text/event-stream; charset=utf-8"), ("X-Own", "7")])
    ours.close()
    return request, response, environ


def logged(request: Any, response: Any, environ: Any) -> dict[str, Any]:
    atoms = Logger(Config()).atoms(response, request, environ, timedelta(seconds=5))
    return {name: value for name, value in atoms.items() if name != "t"}


def test_a_log_says_the_same_as_before() -> None:
    request, response, environ = begun(b"a")
    names, before = list(environ), logged(request, response, environ)
    intern_request(environ, response)
    after = logged(request, response, environ)
    replaced = {"{wsgi.input}e", "{wsgi.errors}e", "{wsgi.early_hints}e"}
    assert {k: v for k, v in before.items() if k not in replaced} == {
        k: v for k, v in after.items() if k not in replaced
    }
    assert list(environ) == names
    assert before["{cookie}i"] == "session=a" and before["{raw_uri}e"] == "/sse?channel=orders"


def test_what_is_equal_is_one_object() -> None:
    one, other = begun(b"a" * 10), begun(b"b" * 10)
    for _, response, environ in (one, other):
        intern_request(environ, response)
    apart = {name for name, value in one[2].items() if other[2][name] is not value}
    assert apart == {"gunicorn.socket", "HTTP_COOKIE"}
    assert all(name is theirs for name, theirs in zip(one[2], other[2], strict=True))
    assert [pair is theirs for pair, theirs in zip(one[0].headers, other[0].headers, strict=True)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert all(pair is theirs for pair, theirs in zip(one[1].headers, other[1].headers, strict=True))
    assert one[0].uri is other[0].uri is one[2]["RAW_URI"]
    assert one[0].version is other[0].version and one[0].version == (1, 1)
    assert one[0].max_buffer_headers is other[0].max_buffer_headers


def test_the_body_that_is_none_stays_readable_and_open() -> None:
    request, response, environ = begun(b"a")
    intern_request(environ, response)
    body = environ["wsgi.input"]
    body.close()
    assert body.read() == body.read(10) == body.readline() == request.body.read(1024) == b""
    assert list(body) == []
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])  # gunicorn's own ignores it too, by now


def test_a_body_that_there_is_stays() -> None:
    request, response, environ = begun(b"a")
    environ["CONTENT_LENGTH"] = "5"
    intern_request(environ, response)
    assert environ["wsgi.input"] is request.body
    assert request.body.read() == b""


def test_a_log_that_was_opened_anew_is_not_taken_for_the_old_one() -> None:
    (_, first, environ), (_, second, another) = begun(b"a"), begun(b"b")
    another["wsgi.errors"].streams = [object()]
    errors = another["wsgi.errors"]
    intern_request(environ, first)
    intern_request(another, second)
    assert another["wsgi.errors"] is errors is not environ["wsgi.errors"]


def test_a_gunicorn_that_lacks_some_of_it_keeps_the_rest() -> None:
    request, response, environ = begun(b"a")
    before = dict(environ)
    del request.fragment
    connection = Connection(environ)
    connection.response_started(response.write, body=1, direct_write=True, send_timeout=1)
    connection.release_request()
    assert request.method == "GET" and before["HTTP_COOKIE"] == environ["HTTP_COOKIE"] == "session=a"
    assert list(environ) == list(before)


@pytest.mark.parametrize("lacks", ["sent", "chunked", "sock"])
def test_a_gunicorn_whose_response_lacks_some_of_it_sends_by_itself(lacks: str) -> None:
    ways = []
    for lacking in (False, True):
        _, response, environ = begun(b"a")
        response.headers_sent = True
        if lacking:
            delattr(response, lacks)
        connection = Connection(environ)
        body = iter(())
        connection.response_started(response.write, body=id(body), direct_write=True, send_timeout=1)
        assert not isinstance(body, environ["wsgi.file_wrapper"])  # as gunicorn asks
        connection.release_request()
        assert environ["wsgi.file_wrapper"] is FileWrapper
        ways.append(connection.way())
    assert ways[0] is not None and ways[1] is None


def test_what_clients_choose_is_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interning, "_known", {})
    config = Config()  # one, as a worker has: to make it takes longer than all the rest
    for number in range(3000):
        _, response, environ = begun(b"%d" % number, config=config)
        environ["HTTP_X"] = "x" * 10_000
        intern_request(environ, response)
        assert environ["HTTP_COOKIE"] == f"session={number}"
    assert len(interning._known) <= 4096
    assert max(len(key) for key in interning._known if isinstance(key, str)) <= 256


@pytest.mark.parametrize(
    "remember", [interning.interned_values, lambda names: interning.interned_pairs([(name, "") for name in names])]
)
def test_what_comes_together_is_within_the_bound_too(remember: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interning, "_known", {number: number for number in range(4096 - 10)})
    remember([f"HTTP_X_{number}" for number in range(90)])
    assert len(interning._known) <= 4096


def test_streams_that_are_open_on_equal_terms_have_the_same() -> None:
    one, other = terms_of_streams([Terms(clients=("address 10.0.0.1",), asked_at=at) for at in (1.0, 2.0)])
    assert one is other and one == Terms(clients=("address 10.0.0.1",))


def test_terms_with_an_end_of_their_own_push_no_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interning, "_known", {})
    ending = Terms(ends_at=1e9, ends_because="expired")
    assert terms_of_streams([ending]) == [ending]
    assert not interning._known


def terms_of_streams(terms: Sequence[Terms]) -> list[Terms]:
    """Return what the streams have that were opened on these terms and have had an event."""
    world = World(ModelLog(1))
    subscriptions = [Subscription("a", 1000, opened_on) for opened_on in terms]
    streams = [iter(world.stream(subscription, None)) for subscription in subscriptions]
    for stream in streams:
        next(stream)  # the first line
        next(stream)
    world.log.append("a", 20)
    world.deliver(1)
    for stream in streams:
        next(stream)
    return [subscription.terms for subscription in subscriptions]
