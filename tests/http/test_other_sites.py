"""What a browser says about a request: another site's page, a frame or an image gets no stream, and learns nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from werkzeug.datastructures import Headers

MakeApp = Callable[..., Flask]

LISTED = "https://www.example.org"
ALLOWED: list[dict[str, str]] = [
    {},  # no browser, or one of before 2023
    {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "empty"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "empty"},
    {"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"},  # a person typed the URL
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty", "Origin": LISTED},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty", "Origin": LISTED.upper()},
]
REFUSED: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty"},  # fetch() with mode "no-cors"
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty", "Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"},  # a link, or a window that a script opened
    *(
        {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": destination}
        for site in ("cross-site", "same-site", "same-origin", "none")
        for destination in ("iframe", "image", "script", "style", "object", "audio", "worker", "serviceworker", "")
    ),
    {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "iframe", "Origin": LISTED},
]


def ask(app: Flask, url: str, headers: dict[str, str], method: str = "GET") -> tuple[int, Headers]:
    with app.test_client().open(url, method=method, headers=headers) as response:
        return response.status_code, response.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_a_browser_says_decides_before_any_hook(database_url: str, make_app: MakeApp, method: str) -> None:
    asked: list[str] = []

    def may_listen(channel: str) -> bool:
        asked.append(channel)
        return channel == "mine"

    app = make_app(
        database_url,
        authorize=may_listen,
        subject=lambda: asked.append("subject"),
        SSE_CHANNELS=["open"],
        SSE_ALLOWED_ORIGINS=[LISTED],
    )
    for headers in ALLOWED:
        for channel, status in (("open", 200), ("mine", 200), ("theirs", 403)):
            assert ask(app, f"/sse/{channel}", headers, method)[0] == status, headers
    assert asked
    asked.clear()
    for headers in REFUSED:
        # Also for a name that is wrong, or for none: the answer must not depend on anything else.
        answers = [
            ask(app, url, headers, method) for url in ("/sse/open", "/sse/mine", "/sse/theirs", "/sse", "/sse/%00")
        ]
        assert {status for status, _ in answers} == {403}, headers
        assert len({str(answer) for _, answer in answers}) == 1, headers
    assert not asked


def test_the_asterisk_allows_every_origin_and_no_frame(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=["open"], SSE_ALLOWED_ORIGINS="*")
    crossing = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty"}
    assert ask(app, "/sse/open", crossing | {"Origin": "https://anybody.example"})[0] == 200
    assert ask(app, "/sse/open", crossing | {"Origin": "null"})[0] == 200
    assert ask(app, "/sse/open", crossing)[0] == 403
    assert ask(app, "/sse/open", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"})[0] == 403


def test_the_refusal_says_what_to_do(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=["open"])
    client = app.test_client()
    text = client.get("/sse/open", headers={"Sec-Fetch-Site": "cross-site"}).get_data(as_text=True)
    assert "another site" in text and "SSE_ALLOWED_ORIGINS" in text and text.count("\n") == 1
    text = client.get("/sse/open", headers={"Sec-Fetch-Dest": "iframe"}).get_data(as_text=True)
    assert "'iframe'" in text and "EventSource" in text and text.count("\n") == 1


def test_no_frame_shows_an_answer_and_none_is_taken_for_something_else(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=["open"])
    for url, status in (("/sse/open", 200), ("/sse/closed", 403), ("/sse", 400), ("/sse/open?" + "&" * 300, 414)):
        found, headers = ask(app, url, {})
        assert found == status
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("hooks", "channel", "private"),
    [
        ({}, "open", False),
        ({"authorize": lambda channel: True}, "open", False),
        ({"authorize": lambda channel: True}, "mine", True),
        ({"authorize": lambda channel: 1 / 0}, "mine", True),
        ({"subject": lambda: 7}, "open", True),
    ],
)
def test_caches_do_not_store_what_a_hook_decided(
    database_url: str, make_app: MakeApp, hooks: dict[str, Any], channel: str, private: bool
) -> None:
    app = make_app(database_url, SSE_CHANNELS=["open"], **hooks)
    for method in ("GET", "HEAD"):
        status, headers = ask(app, f"/sse/{channel}", {}, method)
        assert status == 200
        expected = "no-cache, no-transform, no-store" if private else "no-cache, no-transform"
        assert headers["Cache-Control"] == expected


def test_caches_do_not_store_a_refusal(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=["open"])
    for url, status in (("/sse/closed", 403), ("/sse", 400), ("/sse/open?" + "&" * 300, 414)):
        found, headers = ask(app, url, {})
        assert (found, headers["Cache-Control"]) == (status, "no-store")
