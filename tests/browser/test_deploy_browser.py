"""Chromium while streams end: EventSource and two clients built on fetch come back, to the app and to nginx."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page

from tests.support.client import open_stream
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.proxies import Proxies
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
APP = "tests.support.apps.pages:app"

# Each client with its defaults, on the channel of its name.
CLIENTS = """
<script type="module" src="/htmx/datastar/dist/bundles/datastar.js"></script>
<script type="module">
  import {fetchEventSource} from "/htmx/fetch-event-source/lib/esm/fetch.js";
  window.source = new EventSource({{ sse_url("EventSource", expires=seconds)|tojson }});
  fetchEventSource({{ sse_url("fetchEventSource", expires=seconds)|tojson }}, {});
</script>
<div data-on-load="@get('{{ sse_url("Datastar", expires=seconds)|forceescape }}')"></div>
"""
NAMES = ("EventSource", "fetchEventSource", "Datastar")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that takes the certificate of the test's nginx."""
    context = browser.new_context(ignore_https_errors=True)
    yield context.new_page()
    context.close()


def wait_for(page: Page, condition: Callable[[], bool], timeout: float = 40) -> None:
    """Let the page go on until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def asked(page: Page) -> Counter[str]:
    """Return the streams that are asked for from now on, by channel."""
    counted: Counter[str] = Counter()

    def count(url: str) -> None:
        parts = urlsplit(url)
        if parts.path.startswith("/sse"):
            counted[parse_qs(parts.query)["channel"][0]] += 1

    page.on("request", lambda request: count(request.url))
    return counted


@pytest.mark.parametrize("behind", ["", pytest.param("nginx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("max_age", {"FLASK_SSE_MAX_AGE": "0.5"}),
        pytest.param("expired", {}, marks=pytest.mark.slow),
        pytest.param("capacity", {"FLASK_SSE_MAX_STREAMS": "1"}, marks=pytest.mark.slow),
        pytest.param("shutdown", {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_client_comes_back_after_a_planned_end(
    page: Page,
    database_url: str,
    start_server: Start,
    proxies: Proxies,
    tmp_path: Path,
    reason: str,
    settings: dict[str, str],
    behind: str,
) -> None:
    """By the third time each has met the end of an open stream and, where there is one, a refusal."""
    seconds = "1" if reason == "expired" else "600"
    (tmp_path / "page.html").write_text("{% set seconds = " + seconds + " %}" + CLIENTS)
    retry = "1000" if reason == "shutdown" else "100"  # Datastar gives up after ten attempts on a server that is away
    env = {"app": APP, "PAGE": str(tmp_path / "page.html"), "FLASK_SECRET_KEY": "x", "FLASK_SSE_RETRY": retry}
    server = start_server(database_url, **env, **settings)
    site = proxies.start(behind, server) if behind else server
    holder = open_stream(server.port, "other") if reason == "capacity" else None
    counted = asked(page)
    page.goto(f"http{'s' if site.tls else ''}://127.0.0.1:{site.port}/")
    for times in (2, 3):
        if reason == "shutdown":
            wait_for(page, lambda server=server: server.get("/held") == "3")  # type: ignore[misc]
            server.terminate()
            server.process.wait(30)
            server = start_server(database_url, **env, port=server.port)
        wait_for(page, lambda times=times: all(counted[name] >= times for name in NAMES))  # type: ignore[misc]
    if holder is not None:
        holder.close()
    protocol = page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol")
    assert protocol == ("h2" if behind else "http/1.1")
    assert "Traceback" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize("other_site", [False, True], ids=["", "from another site"])
def test_a_restart_behind_nginx_ends_no_page(
    page: Page, logged_url: str, start_server: Start, proxies: Proxies, tmp_path: Path, other_site: bool
) -> None:
    """Twenty pages, over HTTP/2. The app is away for three seconds, and what is sent meanwhile reaches all of them."""
    (tmp_path / "page.html").write_text("")
    env = {"app": APP, "PAGE": str(tmp_path / "page.html"), "FLASK_SSE_RETRY": "300"}
    pages = start_server(logged_url, **env)
    cors = Document("docs/deploy.md").example("nginx-cors") if other_site else ""
    server = start_server(logged_url, **env, FLASK_SSE_ALLOWED_ORIGINS=f"http://127.0.0.1:{pages.port}")

    def edit(example: str) -> str:
        return example.replace("retry: 3000", "retry: 300").replace("types {}", f"{cors}types {{}}")

    proxy = proxies.start("nginx", server, edit)
    streams = f"https://127.0.0.1:{proxy.port}"
    page.goto(f"http://127.0.0.1:{pages.port}/" if other_site else f"{streams}/")
    page.evaluate(
        """([url, withCredentials]) => {
          window.heard = [];
          window.opened = 0;
          window.sources = Array.from({length: 20}, () => {
            const source = new EventSource(url, {withCredentials});
            source.onmessage = (event) => window.heard.push(event.data);
            source.addEventListener("sse-open", () => { window.opened += 1; });
            return source;
          });
        }""",
        [f"{streams}/sse?channel=orders", other_site],
    )
    wait_for(page, lambda: page.evaluate("window.opened") == 20)
    server.terminate()
    server.process.wait(30)
    execute(logged_url, "SELECT flask_pg_sse.notify('orders', 'meanwhile')")
    page.wait_for_timeout(3000)
    start_server(logged_url, **env, FLASK_SSE_ALLOWED_ORIGINS=f"http://127.0.0.1:{pages.port}", port=server.port)
    states = "window.sources.filter((source) => source.readyState == EventSource.CLOSED).length"
    wait_for(page, lambda: page.evaluate(f"window.heard.length + {states}") >= 20)
    assert page.evaluate(states) == 0
    assert page.evaluate("window.heard") == ["meanwhile"] * 20
