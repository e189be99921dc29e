"""The README's pages in a real browser, and what it and docs/htmx.md say of htmx 2 and htmx 4 by themselves."""

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
    open_page(page, server)
    with page.expect_console_message():
        execute(database_url, "NOTIFY orders, 'hello'")
    with page.expect_console_message():
        server.post("/notify/orders", b'{"data": {"id": 7}, "event": "created"}')
    assert said == ["hello", "7"]


def open_page(page: Page, server: WebServer, channel: str = "orders") -> None:
    """Open the page and wait until PostgreSQL has confirmed LISTEN: from then on it misses nothing."""
    page.goto(f"http://127.0.0.1:{server.port}/")
    eventually(lambda: f'"{channel}"' in server.get("/state"), 30)


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
        eventually(lambda: '"streams":1' in server.get("/state"), 30)  # noqa: B023
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
    open_page(page, server, "user-7")
    page.evaluate("() => { mine.onmessage = (event) => { window.heard = event.data } }")
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


@pytest.mark.parametrize("version", [2, 4])
def test_the_htmx_examples(page: Page, logged_url: str, start_server: Start, tmp_path: Path, version: int) -> None:
    """Their list is read when the stream opens and at each event, from a view of the page's own."""
    listing = {2: example("htmx2"), 4: example("htmx4")}[version].replace('{% include "rows.html" %}', "<li>old</li>")
    server = start(start_server, logged_url, tmp_path, scripts(version) + listing)
    server.post("/dish/soup")
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#orders > li")).to_have_text(["soup"])
    for number in range(3):
        server.post(f"/dish/tea-{number}")
        server.post("/notify/orders", b'{"event": "created"}')
    expect(page.locator("#orders > li")).to_have_text(["soup", "tea-0", "tea-1", "tea-2"])


def test_htmx_4_makes_dom_events_of_named_events(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    server = start(start_server, database_url, tmp_path, scripts(4) + SWAPPED[4])
    open_page(page, server)
    page.evaluate("document.body.addEventListener('created', (event) => { window.heard = event.detail.data })")
    send(server, "Two soups")
    send(server, "Three cakes", event="created")
    page.wait_for_function("window.heard == '<li>Three cakes</li>'")
    expect(page.locator("ul > li")).to_have_text(["first", "Two soups"])


@pytest.mark.parametrize(("version", "again"), [(2, True), (4, False)])
def test_whether_a_first_request_that_failed_is_tried_again(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, version: int, again: bool
) -> None:
    server = start(start_server, database_url, tmp_path, scripts(version) + SWAPPED[version])
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=503)

    page.route("**/sse?channel=orders", refuse)
    page.clock.install()
    # The time may be put on when htmx has taken note of the failure, which is after its answer is here.
    noted = "['htmx:sseError', 'htmx:error', 'htmx:response:error']"
    page.add_init_script(f"for (const one of {noted}) addEventListener(one, () => setTimeout(() => {{ failed = 1 }}))")
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("window.failed")
    page.clock.run_for(600_000)
    with page.expect_response("**/ping"):
        page.evaluate("fetch('/ping')")
    assert (len(asked) > 1) == again, asked


def test_htmx_4_with_defer_may_start_before_its_extension(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    server = start(start_server, database_url, tmp_path, scripts(4, defer=True) + SWAPPED[4])
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
    server = start(start_server, database_url, tmp_path, scripts(2) + SWAPPED[2])
    open_page(page, server)
    page.evaluate(HIDE, True)
    send(server, "Two soups")
    expect(page.locator("ul > li")).to_have_text(["first", "Two soups"])


@pytest.mark.slow
def test_a_page_comes_back_after_the_server_was_restarted(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    body = example("eventsource").replace("location.reload()", "void 0")
    body += "<script>window.opened = 0; orders.addEventListener('sse-open', () => { opened += 1 })</script>"
    server = start(start_server, database_url, tmp_path, body)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("opened == 1")
    server.stop()
    page.wait_for_function("orders.readyState == EventSource.CONNECTING")
    before = page.evaluate("opened")  # often 1, but the page may have opened its stream again while the server stopped
    start_server(database_url, app="tests.support.apps.pages:app", PAGE=str(tmp_path / "page.html"), port=server.port)
    page.wait_for_function(f"opened > {before}")
    with page.expect_console_message():
        execute(database_url, "NOTIFY orders, 'again'")
