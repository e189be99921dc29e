"""A stream's answer sets no cookie and saves no session, with the extensions that apps have."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.client import Response, eventually, opened, request
from tests.support.link import Link, through
from tests.support.servers import WebServer
from tests.support.slow import but_one_slow

Start = Callable[..., WebServer]
STORES = but_one_slow(["cachelib", "cookie", "sqlalchemy", "redis"])


class Browser:
    """Keeps cookies as a browser does: an answer's are kept when its headers come."""

    def __init__(self, server: WebServer) -> None:
        self.server = server
        self.cookies: dict[str, str] = {}

    @property
    def header(self) -> dict[str, str]:
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return {"Cookie": cookies} if cookies else {}

    def request(self, path: str, method: str = "GET") -> Response:
        return self.keep(request(self.server.port, path, method=method, headers=self.header))

    def keep(self, response: Response) -> Response:
        for line in response.set_cookies:
            for name, morsel in SimpleCookie(line).items():
                self.cookies[name] = morsel.value
                if morsel["max-age"] == "0" or "1970" in morsel["expires"]:
                    del self.cookies[name]
        return response

    def read(self, path: str, method: str = "GET") -> str:
        with self.request(path, method) as response:
            assert response.status < 300, (response.status, response.read(), self.server.log())
            return response.read().decode()


@pytest.fixture(params=STORES)
def env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    found = {"KIND": request.param, "STORE": str(tmp_path)}
    if request.param == "redis":
        found["REDIS_SOCKET"] = str(request.getfixturevalue("redis_server").socket)
    return found


def start(start_server: Start, url: str, env: dict[str, str], *options: str) -> WebServer:
    return start_server(url, *options, app="tests.support.apps.sessions:app", **env)


def asked_while_the_user_logs_out(server: WebServer, browser: Browser, channel: str) -> Response:
    """Ask for a stream, let the user log out while the authorizer is asked, and return the answer."""
    answers: list[Response] = []
    asked = int(server.get("/pending"))
    asking = threading.Thread(target=lambda: answers.append(browser.request(f"/sse?channel={channel}")))
    asking.start()
    eventually(lambda: int(server.get("/pending")) > asked)
    browser.read("/logout", "POST")
    server.post(f"/answer/{channel}")
    asking.join()
    return answers[0]


@pytest.mark.parametrize("path", ["/login", pytest.param("/login?remember", marks=pytest.mark.slow)])
def test_a_session_that_has_changed_while_a_stream_was_asked_for_stays_as_it_is(
    database_url: str, start_server: Start, env: dict[str, str], path: str
) -> None:
    server = start(start_server, database_url, env)
    browser = Browser(server)
    browser.read(path, "POST")
    answer = asked_while_the_user_logs_out(server, browser, "slow")
    assert answer.status == 200 and not answer.set_cookies
    answer.close()
    assert browser.read("/who").startswith("Bob, logged out")


def test_a_refusal_does_not_change_the_session_either(
    database_url: str, start_server: Start, env: dict[str, str]
) -> None:
    server = start(start_server, database_url, env)
    browser = Browser(server)
    for status in (403, 401):  # the hook says no; the hook aborts
        browser.read("/login?remember", "POST")
        with asked_while_the_user_logs_out(server, browser, f"slow-{status}") as answer:
            assert answer.status == status and not answer.set_cookies
        assert browser.read("/who").startswith("Bob, logged out")
    with browser.request("/sse?channel=%00") as answer:
        assert answer.status == 400 and not answer.set_cookies
    assert "Traceback" not in server.log()


def test_hooks_read_the_session_and_what_they_write_to_it_is_dropped(
    database_url: str, start_server: Start, env: dict[str, str]
) -> None:
    server = start(start_server, database_url, env)
    browser = Browser(server)
    browser.read("/login?remember", "POST")
    with opened(lambda: browser.request("/sse?channel=a")) as response:
        assert not response.set_cookies
        assert browser.read("/who") == "Ann, logged in, asked 0"
    assert "Traceback" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize("works_for", ["0", "0.4"])
