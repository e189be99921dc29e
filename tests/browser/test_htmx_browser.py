"""docs/htmx.md in a real browser: its recipes with htmx 2 and 4, through a restart behind an nginx that answers 502."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Page, Response, Route, expect

from demo.htmx import find_htmx
from flask_pg_sse import schema_sql
from tests.support.client import eventually, request
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.proxies import Proxies, without_an_answer_of_its_own
from tests.support.servers import WebServer, gunicorn

PAGE = Document("docs/htmx.md")
Start = Callable[..., WebServer]
OPEN_SHOP = Callable[..., "Shop"]
SCRIPTS = {
    2: ("htmx-2/dist/htmx.min.js", "htmx-2-sse/dist/sse.min.js"),
    4: ("htmx-4/dist/htmx.min.js", "htmx-4/dist/ext/hx-sse.min.js"),
}
STREAM = re.compile(r"/sse\?")
RECIPES = ("list", "row", "append")
MORE = """
from flask_pg_sse import disconnect

app.config["SECRET_KEY"] = "x"

@app.get("/ping")
def ping():
    return "pong"

@app.get("/listened")
def listened():
    worker = app.extensions["pg_sse"].runtime._worker
    return worker.engine._listener._listens.listened() if worker and worker._streams else []

@app.post("/disconnect")
def end_streams():
    disconnect(channel="orders")
    return "", 204

with app.app_context():
    db.create_all()
"""


def example(name: str) -> str:
    return PAGE.example(name)


PAGES = {
    (2, "list"): example("htmx2-list"), (4, "list"): example("htmx4-list"),
    (2, "row"): example("htmx2-row"), (4, "row"): example("htmx4-row"),
    (2, "append"): example("htmx2-append"), (4, "append"): example("htmx4-append"),
}  # fmt: skip
ENDS = {2: example("htmx2-end"), 4: example("htmx4-end")}
ANNOUNCE = {
    "list": example("announce-list"), "row": example("announce-row"), "append": example("announce-append"),
}  # fmt: skip


def change_html(version: int) -> str:
    html = example("htmx2-change.html")
    return html if version == 2 else re.sub("<ul .*</ul>\n", lambda _: example("htmx4-created"), html)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("browser/test_htmx_browser.py")
    PAGE.assert_links_lead_somewhere()


class Shop:
    """The page's app with one recipe. `front` serves the pages; `other`, perhaps the same, takes the orders."""

    def __init__(
        self,
        folder: Path,
        url: str,
        start_server: Start,
        version: int,
        recipe: str,
        page: str | None = None,
        *,
        ends: bool = True,
    ) -> None:
        self._folder, self._start_server = folder, start_server
        code = example("app.py")
        assert "postgresql+psycopg://postgres@localhost/shop" in code
        code = code.replace(
            "postgresql+psycopg://postgres@localhost/shop", url.replace("postgresql://", "postgresql+psycopg://")
        )
        (folder / "htmx_shop.py").write_text(f"{code}\n\n{ANNOUNCE[recipe]}{MORE}")
        for name in ("templates", "static"):
            (folder / name).mkdir()
        scripts = "<link rel=icon href=data:,>"
        for source in SCRIPTS[version]:
            file = find_htmx().parent.parent / source
            (folder / "static" / file.name).write_bytes(file.read_bytes())
            scripts += f'<script src="/static/{file.name}"></script>'
        templates = {
            "rows.html": example("rows.html"), "row.html": example("row.html"), "change.html": change_html(version),
            "page.html": f"<!doctype html>{scripts}{page or PAGES[version, recipe]}{ENDS[version] if ends else ''}",
        }  # fmt: skip
        for name, text in templates.items():
            (folder / "templates" / name).write_text(text)
        self.front = self.other = self._start()

    def _start(self, port: int | None = None) -> WebServer:
        return self._start_server(
            "",
            command=lambda port: gunicorn("htmx_shop:app", port, "--pythonpath", str(self._folder)),
            port=port,
        )

    def take_orders_elsewhere(self) -> None:
        self.other = self._start()

    def front_is_back(self) -> None:
        self.front = self._start(self.front.port)

    def wait_for_listen(self) -> None:
        """Wait until PostgreSQL has confirmed LISTEN for the page's stream, whose headers come before that."""
        eventually(lambda: "orders" in self.front.get("/listened"), 30)

    def post(self, path: str, dish: str = "") -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = urlencode({"dish": dish}).encode()
        with request(self.other.port, path, method="POST", headers=headers, body=body) as response:
            assert response.status == 204, response.read()

    def order(self, dish: str) -> None:
        self.post("/orders", dish)


