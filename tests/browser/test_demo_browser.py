"""The demo in a real browser: two tabs, the light, the keyboard, hostile names, phones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect

from tests.support.client import request
from tests.support.link import Link, through
from tests.support.postgres import execute
from tests.support.proxies import Proxies, without_an_answer_of_its_own
from tests.support.servers import WebServer, free_port, gunicorn


class AnotherHost:
    def __init__(self, port: int) -> None:
        self._port = port

    def order(self, name: str) -> None:
        body = urlencode({"dish": "Fish tacos", "name": name}).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        with request(self._port, "/orders", method="POST", headers=headers, body=body) as response:
            assert response.status == 303


class Demo:
    """The demo under gunicorn with two gevent workers, and what its pages have complained about."""

    def __init__(self, browser: Browser, database_url: str, folder: Path) -> None:
        self.browser = browser
        self.database_url = database_url
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.complaints: list[str] = []
        self._folder = folder
        self._contexts: list[Any] = []
        self.start()

    def start(self) -> None:
        command = gunicorn("demo.app:app", self.port, "-w", "2")
        log = self._folder / "demo.log"
        self.server = WebServer(command, self.port, log, {"DATABASE_URL": self.database_url}, ready="/")
        self.server.wait_ready()

    def tab(self, width: int = 1280, height: int = 800, *, url: str | None = None, **options: Any) -> Page:
        """Open the demo in a window of its own, and wait until it is live."""
        page = self.window(width, height, **options)
        page.goto(url or self.url)
        expect(light(page)).to_have_text("Live")
        return page

    def window(self, width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._request)
        return page

    @contextmanager
    def another_host(self) -> Iterator[AnotherHost]:
        """The same app and database, on another port."""
        port = free_port()
        command = gunicorn("demo.app:app", port)
        server = WebServer(command, port, self._folder / "other.log", {"DATABASE_URL": self.database_url}, ready="/")
        try:
            server.wait_ready()
            yield AnotherHost(port)
        finally:
            server.kill()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).hostname != "127.0.0.1":
            self.complaints.append(f"a request to {request.url}")

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self.server.kill()


@pytest.fixture
def demo(browser: Browser, database_url: str, tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(browser, database_url, tmp_path)
    yield demo
    demo.close()


def light(page: Page) -> Any:
    return page.locator("#stream")


def place(page: Page, name: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Send to the kitchen").click()


def ticket(page: Page, step: str, text: str) -> Any:
    return page.locator(f"#{step} .ticket", has_text=text)


def wait_for_cards_to_rest(page: Page) -> None:
    """Wait until no card glides any more: nobody clicks on one before."""
    page.evaluate(
        "Promise.allSettled(board.getAnimations({subtree: true}).map((glide) => glide.finished)).then(() => {})"
    )


def count_loads(page: Page) -> Callable[[], int]:
    """Count how often the page or its board is loaded from now on."""
    loads: list[Request] = []

    def look(request: Request) -> None:
        if request.is_navigation_request() or request.url.endswith("/board"):
            loads.append(request)

    page.on("request", look)
    return lambda: len(loads)


def test_an_order_appears_and_moves_in_every_tab(demo: Demo) -> None:
    one, other = demo.tab(), demo.tab(375, 812)
    loads = count_loads(other)
    place(one, "Grace")
    expect(ticket(other, "new", "Grace")).to_have_count(1)
    expect(other.locator("#log li").first).to_contain_text("Grace")
    for button, before, step in (
        ("Start cooking", "new", "cooking"),
        ("ready", "cooking", "ready"),
        ("Collected", "ready", "collected"),
    ):
        wait_for_cards_to_rest(other)
        with other.expect_response("**/move") as answer:  # a click that went astray is told from an event that did
            ticket(other, before, "Grace").get_by_role("button", name=button).click()
        assert answer.value.status == 200
        for page in (one, other):
            expect(ticket(page, step, "Grace")).to_have_count(1)
            expect(page.locator(".ticket", has_text="Grace")).to_have_count(1)
    expect(one.locator(".column.collected [data-count]")).to_have_text("1")
    assert loads() == 0
    assert demo.complaints == []


def has_lines(page: Page, *names: str) -> None:
    """Wait until the log of the wire has these orders by name, oldest first. A card may come earlier, as an answer."""
    lines = [re.compile(f" for {name}$") for name in reversed(names)]
    expect(page.locator("#log li:not(.say) span")).to_have_text(lines)


@pytest.mark.slow
def test_the_light_tells_of_a_server_that_is_away_and_nothing_is_missing_when_it_returns(demo: Demo) -> None:
    page = demo.tab()
    loads = count_loads(page)
    demo.server.stop()
    expect(light(page)).to_have_text("Reconnecting…")
    expect(light(page)).to_have_attribute("data-state", "reconnecting")
    # Meanwhile the kitchen goes on, served by another host.
    with demo.another_host() as elsewhere:
        for name in ("Grace", "Katherine"):
            elsewhere.order(name)
    demo.start()
    expect(light(page)).to_have_text("Live")
    expect(ticket(page, "new", "Katherine")).to_have_count(1)
    has_lines(page, "Grace", "Katherine")
    assert loads() == 0, "by the stream, and not by fetching the board"


@pytest.mark.slow
def test_a_proxy_that_answers_502_while_the_server_is_away_doubles_nothing(demo: Demo, proxies: Proxies) -> None:
    proxy = proxies.start("nginx", demo.server, without_an_answer_of_its_own, ready="/")
    page = demo.tab(url=f"https://127.0.0.1:{proxy.port}", ignore_https_errors=True)
    loads = count_loads(page)
    place(page, "Ada")
    expect(ticket(page, "new", "Ada")).to_have_count(1)
    with page.expect_response(lambda response: "/sse" in response.url and response.status == 502, timeout=30_000):
        demo.server.stop()
    with demo.another_host() as elsewhere:
        elsewhere.order("Grace")
    demo.start()
    expect(light(page)).to_have_text("Live")
    place(page, "Mary")
    expect(ticket(page, "new", "Mary")).to_have_count(1)
    has_lines(page, "Ada", "Grace", "Mary")
    assert loads() == 0


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.mark.slow
def test_a_hidden_tab_has_missed_nothing_when_it_is_shown_again(demo: Demo) -> None:
    """htmx 4 closes the stream of a hidden tab, and comes back with the id of the last event."""
    page, other = demo.tab(), demo.tab()
    lines = page.locator("#log li:not(.say)")  # the newest first
    loads = count_loads(page)
    place(other, "Before")
    expect(ticket(page, "new", "Before")).to_have_count(1)
    for round in range(3):
        page.evaluate(HIDE, True)
        for name in (f"Grace {round}", f"Katherine {round}"):
            place(other, name)
            expect(ticket(other, "new", name)).to_have_count(1)
        expect(ticket(page, "new", f"Grace {round}")).to_have_count(0)
        page.evaluate(HIDE, False)
        expect(ticket(page, "new", f"Katherine {round}")).to_have_count(1)
        for at, name in enumerate(("Katherine", "Grace")):
            expect(lines.nth(at)).to_contain_text(f"{name} {round}")
    expect(light(page)).to_have_text("Live")
    expect(lines.filter(has_text="Before")).to_have_count(0)  # six lines are kept
    assert loads() == 0
    assert demo.complaints == []


@pytest.mark.slow
def test_the_light_tells_of_a_database_that_is_away(demo: Demo, tmp_path: Path) -> None:
    port = free_port()
    with Link(urlsplit(demo.database_url).port or 0) as line:
        env = {"DATABASE_URL": through(line, demo.database_url)}
        server = WebServer(gunicorn("demo.app:app", port), port, tmp_path / "cut-off.log", env, ready="/")
        try:
            server.wait_ready()
            page = demo.tab(url=f"http://127.0.0.1:{port}")
            loads = count_loads(page)
            line.cut()
            expect(light(page)).to_have_text("Database away…")
            with demo.another_host() as elsewhere:
                elsewhere.order("Grace")
            line.restore()
            expect(light(page)).to_have_text("Live")
            # It is live when it has what it missed: of the log's lines, the newest is the first.
            expect(page.locator("#log li").nth(1)).to_contain_text("Grace")
            expect(ticket(page, "new", "Grace")).to_have_count(1)
            assert loads() == 0
        finally:
            server.kill()


@pytest.mark.slow
def test_a_network_that_was_cut_and_restored_has_cost_nothing(demo: Demo) -> None:
    with Link(demo.port) as link:
        page, other = demo.tab(url=f"http://127.0.0.1:{link.port}"), demo.tab()
        loads = count_loads(page)
        place(other, "Before")
        expect(ticket(page, "new", "Before")).to_have_count(1)
        link.cut()
        expect(light(page)).to_have_text("Reconnecting…")
        for name in ("Grace", "Katherine", "Mary"):
            place(other, name)
            expect(ticket(other, "new", name)).to_have_count(1)
        link.restore()
        expect(ticket(page, "new", "Mary")).to_have_count(1)
        expect(light(page)).to_have_text("Live")
        has_lines(page, "Before", "Grace", "Katherine", "Mary")
        assert loads() == 0


@pytest.mark.slow
def test_an_order_placed_between_the_page_and_its_stream_arrives(demo: Demo) -> None:
    """The page is held up after its board was read, and before its stream opens."""
    other = demo.tab()

    def late(route: Route) -> None:
        answer = route.fetch()
        place(other, "Grace")
        expect(ticket(other, "new", "Grace")).to_have_count(1)
        assert "Grace" not in answer.text()
        route.fulfill(response=answer)

    page = demo.window()
    page.route(demo.url + "/", late)
    page.goto(demo.url)
    expect(ticket(page, "new", "Grace")).to_have_count(1)
    assert demo.complaints == []


@pytest.mark.slow
def test_an_older_card_or_board_never_overwrites_a_newer(demo: Demo) -> None:
    page = demo.tab()
    held: list[Any] = []
    page.route("**/board", lambda route: held.append((route, route.fetch())))
    page.evaluate("htmx.trigger(document, 'stale')")
    while not held:  # the board has been read when its answer is here, not when it is asked for
        page.wait_for_timeout(20)
    other = demo.tab()
    place(other, "Grace")
    ticket(other, "new", "Linus").get_by_role("button").click()
    expect(ticket(page, "new", "Grace")).to_have_count(1)
    expect(ticket(page, "cooking", "Linus")).to_have_count(1)
    with page.expect_response("**/board"):
        route, answer = held.pop()
        assert "Grace" not in answer.text()
        route.fulfill(response=answer)
    page.wait_for_function("document.querySelector('.columns').dataset.version === '3'")
    expect(ticket(page, "new", "Grace")).to_have_count(1)
    expect(ticket(page, "cooking", "Linus")).to_have_count(1)
    expect(page.locator(".ticket")).to_have_count(4)
    assert demo.complaints == []


def test_the_keyboard_alone_places_and_moves_an_order(demo: Demo) -> None:
    page = demo.tab()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("[name=dish]")
    page.keyboard.press("ArrowDown")
    tab_to("#quantity")
    page.keyboard.press("ArrowUp")
    tab_to("#customer")
    page.keyboard.type("Grace")
    tab_to("#place")
    page.keyboard.press("Enter")
    expect(ticket(page, "new", "2\N{MULTIPLICATION SIGN} Mushroom ramen")).to_contain_text("Grace")
    tab_to("#next-4")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"
    for step in ("cooking", "ready", "collected"):
        page.keyboard.press("Enter")
        expect(ticket(page, step, "Grace")).to_have_count(1)
        expect(page.locator("#order-4" if step == "collected" else "#next-4")).to_be_focused()
    assert demo.complaints == []


@pytest.mark.slow
def test_the_focus_stays_on_a_card_that_somebody_else_moves(demo: Demo) -> None:
    page, other = demo.tab(), demo.tab()
    page.locator("#next-3").focus()
    other.locator("#next-3").click()
    expect(ticket(page, "cooking", "Linus")).to_have_count(1)
    expect(page.locator("#next-3")).to_be_focused()


@pytest.mark.slow
def test_hostile_names_are_text(demo: Demo) -> None:
    page, other = demo.tab(), demo.tab()
    for name in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<hx-partial hx-target=main>"):
        place(page, name)
        expect(ticket(other, "new", name)).to_have_count(1)
        expect(other.locator("#log li").first).to_contain_text(name)
    other.reload()
    expect(light(other)).to_have_text("Live")
    expect(ticket(other, "new", "<script>alert(1)</script>")).to_have_count(1)
    assert demo.complaints == [], "nothing ran, and the content security policy had nothing to stop"


def test_a_refusal_is_said_on_the_page_and_the_board_is_fetched(demo: Demo) -> None:
    page = demo.tab()
    execute(demo.database_url, "UPDATE demo_order SET status = 'ready' WHERE id = 3")  # behind everybody's back
    page.locator("#next-3").click()
    expect(page.get_by_role("alert")).to_have_text("Order 3 is ready now.")
    expect(ticket(page, "ready", "Linus")).to_have_count(1)


@pytest.mark.slow
def test_it_works_without_javascript(demo: Demo, browser: Browser) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(demo.url)
        place(page, "Grace")
        expect(ticket(page, "new", "Grace")).to_have_count(1)
        ticket(page, "new", "Grace").get_by_role("button").click()
        expect(ticket(page, "cooking", "Grace")).to_have_count(1)


@pytest.mark.slow
def test_nothing_is_wider_than_the_screen(demo: Demo) -> None:
    page = demo.tab()
    place(page, "W" * 30)
    expect(ticket(page, "new", "W" * 30)).to_have_count(1)
    wait_for_cards_to_rest(page)
    for width in (320, 375, 768, 1280, 2000):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.set_viewport_size({"width": 375, "height": 812})
    small = page.evaluate("""() => [...document.querySelectorAll("button, .menu label, .field > input")]
        .filter(e => e.getBoundingClientRect().height < 43.5).map(e => e.outerHTML)""")
    assert small == [], "a finger hits everything"


@pytest.mark.slow
def test_every_text_stands_out_from_its_ground(demo: Demo) -> None:
    page = demo.tab()
    assert [weak_colours(page, scheme) for scheme in ("light", "dark")] == [[], []]


def weak_colours(page: Page, scheme: Any) -> list[tuple[str, str]]:
    page.emulate_media(color_scheme=scheme)
    pairs = page.evaluate("""() => {
        const colour = (name) => {
            const probe = document.createElement("i");
            document.body.append(probe);
            probe.style.color = `var(${name})`;
            const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
            probe.remove();
            return found;
        };
        const texts = { "--paper": ["--ink", "--soft", "--new", "--cooking", "--ready", "--collected"],
            "--panel": ["--ink", "--soft", "--new", "--cooking", "--ready", "--collected"],
            "--wall": ["--ink", "--soft"], "--steel": ["--steel-ink"], "--accent": ["--on-accent"] };
        return Object.entries(texts).flatMap(([ground, inks]) =>
            inks.map((ink) => [ink, ground, colour(ink), colour(ground)]));
    }""")
    return [(ink, ground) for ink, ground, one, other in pairs if contrast(one, other) < 4.5]


@pytest.mark.slow
def test_who_wants_no_motion_sees_none(demo: Demo) -> None:
    page = demo.tab(reduced_motion="reduce")
    page.evaluate("""() => {
        window.animated = 0;
        const animate = Element.prototype.animate;
        Element.prototype.animate = function (...how) { window.animated++; return animate.apply(this, how); };
    }""")
    page.locator("#next-3").click()
    expect(ticket(page, "cooking", "Linus")).to_have_count(1)
    assert page.evaluate("[window.animated, document.getAnimations().length]") == [0, 0]
    page.emulate_media(reduced_motion="no-preference")
    page.locator("#next-3").click()
    expect(ticket(page, "ready", "Linus")).to_have_count(1)
    page.wait_for_function("window.animated > 0")


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(rgb: list[float]) -> float:
        r, g, b = ((c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