def test_a_page_that_comes_back_at_once_finds_that_its_user_has_logged_out(
    logged_url: str, start_server: Start, tmp_path: Path, works_for: str
) -> None:
    """The view ends the streams before its answer clears the cookie, and goes on working after that."""
    server = start(start_server, logged_url, {"KIND": "cookie", "STORE": str(tmp_path)})
    for _ in range(14 if works_for != "0" else 4):
        browser = Browser(server)
        browser.read("/login", "POST")
        page = opened(partial(browser.request, "/sse?channel=a"))
        with page, socket.create_connection(("127.0.0.1", server.port), 10) as logout:
            cookie = browser.header["Cookie"]
            line = f"POST /logout?works_for={works_for} HTTP/1.1"
            logout.sendall(f"{line}\r\nHost: localhost\r\nCookie: {cookie}\r\nContent-Length: 0\r\n\r\n".encode())
            message = page.event()
            assert (message.event, message.json) == ("sse-end", {"reason": "revoked"})
            assert select.select([logout], [], [], 0)[0], "the answer, which clears the cookie, came first"
            browser.keep(Response(logout, 10))
        with browser.request("/sse?channel=a") as again:
            assert again.status == 403
        eventually(lambda: json.loads(server.get("/state"))["streams"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silence"])
def test_a_user_logs_out_while_the_database_is_away(
    logged_url: str, start_server: Start, tmp_path: Path, how: str
) -> None:
    env = {"KIND": "cookie", "STORE": str(tmp_path)}
    with Link(urlsplit(logged_url).port or 0) as line:
        here = start(start_server, through(line, logged_url), env)
        there = start(start_server, logged_url, env)
        browser = Browser(here)
        browser.read("/login", "POST")
        here.post("/notify/a")  # a connection to send with is open now, and will be lost
        elsewhere = Browser(there)
        elsewhere.cookies = dict(browser.cookies)
        near, far = (opened(partial(one.request, "/sse?channel=a")) for one in (browser, elsewhere))
        with near, far:
            getattr(line, how)()
            begun = time.monotonic()
            browser.read("/logout", "POST")
            assert time.monotonic() - begun < 4, "it does not wait for the database"
            for _ in range(3):
                browser.read("/logout", "POST")  # again: it is one command
            assert near.event().json == {"reason": "revoked"}
            assert time.monotonic() - begun < 8
            eventually(lambda: "disconnect() has ended the streams of this worker" in here.log(), 30)
            line.restore()
            far.timeout = 30
            message = far.event()
            while message.event == "sse-cursor":
                message = far.event()
            assert (message.event, message.json) == ("sse-end", {"reason": "revoked"})
        eventually(lambda: "disconnect() reaches the other workers again" in here.log())
        assert here.log().count("disconnect() has ended the streams of this worker") == 1


@pytest.mark.parametrize("options", [(), pytest.param(("-k", "gthread", "--threads", "8"), marks=pytest.mark.slow)])
def test_the_view_waits_for_nothing(start_server: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A stream's headers come while PostgreSQL is silent, and say nothing that is late when the stream can begin."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as hole:
        url = f"postgresql://postgres@127.0.0.1:{hole.getsockname()[1]}/postgres"
        server = start(start_server, url, {"KIND": "cookie", "STORE": str(tmp_path)}, *options)
        browser = Browser(server)
        browser.read("/login?remember", "POST")
        waited = []
        for _ in range(5):
            begun = time.monotonic()
            with browser.request("/sse?channel=a") as response:
                waited.append(time.monotonic() - begun)
                assert response.status == 200 and not response.set_cookies
                assert response.next_line() == b"retry: 3000\n"
        # The first may wait for a moment, a second, because the worker has just started to listen. Of the others each
        # may stand still for as long on a busy machine, but not all.
        assert waited[0] < 8 and min(waited[1:]) < 0.7, waited


def test_the_ends_of_requests_that_extensions_have(database_url: str, start_server: Start) -> None:
    """All at once: no stream keeps a connection of the app's pool, and none is compressed, cached or changed."""
    server = start_server(database_url, app="tests.support.apps.extensions:app")
    headers = {"Accept-Encoding": "gzip, br, zstd, deflate"}
    streams = []
    for _ in range(4):
        response = request(server.port, "/sse?channel=a", headers=headers)
        streams.append(response)
        assert response.status == 200 and "content-encoding" not in response.headers, response.headers
        assert response.next().event == "sse-open"
    assert server.get("/users") == "1 connection in use, of a pool of 1"
    server.post("/notify/a", json.dumps({"data": "x"}).encode())
    for response in streams:
        assert response.event().data == "x"
        response.close()
    with request(server.port, "/compressed", headers=headers) as page:
        assert page.headers["content-encoding"] in ("gzip", "br", "zstd"), "Flask-Compress is at work"
    assert "Traceback" not in server.log()
