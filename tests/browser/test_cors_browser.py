"""Pages of two other sites in a real browser: the listed one hears, with its users' cookies; the other does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.support.client import eventually
from tests.support.servers import WebServer, free_port, gunicorn

Start = Callable[..., WebServer]

APP = """
from flask import Flask, session
from flask_cors import CORS
from flask_pg_sse import notify, sse_bp

app = Flask(__name__)
app.config.update(SECRET_KEY="x", SSE_CHANNELS=["news"])
app.config.from_prefixed_env()
if app.config.get("WILD"):
    CORS(app, origins=".*", supports_credentials=True)
app.register_blueprint(sse_bp, authorize=lambda channel: channel == f"user-{session.get('user')}")

@app.get("/ping")
def ping():
    return "pong"

@app.get("/")
def page():
    return "<!doctype html><link rel=icon href=data:,>"

@app.get("/login")
def login():
    session["user"] = 7
    return page()

@app.post("/notify/<channel>")
def send(channel):
    notify(channel, "hello")
    return ""
"""

# Resolves with the reason where the browser gives up, which it does without showing why.
LISTEN = """([url, withCredentials]) => new Promise((resolve) => {
  const source = new EventSource(url, {withCredentials});
  source.onmessage = (event) => { source.close(); resolve(event.data); };
  source.onerror = () => { if (source.readyState == EventSource.CLOSED) resolve("refused"); };
})"""

# As a client that writes its own EventSource: a header that is none of the harmless ones asks leave before (preflight).
FETCH = """([url, credentials]) => fetch(url, {credentials, headers: {"Last-Event-ID": "x"}}).then(
  async (response) => new TextDecoder().decode((await response.body.getReader().read()).value).split("\\n")[0],
  () => "refused",
)"""


class Sites:
    """Three origins of one server: the streams' own, and two whose pages open streams there."""

    def __init__(self, start_server: Start, tmp_path: Path, database_url: str, allowed: str | None, wild: bool) -> None:
        self.listed, self.other = (f"http://127.0.0.1:{port}" for port in (free_port(), free_port()))
        (tmp_path / "other_sites.py").write_text(APP)
        env = {"FLASK_WILD": "1"} if wild else {}
        binds = [word for origin in (self.listed, self.other) for word in ("-b", origin.removeprefix("http://"))]
        self.server = start_server(
            database_url,
            command=lambda port: gunicorn("other_sites:app", port, "--pythonpath", str(tmp_path), *binds),
            FLASK_SSE_ALLOWED_ORIGINS=allowed or self.listed,
            **env,
        )
        self.streams = f"http://127.0.0.1:{self.server.port}/sse?channel="

    def hears(self, page: Page, origin: str, channel: str, credentials: bool) -> bool:
        """Tell whether a page of `origin` gets an event of the channel."""
        page.goto(f"{origin}/")
        # Without waiting for the promise: the event that resolves it is still to be sent.
        listen = f"([args]) => {{ window.heard = null; ({LISTEN})(args).then((said) => {{ window.heard = said }}); }}"
        page.evaluate(listen, [[f"{self.streams}{channel}", credentials]])

        def said() -> Any:
            self.server.post(f"/notify/{channel}")
            return page.evaluate("window.heard")

        answer = eventually(said, 30)
        assert answer in ("hello", "refused")
        return bool(answer == "hello")

    def fetches(self, page: Page, origin: str, channel: str, credentials: str) -> str:
        page.goto(f"{origin}/")
        return str(page.evaluate(FETCH, [f"{self.streams}{channel}", credentials]))


@pytest.mark.parametrize("wild", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "the app's own CORS"])
def test_the_listed_site_hears_and_the_other_does_not(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, wild: bool
) -> None:
    sites = Sites(start_server, tmp_path, database_url, None, wild)
    for credentials in (False, True):
        assert sites.hears(page, sites.listed, "news", credentials)
        assert not sites.hears(page, sites.other, "news", credentials)
    # A channel that only the cookie opens. The login counts on pages of every site.
    assert not sites.hears(page, sites.listed, "user-7", True)
    page.goto(f"http://127.0.0.1:{sites.server.port}/login")
    assert sites.hears(page, sites.listed, "user-7", True)
    assert not sites.hears(page, sites.listed, "user-7", False), "without credentials there is no cookie"
    assert not sites.hears(page, sites.listed, "user-8", True)
    assert not sites.hears(page, sites.other, "user-7", True)
    # And by fetch(), with a preflight.
    assert sites.fetches(page, sites.listed, "user-7", "include") == "retry: 3000"
    assert sites.fetches(page, sites.listed, "user-7", "omit").startswith("Channel 'user-7' is not open to you")
    assert sites.fetches(page, sites.other, "user-7", "include") == "refused"
    assert sites.fetches(page, sites.other, "news", "omit") == "refused"


@pytest.mark.parametrize("wild", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "the app's own CORS"])
def test_the_asterisk_lets_all_hear_what_needs_no_cookie(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, wild: bool
) -> None:
    sites = Sites(start_server, tmp_path, database_url, "*", wild)
    page.goto(f"http://127.0.0.1:{sites.server.port}/login")
    for origin in (sites.listed, sites.other):
        assert sites.hears(page, origin, "news", False)
        assert not sites.hears(page, origin, "news", True)
        assert not sites.hears(page, origin, "user-7", True)
        assert sites.fetches(page, origin, "news", "omit") == "retry: 3000"
        assert sites.fetches(page, origin, "news", "include") == "refused"
