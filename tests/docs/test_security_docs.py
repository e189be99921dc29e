"""docs/security.md is right: its examples run (those for a browser in one), and the tests that it names exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from flask_pg_sse import schema_sql
from tests.support.client import request
from tests.support.documents import Document
from tests.support.postgres import execute
from tests.support.servers import WebServer, gunicorn

Start = Callable[..., WebServer]
SECURITY = Document("docs/security.md")


def test_examples_and_links() -> None:
    SECURITY.assert_every_example_is_run(
        "docs/test_security_docs.py",
        "engine/postgres/test_credentials.py",
        "engine/postgres/test_roles.py",
        "engine/postgres/test_trust.py",
        "browser/test_escaping_browser.py",
    )
    SECURITY.assert_links_lead_somewhere()


def test_every_reason_of_an_end_is_in_the_readme() -> None:
    package = Path(__file__).resolve().parents[2] / "flask_pg_sse"
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    reasons = {"shutdown", "max_age", "expired", "revoked", "behind", "capacity", "unavailable"}
    assert all(f'"{reason}"' in code for reason in reasons)
    [row] = [line for line in Document("README.md").text.split("\n") if line.startswith("| `sse-end`")]
    assert set(re.findall(r'"([a-z_]+)"', row)) - {"reason"} == reasons


APP = """
from flask import Flask, render_template_string
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user, logout_user
from flask_pg_sse import notify, sse_bp, sse_url

app = Flask(__name__)
app.config["SECRET_KEY"] = "x"
app.config.from_prefixed_env()
app.register_blueprint(sse_bp)

class User(UserMixin):
    id = "7"

@(LoginManager(app)).user_loader
def load(id):
    return User()

@app.get("/ping")
def ping():
    return "pong"

@app.get("/")
def page():
    login_user(User())
    return render_template_string("<!doctype html><link rel=icon href=data:,><body>" + PAGE)

@app.post("/logout")
def logout():
    logout_user()
    return ""

@app.post("/notify/<data>")
def send(data):
    notify("orders", data)
    return ""
"""


COUNT_OPENINGS = """
window.opened = 0
window.EventSource = class extends EventSource {
  constructor(url) {
    super(url)
    this.addEventListener("sse-open", () => { opened += 1 })
  }
}
"""


def start(start_server: Start, tmp_path: Path, name: str, code: str, database_url: str, **env: str) -> WebServer:
    (tmp_path / f"{name}.py").write_text(code)
    return start_server(
        database_url,
        command=lambda port: gunicorn(f"{name}:app", port, "--pythonpath", str(tmp_path)),
        **env,
    )


@pytest.mark.slow
def test_a_page_fetches_another_url_when_its_own_has_expired(
    page: Page, database_url: str, start_server: Start, tmp_path: Path
) -> None:
    """It does so every time and misses no event in between, until its user logs out."""
    execute(database_url, schema_sql())
    code = APP + SECURITY.example("live-url").replace("expires=300", "expires=1.5")
    code += "\nPAGE = " + repr(SECURITY.example("expired"))
    server = start(start_server, tmp_path, "expiring", code, database_url)
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/sse?" in request.url else None)
    page.add_init_script(COUNT_OPENINGS)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("opened >= 1")  # its URL has no position: what was sent before is none of its business
    sent: list[str] = []
    while len(streams) < 4:
        sent.append(str(len(sent)))
        server.post(f"/notify/{sent[-1]}")
        page.wait_for_timeout(100)
    expect(page.locator("#orders")).to_have_text("".join(sent))
    assert len(set(streams)) == len(streams), "each time with another URL"
    assert all("&token=" in url for url in streams) and all("last_event_id=" in url for url in streams[1:])
    with page.expect_navigation():
        page.evaluate("fetch('/logout', {method: 'POST'})")


WITH_LOGOUT = """
import os
from flask import Flask, redirect, render_template_string, url_for
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user, logout_user
from flask_pg_sse import disconnect, sse_bp

app = Flask(__name__)
app.config["SECRET_KEY"] = "x"
app.config.from_prefixed_env()
app.register_blueprint(
    sse_bp, authorize=lambda channel: current_user.is_authenticated, subject=lambda: current_user.get_id()
)

class User(UserMixin):
    id = "7"

manager = LoginManager(app)
manager.login_view = "login"

@manager.user_loader
def load(id):
    return User()

@app.get("/ping")
def ping():
    return "pong"

@app.get("/login")
def login():
    return "<!doctype html><link rel=icon href=data:,><h1>Log in</h1>"

@app.get("/enter")
def enter():
    login_user(User())
    return redirect("/")

@app.get("/")
@login_required
def page():
    return "<!doctype html><link rel=icon href=data:,><h1>Orders</h1>" + PAGE
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["revoked", "403"])
def test_every_tab_of_a_user_who_logs_out_is_at_the_login_page(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, how: str
) -> None:
    code = WITH_LOGOUT + SECURITY.example("logout") + "\nPAGE = " + repr(SECURITY.example("revoked"))
    env = {"FLASK_SSE_MAX_AGE": "2", "FLASK_SSE_RETRY": "200"} if how == "403" else {}
    server = start(start_server, tmp_path, "with_logout", code, database_url, **env)
    site = f"http://127.0.0.1:{server.port}"
    for _ in range(3):
        with page.expect_response("**/sse?*"):
            page.goto(f"{site}/enter")
        page.wait_for_function("wasOpen")
        if how == "403":
            page.context.clear_cookies()
        else:
            page.context.request.post(f"{site}/logout")  # in another tab, with the same cookies
        expect(page.get_by_role("heading")).to_have_text("Log in")


def test_streams_on_a_server_of_their_own(database_url: str, start_server: Start, tmp_path: Path) -> None:
    """The example has the key and the database, but no sessions."""
    env = {"FLASK_SSE_SECRET_KEY": "shared", "FLASK_SSE_DATABASE_URL": database_url}
    code = SECURITY.example("relay") + '\n@app.get("/ping")\ndef ping(): return "pong"\n'
    relay = start(start_server, tmp_path, "relay", code, "", **env)
    here = {"FLASK_SSE_SECRET_KEY": "shared", "FLASK_SSE_SERVER_URL": f"http://127.0.0.1:{relay.port}/sse"}
    code = APP + SECURITY.example("live-url") + '\nPAGE = "{{ live_url() }}"\n'
    app = start(start_server, tmp_path, "app_beside", code, database_url, **here)
    url = app.get("/").partition("<body>")[2].replace("&amp;", "&")
    assert url.startswith(f"http://127.0.0.1:{relay.port}/sse/?channel=orders&token=")
    path = url.removeprefix(f"http://127.0.0.1:{relay.port}")
    with request(relay.port, path) as stream:
        assert stream.next().event == "sse-open"
        app.post("/notify/hello")
        assert stream.event().data == "hello"
    with request(relay.port, "/sse?channel=orders") as refused:
        assert refused.status == 403