@pytest.fixture
def open_shop(database_url: str, start_server: Start, tmp_path: Path) -> OPEN_SHOP:
    def open_shop(
        version: int, recipe: str, page: str | None = None, *, logged: bool = True, ends: bool = True
    ) -> Shop:
        if logged:
            execute(database_url, schema_sql())
        return Shop(tmp_path, database_url, start_server, version, recipe, page, ends=ends)

    return open_shop


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that takes the certificate of the test's nginx. An error of its script fails the test."""
    context = browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert complaints == []


def shows(page: Page, *dishes: str) -> None:
    expect(page.locator("#orders > li")).to_have_text(list(dishes), timeout=20_000)


def open_page(page: Page, url: str) -> None:
    with page.expect_response(STREAM):
        page.goto(url)


def answered(response: Response, status: int) -> bool:
    return bool(STREAM.search(response.url)) and response.status == status


def restart_behind_nginx(page: Page, shop: Shop, proxies: Proxies) -> list[str]:
    """Return what the page shows after its stream was answered 502, and an order was placed meanwhile."""
    shop.take_orders_elsewhere()
    proxy = proxies.start("nginx", shop.front, without_an_answer_of_its_own)
    open_page(page, f"https://127.0.0.1:{proxy.port}/")
    shop.wait_for_listen()
    for dish in ("soup", "cake"):
        shop.order(dish)
        expect(page.locator("#orders > li", has_text=dish)).to_have_count(1)
    with page.expect_response(lambda response: answered(response, 502), timeout=30_000):
        shop.front.stop()
    shop.order("pie")
    with page.expect_response(lambda response: answered(response, 200), timeout=120_000):
        shop.front_is_back()
    shop.wait_for_listen()
    shop.order("tea")
    expect(page.locator("#orders > li", has_text="tea")).not_to_have_count(0, timeout=20_000)
    return page.locator("#orders > li").all_inner_texts()


ALL = ["soup", "cake", "pie", "tea"]


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_restart_behind_a_proxy_that_answers_502(
    page: Page, open_shop: OPEN_SHOP, proxies: Proxies, version: int, recipe: str
) -> None:
    assert restart_behind_nginx(page, open_shop(version, recipe), proxies) == ALL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cursor", "seen"),
    [("live", ["soup", "cake", "soup", "cake", "pie", "tea"]), ("sse_url('orders')", ["soup", "cake", "tea"])],
    ids=["a position in the URL", "none"],
)
def test_htmx_2_without_a_recipe_shows_rows_twice_or_not_at_all(
    page: Page, open_shop: OPEN_SHOP, proxies: Proxies, cursor: str, seen: list[str]
) -> None:
    """What the page says of htmx 2 alone. When this fails, htmx has learnt it, and the recipes can go."""
    bare = re.sub("<script>.*?</script>", "", PAGES[2, "append"], flags=re.DOTALL).replace("live", cursor)
    assert restart_behind_nginx(page, open_shop(2, "append", bare), proxies) == seen


