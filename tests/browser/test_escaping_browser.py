"""What a user types is text in every page that the documentation shows, and never a script: README, docs, the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from flask import Flask, render_template
from playwright.sync_api import Browser, Page, expect

from tests.browser.test_demo_browser import Demo
from tests.browser.test_htmx_browser import RECIPES, Shop
from tests.browser.test_htmx_browser import open_page as open_shop
from tests.browser.test_readme_browser import open_page
from tests.docs.test_docs import example as log_example
from tests.docs.test_security_docs import COUNT_OPENINGS, SECURITY
from tests.support.client import request
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.servers import WebServer, gunicorn

Start = Callable[..., WebServer]
README = Document("README.md")
HOSTILE = """<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>"""
PAGES_APP = "tests.support.apps.pages:app"


def example(name: str) -> str:
    return SECURITY.example(name)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in which any image that cannot be loaded is a script of somebody's."""
    context = browser.new_context()
    page = context.new_page()
    yield page
    context.close()


def shows_as_text(page: Page) -> None:
    """Wait for what was typed, as text; its elements would be gone from the text, and its script would have run."""
    expect(page.locator("body")).to_contain_text(HOSTILE, timeout=20_000)
    assert page.locator("img, #orders script").count() == 0
    assert page.evaluate("window.hacked") is None


def post(server: WebServer, path: str, **form: str) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with request(server.port, path, method="POST", headers=headers, body=urlencode(form).encode()) as response:
        assert response.status < 400, response.read()


def serve(start_server: Start, folder: Path, url: str, body: str) -> WebServer:
    (folder / "page.html").write_text(body)
    return start_server(url, app=PAGES_APP, PAGE=str(folder / "page.html"))


SCRIPTS = (
    '<script src="/htmx/htmx-2/dist/htmx.min.js"></script><script src="/htmx/htmx-2-sse/dist/sse.min.js"></script>'
)
# A page that puts each event in as HTML. It trusts every sender.
SWAPS = SCRIPTS + '<ul id="orders" hx-ext="sse" sse-connect="/sse?channel=orders" sse-swap="message"></ul>'


