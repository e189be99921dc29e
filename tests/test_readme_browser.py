"""The README's pages in a real browser: EventSource, htmx 2 and htmx 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.client import request
from tests.conftest import execute
from tests.servers import WebServer
from tests.test_readme import example

Start = Callable[..., WebServer]


def start(start_server: Start, database_url: str, tmp_path: Path, body: str) -> WebServer:
    (tmp_path / "page.html").write_text(body)
    return start_server(database_url, app="tests.apps.pages:app", PAGE=str(tmp_path / "page.html"))


def test_eventsource(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    server = start(start_server, database_url, tmp_path, example("eventsource"))
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("orders.readyState == EventSource.OPEN")
    with page.expect_console_message():
        execute(database_url, "NOTIFY orders, 'hello'")
    with page.expect_console_message():
        server.post("/notify/orders", b'{"data": {"id": 7}, "event": "created"}')
    assert said == ["hello", "7"]


def test_a_signed_url(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(example("signed"))
    closed = {"FLASK_SSE_CHANNELS": "[]", "FLASK_SECRET_KEY": "x"}
    server = start_server(database_url, app="tests.apps.pages:app", PAGE=str(tmp_path / "page.html"), **closed)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.evaluate("() => { mine.onmessage = (event) => { window.heard = event.data } }")
    page.wait_for_function("mine.readyState == EventSource.OPEN")
    server.post("/notify/user-7", b'{"data": "hello"}')
    page.wait_for_function("window.heard == 'hello'")
    with request(server.port, "/sse?channel=user-7") as response:
        assert response.status == 403


def test_htmx_2(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    scripts = '<script src="/htmx/htmx-2.min.js"></script><script src="/htmx/ext/hx-sse-2.min.js"></script>'
    server = start(start_server, database_url, tmp_path, scripts + example("htmx2"))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    server.post("/notify/orders", b'{"data": "<li>Two soups</li>", "event": "created"}')
    server.post("/notify/orders", b'{"data": "<li>One tea</li>", "event": "created"}')
    expect(page.locator("ul > li")).to_have_text(["Two soups", "One tea"])


def test_htmx_4(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    scripts = '<script src="/htmx/htmx-4.min.js"></script><script src="/htmx/ext/hx-sse-4.min.js"></script>'
    server = start(start_server, database_url, tmp_path, scripts + example("htmx4"))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    server.post("/notify/orders", b'{"data": "<li>Two soups</li>"}')
    server.post("/notify/orders", b'{"data": "<li>One tea</li>"}')
    expect(page.locator("ul > li")).to_have_text(["Two soups", "One tea"])


def test_a_page_comes_back_after_the_server_was_restarted(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    body = example("eventsource").replace("location.reload()", "void 0")
    server = start(start_server, database_url, tmp_path, body)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("orders.readyState == EventSource.OPEN")
    page.evaluate("orders.addEventListener('sse-open', () => { window.reopened = true })")
    server.stop()
    page.wait_for_function("orders.readyState == EventSource.CONNECTING")
    start_server(database_url, app="tests.apps.pages:app", PAGE=str(tmp_path / "page.html"), port=server.port)
    page.wait_for_function("window.reopened")
    with page.expect_console_message():
        execute(database_url, "NOTIFY orders, 'again'")
