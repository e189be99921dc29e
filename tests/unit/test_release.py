"""What a stream keeps of its request is bounded, and the access log says what it said before."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http.parser import RequestParser
from gunicorn.http.wsgi import create

from flask_pg_sse.server.gunicorn import intern_request, release_request, release_response
from flask_pg_sse.server.release import release_environ
from tests.unit.test_interning import begun, logged

LOG = "%({x-one}i)s %({X-Two}I)s %(q)s %({http_x_three}e)s %({x-request-id}o)s"


class NoSocket:
    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", 80)


def answered(
    *headers: bytes, config: Config | None = None, rest: bytes = b"", uri: bytes = b"/"
) -> tuple[Any, Any, Any]:
    """Return request, response and environ as gunicorn has them when the app has answered."""
    config = config or with_log()
    lines = [b"GET " + uri + b" HTTP/1.1", b"Host: example.org", *headers, b"", b""]
    request = next(RequestParser(config, [b"\r\n".join(lines) + rest], ("10.0.0.1", 1234)))
    sock: Any = NoSocket()
    response, environ = create(request, sock, ("10.0.0.1", 1234), ("127.0.0.1", 80), config)
    return request, response, environ


def with_log(log_format: str | None = None) -> Config:
    config = Config()
    config.set("accesslog", "-")
    if log_format is not None:
        config.set("access_log_format", log_format)
    return config


def let_go(response: Any, environ: dict[str, Any]) -> None:
    release_request(environ, response)
    intern_request(environ, response)
    response.headers_sent = True
    release_response(response)


def line(request: Any, response: Any, environ: Any) -> str:
    logger = Logger(response.cfg)
    atoms = logged(request, response, environ)
    return str(response.cfg.access_log_format % logger.atoms_wrapper_class({"t": "", **atoms}))


def size(*kept: Any) -> int:
    """Return the characters of all texts in these objects, and in what they hold."""
    found = 0
    for one in kept:
        if isinstance(one, str | bytes):
            found += len(one)
        elif isinstance(one, dict):
            found += size(*one.keys(), *one.values())
        elif isinstance(one, list | tuple):
            found += size(*one)
        elif isinstance(one, io.BytesIO):
            found += len(one.getvalue())
    return found


LONG = b"x" * 8000
HEADERS = {
    "90 headers of 8 kB": [b"X-%d: " % n + LONG for n in range(90)],
    "90 short headers": [b"X-%d: " % n + b"y" * 200 for n in range(90)],
    "one header 90 times": [b"X-Same: " + b"y" * 200] * 90,
    "names of 8 kB": [b"X-%d-" % n + LONG + b": y" for n in range(90)],
    "cookies": [b"Cookie: a=" + LONG] * 90,
    "a host, a type, a last id": [b"Content-Type: " + LONG, b"Last-Event-ID: " + LONG, b"X-Forwarded-Host: " + LONG],
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_is_kept_is_small_whatever_came(name: str) -> None:
    request, response, environ = answered(*HEADERS[name], rest=LONG, uri=b"/sse?channel=orders&x=" + LONG[:3000])
    environ["werkzeug.proxy_fix.orig"] = {"HTTP_HOST": LONG.decode(), "REMOTE_ADDR": "10.0.0.1"}
    environ["werkzeug.request"] = object()
    response.start_response("200 OK", [("Set-Cookie", "session=" + LONG.decode()), ("Content-Type", "text/plain")])
    before = line(request, response, environ)
    let_go(response, environ)
    assert line(request, response, environ) == before
    kept = size(vars(request), environ, response.headers, request.unreader.buf)
    assert kept < 20_000, kept  # of which the request's line, which the log names, is the most
    assert environ["werkzeug.request"] is None
    assert environ["werkzeug.proxy_fix.orig"]["REMOTE_ADDR"] == "10.0.0.1"


def test_what_the_log_names_is_kept_whole_by_whatever_name() -> None:
    secret = base64.b64encode(b"ann:" + LONG[:4000])
    named = [b"X-One: 1" + LONG[:4000], b"X-Two: 2", b"X-Three: 3" + LONG[:4000], b"User-Agent: a" + LONG[:4000]]
    named += [b"Referer: r" + LONG[:4000], b"Authorization: Basic " + secret]
    for config in (with_log(), with_log(LOG)):
        request, response, environ = answered(*named, config=config, uri=b"/sse?" + LONG[:3000])
        response.start_response("200 OK", [("X-Request-ID", "q" * 4000)])
        before = line(request, response, environ)
        assert len(before) > 10_000
        let_go(response, environ)
        assert line(request, response, environ) == before
        assert secret.decode() not in str(environ), "nor is the password kept"


def test_without_an_access_log_nothing_long_is_kept() -> None:
    agent = b"User-Agent: " + LONG
    request, response, environ = answered(agent, config=Config(), uri=b"/sse?" + LONG[:3000])
    response.start_response("200 OK", [])
    let_go(response, environ)
    assert size(vars(request), environ) < 5_000
    assert environ["RAW_URI"].startswith("/sse?xxx") and request.uri.endswith("...")


class OwnLogger(Logger):
    """A logger of an app: it may name anything, and surely what gunicorn's names."""


def test_a_logger_of_the_apps_own_gets_what_gunicorns_does() -> None:
    config = Config()
    config.set("logger_class", f"{__name__}.OwnLogger")
    request, response, environ = answered(b"User-Agent: " + LONG, config=config, uri=b"/sse?" + LONG[:3000])
    response.start_response("200 OK", [])
    before = line(request, response, environ)
    let_go(response, environ)
    assert line(request, response, environ) == before and LONG.decode() in before


def test_an_ordinary_request_keeps_all() -> None:
    request, response, environ = begun(b"a")
    before, headers = dict(environ), list(request.headers)
    release_request(environ, response)
    release_response(response)
    assert environ == before and request.headers == headers
    assert [name for name, _ in response.headers] == ["Content-Type", "X-Own"]


def test_an_environ_of_an_unknown_server_is_bounded_too() -> None:
    environ: dict[str, Any] = {f"HTTP_X_{n}": "x" * 8000 for n in range(90)} | {"QUERY_STRING": "x" * 8000}
    environ |= {"HTTP_HOST": "example.org", "wsgi.errors": None, "HTTP_OBJECT": object()}
    release_environ(environ)
    assert size(environ) < 600 and environ["HTTP_HOST"] == "example.org" and "HTTP_OBJECT" in environ