@pytest.mark.slow
def test_without_escaping_htmx_runs_what_was_typed(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    """So a page that shows it as text has done something for it."""
    server = serve(start_server, tmp_path, database_url, SWAPS)
    open_page(page, server)
    execute(database_url, "SELECT pg_notify('orders', json_build_object('dish', %s)::text)", (HOSTILE,))
    page.wait_for_function("window.hacked")


def test_the_text_example(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    server = serve(start_server, tmp_path, database_url, example("text"))
    open_page(page, server)
    data = "json_build_object('event', 'created', 'data', json_build_object('dish', %s)::text)"
    execute(database_url, f"SELECT pg_notify('orders', {data}::text)", (HOSTILE,))
    shows_as_text(page)


@pytest.mark.slow
def test_the_html_example_sends_what_is_text(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    server = serve(start_server, tmp_path, database_url, SWAPS)
    page.add_init_script(COUNT_OPENINGS)
    for number in range(2):
        open_page(page, server)
        page.wait_for_function("opened == 1")  # the server still listens for the stream of the first time
        execute(database_url, "SELECT pg_notify('orders', %s)", (sent_by(example("html"))[number],))
        shows_as_text(page)


def sent_by(code: str) -> list[str]:
    """Return the HTML that the example's announce() sends for a hostile dish."""
    sent: list[str] = []
    names: dict[str, Any] = {
        "notify": lambda channel, html, connection: sent.append(str(html)), "db": SimpleNamespace(session=None),
    }  # fmt: skip
    with Flask("site").app_context():
        exec(code, names)
        names["announce"](SimpleNamespace(dish=HOSTILE))
    return sent


@pytest.mark.slow
def test_the_readmes_html_and_its_pages(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    """An order's HTML as its publishing example has a template make it, in its page for htmx 2."""
    (tmp_path / "order.html").write_text("<li>{{ order.dish }}</li>")
    app = Flask("site", template_folder=str(tmp_path))
    sent: list[Any] = []
    with app.app_context():
        code = README.example("publish").splitlines()[1]
        names = {"notify": lambda channel, data, event: sent.append(data), "render_template": render_template}
        exec(code, {**names, "order": SimpleNamespace(dish=HOSTILE)})
    server = serve(start_server, tmp_path, database_url, SWAPS)
    open_page(page, server)
    execute(database_url, "SELECT pg_notify('orders', %s)", (sent[0],))
    shows_as_text(page)


@pytest.mark.slow
def test_with_the_policy_nothing_runs_that_was_typed(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    """On a page that does not escape at all, and whose own scripts are files."""
    (tmp_path / "page.html").write_text(SWAPS)
    (tmp_path / "with_policy.py").write_text("from tests.support.apps.pages import app\n\n\n" + example("csp"))
    server = start_server(
        database_url,
        command=lambda port: gunicorn("with_policy:app", port, "--pythonpath", str(tmp_path)),
        PAGE=str(tmp_path / "page.html"),
    )
    open_page(page, server)
    with page.expect_event("console", lambda said: "Content Security Policy" in said.text and "inline" in said.text):
        execute(database_url, "SELECT pg_notify('orders', %s)", (HOSTILE,))
        expect(page.locator("#orders img")).to_have_count(1)
    assert page.evaluate("window.hacked") is None


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_for_htmx(
    page: Page, logged_url: str, start_server: Start, tmp_path: Path, version: int, recipe: str
) -> None:
    shop = Shop(tmp_path, logged_url, start_server, version, recipe)
    open_shop(page, f"http://127.0.0.1:{shop.front.port}/")
    shop.order(HOSTILE)
    shows_as_text(page)
    page.reload()
    shows_as_text(page)


@pytest.mark.slow
def test_the_page_of_never_lose_an_event(page: Page, logged_url: str, start_server: Start, tmp_path: Path) -> None:
    url = logged_url.replace("postgresql://", "postgresql+psycopg://")
    code = log_example("app.py").replace("postgresql+psycopg://postgres@localhost/shop", url)
    more = '\nwith app.app_context():\n    db.create_all()\n\n@app.get("/ping")\ndef ping(): return "pong"\n'
    (tmp_path / "docs_app.py").write_text(code + more)
    server = start_server("", command=lambda port: gunicorn("docs_app:app", port, "--pythonpath", str(tmp_path)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    post(server, "/orders", dish=HOSTILE)
    shows_as_text(page)
    page.reload()
    shows_as_text(page)


@pytest.mark.slow
def test_the_page_whose_url_expires(page: Page, database_url: str, start_server: Start, tmp_path: Path) -> None:
    body = example("expired").replace("live_url()", "sse_url('orders')")
    server = serve(start_server, tmp_path, database_url, body)
    open_page(page, server)
    execute(database_url, "SELECT pg_notify('orders', %s)", (HOSTILE,))
    shows_as_text(page)


@pytest.mark.slow
def test_the_demo(browser: Browser, database_url: str, tmp_path: Path) -> None:
    """In a page that ignores the demo's Content-Security-Policy, which would stop the script a second time."""
    demo = Demo(browser, database_url, tmp_path)
    try:
        page = demo.tab(bypass_csp=True)
        name, note = "<img src=x>", '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'
        post(demo.server, "/orders", dish="Fish tacos", name=name, note=note)
        for _ in range(2):
            expect(page.locator(".ticket .note").get_by_text(note, exact=True)).to_have_count(1)
            expect(page.locator(".ticket .customer").get_by_text(name, exact=True)).to_have_count(1)
            expect(page.locator(".ticket img, .ticket script, #log img")).to_have_count(0)
            assert page.evaluate("window.hacked") is None
            page.reload()
    finally:
        demo.close()
