"""docs/deploy.md and the README's nginx: each example runs with the real program in front of a real app."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.client import eventually, open_stream, request
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.proxies import PROGRAMS, Page, Proxies, without_an_answer_of_its_own
from tests.support.publishers import Counting
from tests.support.servers import WebServer

Start = Callable[..., WebServer]
DEPLOY = Document("docs/deploy.md")
example = DEPLOY.example
APP = "tests.support.apps.basic:app"

EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "nginx" else pytest.mark.slow) for name in PROGRAMS]
)


def test_examples_and_links() -> None:
    DEPLOY.assert_every_example_is_run(
        "support/proxies.py", "browser/test_deploy_browser.py", "docs/test_deploy_docs.py", "docs/test_deployment.py"
    )
    DEPLOY.assert_links_lead_somewhere()


@EACH
def test_events_come_as_fast_as_from_the_app(
    database_url: str, start_server: Start, proxies: Proxies, name: str
) -> None:
    """An event is sent when both have the one before: nothing else makes a proxy send one that it holds back."""
    app = start_server(database_url)
    proxy = proxies.start(name, app)
    arrived: dict[str, list[float]] = {"direct": [], "proxied": []}
    with open_stream(app.port, "orders") as direct, open_stream(proxy.port, "orders", tls=proxy.tls) as proxied:
        streams = {"direct": direct, "proxied": proxied}

        def take(way: str) -> None:
            assert streams[way].event().data == str(len(arrived[way]))
            arrived[way].append(time.monotonic())

        for number in range(30):
            execute(database_url, "SELECT pg_notify('orders', %s)", (str(number),))
            other = threading.Thread(target=take, args=["direct"])
            other.start()
            take("proxied")
            other.join()
    behind = [later - earlier for earlier, later in zip(*arrived.values(), strict=True)]
    assert statistics.median(behind) < 0.03, behind


@pytest.mark.slow
@EACH
def test_heartbeats_keep_a_stream_open(database_url: str, start_server: Start, proxies: Proxies, name: str) -> None:
    """The example's timeouts are 60 s; here they are 5 s, and the stream lives longer."""
    app = start_server(database_url, FLASK_SSE_HEARTBEAT="0.5")
    proxy = proxies.start(name, app, lambda example: example.replace("60", "5"))
    begun = time.monotonic()
    with open_stream(proxy.port, "orders", tls=proxy.tls) as stream:
        while time.monotonic() - begun < 8:
            beats = stream.body.count(b":")
            while stream.body.count(b":") == beats:
                stream._read_more()
        execute(database_url, "NOTIFY orders, 'hello'")
        assert stream.event().data == "hello"


@EACH
def test_a_client_that_leaves_is_noticed(database_url: str, start_server: Start, proxies: Proxies, name: str) -> None:
    """At the next heartbeats: some proxies notice only when they cannot send."""
    app = start_server(database_url, FLASK_SSE_HEARTBEAT="0.5")
    proxy = proxies.start(name, app)
    streams = [open_stream(proxy.port, "orders", tls=proxy.tls) for _ in range(5)]
    assert app.get("/held") == "5"
    for stream in streams:
        stream.close()
    eventually(lambda: app.get("/held") == "0", 30)


@pytest.mark.slow
@EACH
def test_a_restart_ends_no_page(logged_url: str, start_server: Start, proxies: Proxies, name: str) -> None:
    """The app is away for three seconds. Every page is back then, and has also what was sent meanwhile."""
    options = {"app": APP, "FLASK_SSE_RETRY": "300"}
    app = start_server(logged_url, **options)
    proxy = proxies.start(name, app, lambda example: example.replace("retry: 3000", "retry: 300"))
    pages = [Page(proxy, "orders") for _ in range(10)]
    for page in pages:
        page.start()
    try:
        eventually(lambda: all(page.opened for page in pages), 30)
        app.terminate()
        app.process.wait(30)
        execute(logged_url, "SELECT flask_pg_sse.notify('orders', 'while it was away')")
        time.sleep(3)
        start_server(logged_url, port=app.port, **options)
        eventually(lambda: all(page.opened > 1 or page.ended_by for page in pages), 30)
        execute(logged_url, "SELECT flask_pg_sse.notify('orders', 'since it is back')")
        eventually(lambda: all(len(page.heard) > 1 or page.ended_by for page in pages), 30)
    finally:
        for page in pages:
            page.leave()
    assert [page.ended_by for page in pages] == [None] * len(pages)
    assert [page.heard for page in pages] == [["while it was away", "since it is back"]] * len(pages)


@pytest.mark.slow
@EACH
def test_other_paths_keep_their_error_status(
    database_url: str, start_server: Start, proxies: Proxies, name: str
) -> None:
    app = start_server(database_url)
    proxy = proxies.start(name, app)
    app.stop()
    with request(proxy.port, "/state", tls=proxy.tls, timeout=20) as response:
        assert response.status in (502, 503, 504)


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False], ids=["max_fails=0", "nginx's own checks"])
def test_a_rolling_restart_of_two_servers(logged_url: str, start_server: Start, proxies: Proxies, safe: bool) -> None:
    """Events go on meanwhile. Each page has all of them in order; with nginx's own checks, some pages are dead.

    Nginx answers 502 here where it has no server: a page that is never told so has not seen one.
    """
    options = {"app": APP, "FLASK_SSE_RETRY": "200"}
    servers = [start_server(logged_url, **options) for _ in range(2)]

    def edit(text: str) -> str:
        upstream = example("nginx-upstream").replace("8001", str(servers[1].port))
        if not safe:  # their default is 10 s, which a busy machine may need to start a server
            upstream = upstream.replace("max_fails=0", "fail_timeout=60s")
        return upstream + without_an_answer_of_its_own(text).replace(
            "proxy_pass http://127.0.0.1:8000", "proxy_pass http://app"
        )

    proxy = proxies.start("nginx", servers[0], edit)
    pages = [Page(proxy, "orders") for _ in range(10)]
    for page in pages:
        page.start()
    with Counting(logged_url, "orders") as publisher:
        eventually(lambda: all(page.heard for page in pages), 30)
        assert all(int(server.get("/held")) for server in servers), "both serve streams"
        for at, server in enumerate(servers):
            server.terminate()
            server.process.wait(30)
            for _ in range(4):  # visitors, of whom nginx sends every other one to the server that is away
                request(proxy.port, "/ping", tls=proxy.tls).close()
            # The pages are on the other one now.
            eventually(lambda: int(servers[1 - at].get("/held")) >= sum(not page.ended_by for page in pages), 30)  # noqa: B023
            servers[at] = start_server(logged_url, port=server.port, **options)
    eventually(lambda: all(page.ended_by or page.heard[-1:] == publisher.sent[-1:] for page in pages), 30)
    for page in pages:
        page.leave()
    if safe:
        assert [page.ended_by for page in pages] == [None] * len(pages)
        assert all(page.heard == publisher.sent[-len(page.heard) :] for page in pages)
    else:
        assert any((page.ended_by or "").startswith("502") for page in pages)
