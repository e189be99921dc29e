"""A page of another site in a real browser: it holds none of the user's places, and learns nothing by trying."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.support.client import eventually
from tests.support.servers import WebServer, gunicorn

Start = Callable[..., WebServer]

# `localhost` and `127.0.0.1` are two sites, and both count as secure, as a cookie for all sites requires.
APP = """
from flask import Flask, jsonify, session
from flask_pg_sse import sse_bp

app = Flask(__name__)
app.config.update(SECRET_KEY="x", SESSION_COOKIE_SAMESITE="None", SESSION_COOKIE_SECURE=True)
app.config.from_prefixed_env()
asked = []

def may_listen(channel):
    asked.append(channel)
    return channel == f"user-{session.get('user')}"

app.register_blueprint(sse_bp, authorize=may_listen, subject=lambda: session.get("user"))

@app.get("/")
def page():
    return "<!doctype html><link rel=icon href=data:,>"

@app.get("/ping")
def ping():
    return "pong"

@app.get("/login")
def login():
    session["user"] = "7"
    return page()

@app.get("/streams")
def streams():
    return str(len(app.extensions["pg_sse"].runtime.worker.streams[0]))

@app.get("/asked")
def show():
    return jsonify(asked)
"""

# Every way in which a page can ask another site for something, and what it can see of the answer.
ATTACK = """async (stream) => {
  const load = (element, attribute) => new Promise((resolve) => {
    element[attribute] = stream;
    element.onload = () => resolve("loaded");
    element.onerror = () => resolve("failed");
    document.body.append(element);
  });
  const frame = () => new Promise((resolve) => {
    const element = document.createElement("iframe");
    element.src = stream;
    element.onload = () => resolve("loaded");
    document.body.append(element);
  });
  const fetched = (mode) => fetch(stream, {mode, credentials: "include"}).then((r) => r.type, () => "failed");
  const source = new Promise((resolve) => {
    const it = new EventSource(stream, {withCredentials: true});
    it.onopen = () => resolve("opened");
    it.onerror = () => resolve(it.readyState == EventSource.CLOSED ? "refused" : "again");
  });
  return await Promise.all([
    frame(), frame(), frame(),
    load(document.createElement("img"), "src"),
    load(document.createElement("script"), "src"),
    load(Object.assign(document.createElement("link"), {rel: "stylesheet"}), "href"),
    load(document.createElement("object"), "data"),
    load(document.createElement("audio"), "src"),
    fetched("no-cors"), fetched("cors"), source,
  ]);
}"""
OPEN_THREE = """async (stream) => {
  const opened = [];
  for (let n = 0; n < 3; n++) opened.push(new Promise((resolve) => {
    const source = new EventSource(stream);
    source.addEventListener("sse-open", () => resolve("sse-open"));
    source.addEventListener("sse-end", (event) => resolve(event.data));
    source.onerror = () => { if (source.readyState == EventSource.CLOSED) resolve("refused"); };
  }));
  return await Promise.all(opened);
}"""


@pytest.mark.parametrize("worker", ["gevent", pytest.param("gthread", marks=pytest.mark.slow)])
def test_a_page_of_another_site_takes_no_place_and_learns_nothing(
    page: Page, database_url: str, start_server: Start, tmp_path: Path, worker: str
) -> None:
    (tmp_path / "places.py").write_text(APP)
    threads = ("--threads", "20") if worker == "gthread" else ()
    server = start_server(
        database_url,
        command=lambda port: gunicorn("places:app", port, "--pythonpath", str(tmp_path), "-k", worker, *threads),
        FLASK_SSE_MAX_STREAMS_PER_CLIENT="3",
    )
    own, other = f"http://localhost:{server.port}", f"http://127.0.0.1:{server.port}"
    page.goto(f"{own}/login")
    assert page.evaluate(OPEN_THREE, f"{own}/sse/user-7") == ["sse-open"] * 3, "the login counts"
    page.goto(f"{other}/")
    eventually(lambda: server.get("/streams") == "0", 30, "the streams of the page that was left have ended")
    asked = eventually(lambda: page.request.get(f"{own}/asked").json())
    answers = [page.evaluate(ATTACK, f"{own}/sse/user-{number}") for number in (7, 8)]
    assert answers[0] == answers[1], "the page cannot tell who the user is"
    assert "opened" not in answers[0]
    assert page.request.get(f"{own}/asked").json() == asked, "no hook was asked"
    # The attacker's page stays open; the user's own page has all the places.
    users_page = page.context.new_page()
    users_page.goto(f"{own}/")
    assert users_page.evaluate(OPEN_THREE, f"{own}/sse/user-7") == ["sse-open"] * 3
