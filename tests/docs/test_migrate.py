"""docs/migrate.md is right: sse_relay_server and our server get the same senders, payloads and pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import Route, expect

from demo.htmx import find_htmx
from tests.support.client import request
from tests.support.django_site import as_django_has_it, django_site, in_django
from tests.support.documents import ROOT, Document
from tests.support.redis import RedisServer
from tests.support.relay import (
    BREAKS,
    Bus,
    Page,
    PostgresBus,
    RedisBus,
    dispatched,
    open_on,
    ours,
    send_with_fence,
    start_both,
)
from tests.support.servers import WebServer, free_port

PAGE = Document("docs/migrate.md")
Start = Callable[..., WebServer]
# As the README of sse_relay_server sends.
NOTIFY = """
import json
from sse_relay_server import notify
payload = {"event": "NEW_NOTIFICATION", "id": 1, "data": json.dumps({"message": "A new notification"})}
notify(channel="Notifications", sse_payload=payload)
"""


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_migrate.py")
    PAGE.assert_links_lead_somewhere()


def payloads(name: str = "payloads") -> list[tuple[str, str, str]]:
    table = PAGE.text.split(f"<!-- table: {name} -->\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(payload.strip("`"), theirs, here.strip("*")) for payload, theirs, here in rows]


def read_by_both(servers: dict[str, WebServer], bus: Bus, rows: list[tuple[str, str, str]]) -> None:
    """Send each payload to both servers, and compare what their pages get with its row."""
    with ExitStack() as pages:
        opened: dict[str, Page] = {}
        for payload, theirs, here in rows:
            opened = opened or {
                whose: pages.enter_context(page) for whose, page in open_on(servers, bus, "/orders").items()
            }
            send_with_fence(bus, "orders", payload)
            got = {whose: dispatched(page) for whose, page in opened.items()}
            assert got == {"theirs": theirs, "ours": here}, payload
            if BREAKS in got.values():
                pages.close()
                opened = {}


@pytest.mark.slow
def test_every_payload_is_read_as_the_table_says(database_url: str, start_server: Start) -> None:
    read_by_both(start_both(start_server, database_url), PostgresBus(database_url), payloads())
    bold = re.findall(r"^\| (.*) \| (.*) \| (\**)(.*?)\3 \|$", PAGE.text, re.MULTILINE)
    assert [row for row in bold if row[0].startswith("`{") and (row[1] != row[3]) != bool(row[2])] == []


@pytest.mark.slow
def test_with_redis_every_payload_is_read_as_the_tables_say(redis_server: RedisServer, start_server: Start) -> None:
    servers = start_both(start_server, "", REDIS_URL=redis_server.url)
    differ = payloads("payloads of Redis")
    breaks = [row for row in payloads() if row[1] == BREAKS]  # one will do: each takes their server seconds
    same = [row for row in payloads() if row not in breaks[1:]]
    read_by_both(servers, RedisBus(redis_server), same + differ)


@pytest.mark.slow
def test_their_notify_reaches_both_servers_over_redis(
    redis_server: RedisServer, start_server: Start, tmp_path: Path
) -> None:
    """With the same environment, in which theirs prefers Redis too."""
    environ = {"REDIS_URL": redis_server.url, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}
    servers = start_both(start_server, environ["DATABASE_URL"], REDIS_URL=redis_server.url)
    pages = open_on(servers, RedisBus(redis_server), "/Notifications")
    subprocess.run([sys.executable, "-c", NOTIFY], cwd=tmp_path, env={**os.environ, **environ}, check=True)
    command = [
        sys.executable,
        "-m",
        "flask_pg_sse.cli.main",
        "notify",
        "Notifications",
        "x",
        "--event",
        "E",
        "--id",
        "7",
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, check=True)
    for page in pages.values():
        events = [page.next() for _ in range(2)]
        assert [(event.event, event.data, event.last_event_id) for event in events] == [
            ("NEW_NOTIFICATION", '{"message": "A new notification"}', "1"),
            ("E", "x", "7"),
        ]
        page.close()


@pytest.mark.slow
def test_their_senders_reach_both_servers(database_url: str, start_server: Start, tmp_path: Path) -> None:
    """Their `notify()`, and the older project's `postgres_notify()` in a Django project with its ORM."""
    servers = start_both(start_server, database_url)
    django_site(tmp_path)
    site = start_server(
        database_url, command=in_django(tmp_path), ready="/",
        DJANGO_DATABASE=json.dumps(as_django_has_it(database_url)), SSE_SERVER_URL="",
    )  # fmt: skip
    pages = open_on(servers, PostgresBus(database_url), "/Notifications")
    environ = {**os.environ, "DATABASE_URL": database_url}
    subprocess.run([sys.executable, "-c", NOTIFY], cwd=tmp_path, env=environ, check=True)
    for form in ({"dish": "tea"}, {"dish": "cake", "fail": "1"}, {"dish": "soup"}):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = urlencode(form).encode()
        with request(site.port, "/older", method="POST", headers=headers, body=body) as response:
            assert response.status == 200, site.log()
    for page in pages.values():
        got = [page.next() for _ in range(3)]
        assert {event.event for event in got} == {"NEW_NOTIFICATION"}
        assert [event.json for event in got] == [{"message": "A new notification"}, {"dish": "tea"}, {"dish": "soup"}]
        assert [event.last_event_id for event in got[:2]] == ["1", "1"]
        page.close()


def test_their_page_with_htmx(page: BrowserPage, database_url: str, start_server: Start, tmp_path: Path) -> None:
    """The page comes from Django, and its stream from our server, which is another origin."""
    scripts = '<link rel=icon href=data:,><script src="/htmx.js"></script><script src="/sse.js"></script>'
    django_site(tmp_path, processor=example("context-processor"), page=f"<!doctype html>{scripts}" + example("htmx"))
    port = free_port()
    server = start_server(database_url, command=ours, ready="/livez", ALLOWED_ORIGINS=f"http://127.0.0.1:{port}")
    site = start_server(
        database_url, command=in_django(tmp_path), ready="/", port=port,
        DJANGO_DATABASE=json.dumps(as_django_has_it(database_url)), SSE_SERVER_URL=f"http://127.0.0.1:{server.port}",
    )  # fmt: skip
    files = find_htmx().parent.parent
    for url, file in (("**/htmx.js", "htmx-2/dist/htmx.min.js"), ("**/sse.js", "htmx-2-sse/dist/sse.min.js")):
        page.route(url, answering((files / file).read_text()))
    with page.expect_response(f"http://127.0.0.1:{server.port}/?channel=Notifications"):
        page.goto(f"http://127.0.0.1:{site.port}/")
    with Page(server.port, "/Notifications") as stream:  # LISTEN is confirmed for both
        assert stream.next().event == "sse-open"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        request(site.port, "/older", method="POST", headers=headers, body=b"dish=soup").close()
        expect(page.locator("[sse-connect]")).to_have_text('{"dish": "soup"}')


def answering(text: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(body=text)
