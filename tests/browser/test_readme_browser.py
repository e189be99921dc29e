"""The README's pages in a real browser: EventSource, htmx 2 and htmx 4."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.test_demo_browser import HIDE
from tests.docs.test_readme import example
from tests.support.client import eventually, open_stream, request
from tests.support.postgres import execute
from tests.support.servers import ROOT, WebServer

Start = Callable[..., WebServer]


def start(start_server: Start, database_url: str, tmp_path: Path, body: str) -> WebServer:
    (tmp_path / "page.html").write_text(body)
    return start_server(database_url, app="tests.support.apps.pages:app", PAGE=str(tmp_path / "page.html"))


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


DISPATCHED = """
<script>
  window.all = [];
  const source = new EventSource("/sse?channel=orders");
  for (const name of ["message", "created", ""]) {
    source.addEventListener(name, (event) => all.push([event.type, event.data, event.lastEventId]));
  }
</script>"""
# htmx swaps an empty message in, where it takes one for an event.
SWAPPED = {
    2: '<ul hx-ext="sse" sse-connect="/sse?channel=orders" sse-swap="message" hx-swap="beforeend"><li>first</li></ul>',
    4: '<ul hx-sse:connect="/sse?channel=orders" hx-swap="beforeend"><li>first</li></ul>',
}


@pytest.mark.slow
def test_heartbeats_and_comments_dispatch_nothing(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    """Neither in EventSource nor in htmx 2 and 4; and an event directly behind them is whole."""
    pages = {"EventSource": DISPATCHED} | {f"htmx {number}": scripts(number) + SWAPPED[number] for number in SWAPPED}
    for name, body in pages.items():
        (tmp_path / "page.html").write_text(body)
        server = start_server(
            database_url,
            app="tests.support.apps.pages:app",
            PAGE=str(tmp_path / "page.html"),
            FLASK_SSE_HEARTBEAT="0.1",
        )
        with page.expect_response("**/sse?channel=orders"):
            page.goto(f"http://127.0.0.1:{server.port}/")
        eventually(lambda: '"streams":1' in server.get("/state"))  # noqa: B023
        with open_stream(server.port, "orders") as stream:
            for number in range(3):
                for _ in range(2):
                    assert stream.next().comments == ["heartbeat"]
                execute(database_url, """SELECT pg_notify('orders', '{"comment": "no event", "event": "created"}')""")
                execute(database_url, "SELECT pg_notify('orders', %s)", (f"<li>{number}</li>",))
                while stream.next().data != f"<li>{number}</li>":
                    pass
        if name == "EventSource":
            page.wait_for_function("all.length >= 3")
            assert page.evaluate("all") == [["message", f"<li>{number}</li>", ""] for number in range(3)]
        else:
            expect(page.locator("li")).to_have_text(["first", "0", "1", "2"])
            assert page.locator("ul").inner_html().strip() == "<li>first</li><li>0</li><li>1</li><li>2</li>"
        server.stop()


def test_a_signed_url(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(example("signed"))
    closed = {"FLASK_SSE_CHANNELS": "[]", "FLASK_SECRET_KEY": "x"}
    server = start_server(database_url, app="tests.support.apps.pages:app", PAGE=str(tmp_path / "page.html"), **closed)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.evaluate("() => { mine.onmessage = (event) => { window.heard = event.data } }")
    page.wait_for_function("mine.readyState == EventSource.OPEN")
    server.post("/notify/user-7", b'{"data": "hello"}')
    page.wait_for_function("window.heard == 'hello'")
    with request(server.port, "/sse?channel=user-7") as response:
        assert response.status == 403


def scripts(version: int, *, defer: bool = False) -> str:
    extension = {2: "htmx-2-sse/dist/sse.min.js", 4: "htmx-4/dist/ext/hx-sse.min.js"}[version]
    sources = (f"htmx-{version}/dist/htmx.min.js", extension)
    return "".join(f'<script {"defer" if defer else ""} src="/htmx/{source}"></script>' for source in sources)


def send(server: WebServer, dish: str, *, event: str = "") -> None:
    server.post("/notify/orders", json.dumps({"data": f"<li>{dish}</li>", "event": event}).encode())


def test_the_readme_names_the_versions_that_are_tested() -> None:
    text = (ROOT / "demo" / "htmx-files" / "pyproject.toml").read_text()
    htmx_4, htmx_2, extension, *_ = re.findall(r'package = "\S+"\nversion = "(\S+)"', text)
    readme = (ROOT / "README.md").read_text()
    assert f"htmx 4.0 (tested: {htmx_4}), with its own SSE extension, " in readme
    assert f"htmx 2 (tested: {htmx_2}), with its SSE extension (htmx-ext-sse {extension}), " in readme


def test_htmx_2(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    server = start(start_server, database_url, tmp_path, scripts(2) + example("htmx2"))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    send(server, "Two soups", event="created")
    send(server, "One tea", event="created")
    expect(page.locator("ul > li")).to_have_text(["Two soups", "One tea"])


def test_htmx_4(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    server = start(start_server, database_url, tmp_path, scripts(4) + example("htmx4"))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    page.evaluate("document.body.addEventListener('created', (event) => { window.heard = event.detail.data })")
    send(server, "Two soups")
    send(server, "One tea")
    expect(page.locator("ul > li")).to_have_text(["Two soups", "One tea"])
    send(server, "Three cakes", event="created")
    page.wait_for_function("window.heard == '<li>Three cakes</li>'")
    expect(page.locator("ul > li")).to_have_count(2)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "seen"), [(2, ["Soup", "Tea"]), (4, ["Soup", "Cake", "Tea"])])
def test_what_is_seen_after_an_error_status(
    page: Page, logged_url: str, start_server: Start, tmp_path: Path, version: int, seen: list[str]
) -> None:
    """The event log has kept what was sent meanwhile. htmx 4 asks for it, and htmx 2 begins a new stream."""
    server = start(start_server, logged_url, tmp_path, scripts(version) + example(f"htmx{version}"))
    event = "created" if version == 2 else ""
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    send(server, "Soup", event=event)
    expect(page.locator("ul > li")).to_have_text(["Soup"])
    page.route("**/sse?channel=orders", lambda route: route.fulfill(status=503))
    with page.expect_response(lambda response: response.status == 503):
        server.stop()
    execute(logged_url, "SELECT flask_pg_sse.notify('orders', '<li>Cake</li>', event => %s)", (event,))
    app = "tests.support.apps.pages:app"
    server = start_server(logged_url, app=app, PAGE=str(tmp_path / "page.html"), port=server.port)
    with page.expect_response(lambda response: response.status == 200, timeout=60_000):
        page.unroute("**/sse?channel=orders")
    send(server, "Tea", event=event)
    expect(page.locator("ul > li")).to_have_text(seen)


@pytest.mark.parametrize(("version", "again"), [(2, True), (4, False)])
def test_whether_a_first_request_that_failed_is_tried_again(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, version: int, again: bool
) -> None:
    server = start(start_server, database_url, tmp_path, scripts(version) + example(f"htmx{version}"))
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=503)

    page.route("**/sse?channel=orders", refuse)
    page.clock.install()
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    page.clock.run_for(600_000)
    with page.expect_response("**/ping"):
        page.evaluate("fetch('/ping')")
    assert (len(asked) > 1) == again, asked


def test_htmx_4_with_defer_may_start_before_its_extension(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    server = start(start_server, database_url, tmp_path, scripts(4, defer=True) + example("htmx4"))
    asked: list[str] = []
    held: list[Route] = []
    page.on("request", lambda request: asked.append(request.url))
    page.route("**/hx-sse.min.js", lambda route: held.append(route))
    page.add_init_script("document.addEventListener('htmx:after:process', () => { window.started = true })")
    page.goto(f"http://127.0.0.1:{server.port}/", wait_until="commit")
    page.wait_for_function("window.started")
    held.pop().continue_()
    page.wait_for_load_state()
    page.evaluate("fetch('/ping')")
    assert not any("/sse?" in url for url in asked)


def test_htmx_2_keeps_the_stream_of_a_hidden_tab(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    """That htmx 4 closes it is tested with the demo."""
    server = start(start_server, database_url, tmp_path, scripts(2) + example("htmx2"))
    with page.expect_response("**/sse?channel=orders"):
        page.goto(f"http://127.0.0.1:{server.port}/")
    page.evaluate(HIDE, True)
    send(server, "Two soups", event="created")
    expect(page.locator("ul > li")).to_have_text(["Two soups"])


@pytest.mark.slow
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
    start_server(database_url, app="tests.support.apps.pages:app", PAGE=str(tmp_path / "page.html"), port=server.port)
    page.wait_for_function("window.reopened")
    with page.expect_console_message():
        execute(database_url, "NOTIFY orders, 'again'")