@pytest.mark.parametrize("version", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("recipe", ["list", pytest.param("row", marks=pytest.mark.slow)])
def test_rows_come_change_and_go(page: Page, open_shop: OPEN_SHOP, version: int, recipe: str) -> None:
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    shop = open_shop(version, recipe)
    shop.order("soup")
    open_page(page, f"http://127.0.0.1:{shop.front.port}/")
    shop.order("cake")
    shop.order("tea")
    shows(page, "soup", "cake", "tea")
    shop.post("/orders/2", "pie")
    shows(page, "soup", "pie", "tea")
    shop.post("/orders/1/delete")
    shows(page, "pie", "tea")
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 4])
def test_a_row_that_is_on_the_page_already_comes_once(page: Page, open_shop: OPEN_SHOP, version: int) -> None:
    """As if each order had been placed between the position and the query."""
    shop = open_shop(version, "row", PAGES[version, "row"].replace("live", "sse_url('orders', cursor=0)"))
    for dish in ("soup", "cake"):
        shop.order(dish)
    shop.post("/orders/1", "pea soup")
    open_page(page, f"http://127.0.0.1:{shop.front.port}/")
    shop.order("tea")
    shows(page, "pea soup", "cake", "tea")


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 4])
def test_without_the_event_log_the_list_is_right_after_a_restart(
    page: Page, open_shop: OPEN_SHOP, proxies: Proxies, version: int
) -> None:
    assert restart_behind_nginx(page, open_shop(version, "list", logged=False), proxies) == ALL


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("failure", ["status", "no answer"])
def test_a_list_that_could_not_be_read_is_read_again(
    page: Page, open_shop: OPEN_SHOP, version: int, failure: str
) -> None:
    shop = open_shop(version, "list")
    with page.expect_response("**/rows"):
        open_page(page, f"http://127.0.0.1:{shop.front.port}/")
    failed: list[str] = []

    def fail(route: Route) -> None:
        failed.append(route.request.url)
        if failure == "status":
            route.fulfill(status=503)
        else:
            route.abort()

    page.route("**/rows", fail, times=2)
    shop.order("soup")
    shows(page, "soup")
    assert len(failed) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("version", "recipe"), [(2, "row"), (4, "list")])
def test_a_stream_that_is_revoked_loads_the_page_again(
    page: Page, open_shop: OPEN_SHOP, version: int, recipe: str
) -> None:
    shop = open_shop(version, recipe)
    open_page(page, f"http://127.0.0.1:{shop.front.port}/")
    shop.order("soup")
    shows(page, "soup")  # so its stream is open: one that is still opening is only checked again
    with page.expect_navigation():
        shop.post("/disconnect")


@pytest.mark.slow
@pytest.mark.parametrize(("version", "recipe"), [(2, "append"), (2, "list"), (4, "row"), (4, "list")])
def test_a_stream_with_a_position_that_is_too_old_loads_the_page_again(
    page: Page, open_shop: OPEN_SHOP, database_url: str, version: int, recipe: str
) -> None:
    """Its stream is opened once at an old position, as after days of sleep. A list needs no script for it."""
    shop = open_shop(version, recipe, ends=recipe != "list")
    shop.order("soup")
    shop.order("cake")
    [(first,)] = execute(database_url, "SELECT min(id) FROM flask_pg_sse.event")
    execute(database_url, "SELECT flask_pg_sse.prune_v1('0 s', 10)")

    def be_old(route: Route) -> None:
        url = re.sub(r"&last_event_id=\d+", "", route.request.url)
        route.continue_(url=f"{url}&last_event_id={first}")

    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    page.route(STREAM, be_old, times=1)
    page.goto(f"http://127.0.0.1:{shop.front.port}/")
    # The list is read at sse-open and at sse-reset. The others are loaded again, and their stream opens again.
    wanted = {"/rows": 2} if recipe == "list" else {"/": 2, "/sse": 2}
    deadline = time.monotonic() + 20
    while not all(asked.count(path) == count for path, count in wanted.items()):
        assert time.monotonic() < deadline, asked
        page.wait_for_timeout(20)
    shop.order("tea")
    shows(page, "soup", "cake", "tea")


@pytest.mark.slow
def test_htmx_4_repeats_a_first_request_that_failed(page: Page, open_shop: OPEN_SHOP) -> None:
    shop = open_shop(4, "row")
    page.route(STREAM, lambda route: route.fulfill(status=503), times=1)
    with page.expect_response(lambda response: answered(response, 200)):
        page.goto(f"http://127.0.0.1:{shop.front.port}/")
    shop.order("soup")
    shows(page, "soup")
