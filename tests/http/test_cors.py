"""Pages of other sites: SSE_ALLOWED_ORIGINS alone decides, whatever CORS the app has of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, abort, request
from flask_cors import CORS
from werkzeug.datastructures import Headers

from flask_pg_sse import sse_bp
from tests.support.servers import ROOT

ORIGIN = "https://example.com"
WILD: dict[str, Any] = {
    "CORS_ORIGINS": "*",
    "CORS_SUPPORTS_CREDENTIALS": True,
    "CORS_SEND_WILDCARD": False,
    "CORS_ALWAYS_SEND": True,
    "CORS_EXPOSE_HEADERS": "X-Secret",
    "CORS_MAX_AGE": 86400,
    "CORS_METHODS": ["DELETE"],
    "CORS_ALLOW_HEADERS": "X-Secret",
    "CORS_VARY_HEADER": False,
    "CORS_ALLOW_PRIVATE_NETWORK": True,
    "CORS_RESOURCES": {r"/*": {"origins": "*"}},
    "CORS_AUTOMATIC_OPTIONS": False,
}
ANYWHERE = pytest.mark.parametrize("surroundings", ["plain", "CORS before", "CORS after", "wild"])


def make(surroundings: str, allowed: Any) -> Flask:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS=["open"], SSE_ALLOWED_ORIGINS=allowed)
    if surroundings == "wild":
        app.config.update(WILD)
    if surroundings in ("CORS before", "wild"):
        CORS(app, supports_credentials=True)
    app.register_blueprint(sse_bp)
    if surroundings == "CORS after":
        CORS(app, supports_credentials=True)
    app.add_url_rule("/other", view_func=lambda: "other")
    return app


def ask(
    app: Flask, origin: str | None, *, url: str = "/sse?channel=open", method: str = "HEAD", **headers: str
) -> Headers:
    if origin is not None:
        headers["Origin"] = origin
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with app.test_client().open(url, method=method, headers=fields) as response:
        return response.headers


def cors(headers: Headers) -> dict[str, str]:
    return {name: value for name, value in headers if name.startswith("Access-Control-")}


@ANYWHERE
def test_without_any_origin_listed_nothing_is_allowed(surroundings: str) -> None:
    for origin in (ORIGIN, "null", "*", None):
        assert cors(ask(make(surroundings, None), origin)) == {}


@ANYWHERE
@pytest.mark.parametrize("origin", [ORIGIN, "HTTPS://EXAMPLE.COM", "http://localhost:5000", "http://[::1]:3000"])
def test_a_listed_origin_may_send_credentials(surroundings: str, origin: str) -> None:
    headers = ask(make(surroundings, [ORIGIN, "http://localhost:5000", "http://[::1]:3000"]), origin)
    assert cors(headers) == {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true"}
    assert headers.getlist("Access-Control-Allow-Origin") == [origin]
    assert "Origin" in headers["Vary"]


@ANYWHERE
@pytest.mark.parametrize(
    "origin",
    [
        "https://example.com.evil.org", "https://evil.org/https://example.com", "https://evilexample.com", "https://xample.com",
        "http://example.com", "https://example.com:8443", "https://example.com/", "https://example.com ", " https://evil.org",
        "https://sub.example.com", "https://exampleXcom", "https://example.com\x0b", "null", "*", "", ".*", "https://.*",
        "https://evil.org, https://example.com", "https://example.com, https://evil.org", "http://[::2]:3000", "http://:::1:3000",
        "https://user@example.com", "example.com",
    ],
)  # fmt: skip
def test_nothing_that_is_not_listed_is_reflected(surroundings: str, origin: str) -> None:
    headers = ask(make(surroundings, [ORIGIN, "http://[::1]:3000"]), origin)
    assert cors(headers) == {}
    assert "Origin" in headers["Vary"]


def test_cors_on_the_blueprint_itself_opens_nothing() -> None:
    """In a process of its own: the blueprint is one for all apps, and takes nothing once it has been registered."""
    code = f"""
from flask import Flask
from flask_cors import CORS
from flask_pg_sse import sse_bp
CORS(sse_bp, supports_credentials=True)
app = Flask("tests")
app.config.update(SSE_CHANNELS=["open"], SSE_ALLOWED_ORIGINS=[{ORIGIN!r}])
app.register_blueprint(sse_bp)
for origin in ({ORIGIN!r}, "https://evil.org"):
    for url in ("/sse?channel=open", "/sse?channel=closed"):
        answer = app.test_client().head(url, headers={{"Origin": origin}})
        print(answer.headers.getlist("Access-Control-Allow-Origin"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines() == [f"[{ORIGIN!r}]"] * 2 + ["[]"] * 2


@ANYWHERE
@pytest.mark.parametrize("origin", [ORIGIN, "https://evil.org", "null"])
def test_the_asterisk_is_literal_and_never_with_credentials(surroundings: str, origin: str) -> None:
    assert cors(ask(make(surroundings, "*"), origin)) == {"Access-Control-Allow-Origin": "*"}


@ANYWHERE
def test_beside_an_asterisk_only_listed_origins_may_send_credentials(surroundings: str) -> None:
    app = make(surroundings, ["*", ORIGIN])
    assert cors(ask(app, ORIGIN)) == {"Access-Control-Allow-Origin": ORIGIN, "Access-Control-Allow-Credentials": "true"}
    assert cors(ask(app, "https://evil.org")) == {"Access-Control-Allow-Origin": "*"}


@ANYWHERE
@pytest.mark.parametrize("url", ["/sse", "/sse?channel=closed", "/sse/closed", "/sse?channel=flask_pg_sse"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_listed_pages_can_read_why_they_were_refused_and_others_cannot(
    surroundings: str, url: str, method: str
) -> None:
    app = make(surroundings, [ORIGIN])
    assert cors(ask(app, ORIGIN, url=url, method=method))["Access-Control-Allow-Origin"] == ORIGIN
    assert cors(ask(app, "https://evil.org", url=url, method=method)) == {}


def preflight(app: Flask, origin: str, url: str = "/sse?channel=open") -> dict[str, str]:
    headers = {
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "Last-Event-ID",
        "Access-Control-Request-Private-Network": "true",
    }
    return cors(ask(app, origin, url=url, method="OPTIONS", **headers))


@ANYWHERE
@pytest.mark.parametrize("allowed", [None, [ORIGIN]], ids=["none", "one"])
def test_an_exception_of_a_hook_is_read_by_listed_origins_alone(surroundings: str, allowed: list[str] | None) -> None:
    """flask-cors looks at what an app's error handlers return, before any function that runs after a request."""
    app = make(surroundings, allowed)
    app.before_request(lambda: abort(401) if request.args.get("channel") == "aborted" else None)
    for origin in ("https://evil.example", ORIGIN):
        headers = ask(app, origin, url="/sse?channel=aborted", method="GET")
        assert cors(headers).get("Access-Control-Allow-Origin") == (origin if origin in (allowed or []) else None)


@ANYWHERE
@pytest.mark.parametrize("url", ["/sse?channel=open", "/sse/open"])
def test_preflight(surroundings: str, url: str) -> None:
    app = make(surroundings, [ORIGIN])
    allowed = preflight(app, ORIGIN, url)
    assert allowed["Access-Control-Allow-Origin"] == ORIGIN
    assert allowed["Access-Control-Allow-Credentials"] == "true"
    assert {method.strip() for method in allowed["Access-Control-Allow-Methods"].split(",")} == {"GET", "HEAD"}
    assert allowed["Access-Control-Allow-Headers"] == "Last-Event-ID"
    assert allowed.get("Access-Control-Allow-Private-Network") != "true"
    assert "Access-Control-Max-Age" not in allowed  # the app's CORS_MAX_AGE is for the app
    assert preflight(app, "https://evil.org", url) == {}


@ANYWHERE
def test_preflight_with_an_asterisk(surroundings: str) -> None:
    allowed = preflight(make(surroundings, "*"), "https://any.org")
    assert allowed["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in allowed


def test_the_apps_own_cors_still_decides_for_its_other_routes() -> None:
    app = make("CORS before", [ORIGIN])
    assert ask(app, "https://any.org", url="/other")["Access-Control-Allow-Origin"] == "https://any.org"
    assert cors(ask(make("plain", "*"), ORIGIN, url="/other")) == {}


def test_two_apps_have_each_their_origins() -> None:
    first, second = make("plain", [ORIGIN]), make("CORS after", ["https://other.org"])
    assert cors(ask(first, "https://other.org")) == cors(ask(second, ORIGIN)) == {}
    assert cors(ask(second, "https://other.org"))


def test_origins_may_be_set_until_first_use() -> None:
    app = make("plain", None)
    app.config["SSE_ALLOWED_ORIGINS"] = f"{ORIGIN},https://b.org"
    assert cors(ask(app, "https://b.org"))
    app.config["SSE_ALLOWED_ORIGINS"] = "https://c.org"
    assert cors(ask(app, "https://b.org"))
    assert cors(ask(app, "https://c.org")) == {}


@ANYWHERE
def test_the_stream_itself_has_the_headers_too(
    surroundings: str, database_url: str, make_app: Callable[..., Flask]
) -> None:
    app = make(surroundings, [ORIGIN])
    app.config["SSE_DATABASE_URL"] = database_url
    try:
        headers = ask(app, ORIGIN, method="GET")
        assert headers["Content-Type"].startswith("text/event-stream")
        assert cors(headers) == {"Access-Control-Allow-Origin": ORIGIN, "Access-Control-Allow-Credentials": "true"}
    finally:
        app.extensions["pg_sse"].close()
