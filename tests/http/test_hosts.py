"""Apps that choose their rules by the host or by a subdomain: where the streams are, and what their URLs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Blueprint, Flask, render_template_string, url_for

from flask_pg_sse import sse_bp, sse_url
from tests.support.client import request
from tests.support.servers import WebServer

SHOP = "http://shop.example.com:8000"


@pytest.fixture
def make() -> Iterator[Callable[..., Flask]]:
    apps = []

    def make(options: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **kind: Any) -> Flask:
        app = Flask("tests", static_folder=None, **kind)
        app.config.update(SSE_CHANNELS=["*"], SSE_DATABASE_URL="postgresql://127.0.0.1:1/x", **(config or {}))
        app.register_blueprint(sse_bp, **(options or {}))
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["pg_sse"].close()


def status(app: Flask, site: str, path: str = "/sse?channel=a") -> int:
    return app.test_client().head(path, base_url=site).status_code


def test_with_host_matching_the_streams_answer_at_every_host(make: Callable[..., Flask]) -> None:
    app = make(host_matching=True)
    for site in (SHOP, "http://localhost", "http://[::1]:5000"):
        assert (status(app, site), status(app, site, "/sse/a")) == (200, 200)
        with app.test_request_context(base_url=site):
            assert sse_url("a") == url_for("sse.stream", channel="a") == "/sse?channel=a"
            assert url_for("sse.channel", channel="a") == "/sse/a"
            assert sse_url("a", external=True) == f"{site}/sse?channel=a"
            assert render_template_string("{{ sse_server_url }}") == "/sse"


def test_with_host_matching_one_host_may_have_the_streams(make: Callable[..., Flask]) -> None:
    app = make({"host": "live.example.com", "url_prefix": "/events"}, host_matching=True)
    assert status(app, "http://live.example.com", "/events?channel=a") == 200
    assert status(app, SHOP, "/events?channel=a") == 404
    with app.test_request_context(base_url=SHOP):
        assert sse_url("a") == "http://live.example.com/events?channel=a"


def test_with_host_matching_outside_a_request(make: Callable[..., Flask]) -> None:
    app = make(host_matching=True, config={"SERVER_NAME": "shop.example.com"})
    with app.app_context():
        assert sse_url("a", external=True) == "http://shop.example.com/sse?channel=a"
    with make(host_matching=True).app_context(), pytest.raises(RuntimeError, match=r"SSE_SERVER_URL.*SERVER_NAME"):
        sse_url("a")


def test_with_host_matching_in_a_nested_blueprint(make: Callable[..., Flask]) -> None:
    app = Flask("nested", host_matching=True, static_folder=None)
    app.config.update(SSE_CHANNELS=["*"], SSE_DATABASE_URL="postgresql://127.0.0.1:1/x")
    parent = Blueprint("parent", __name__, url_prefix="/parent")
    parent.register_blueprint(sse_bp, name="live")
    app.register_blueprint(parent)
    assert status(app, SHOP, "/parent/sse?channel=a") == 200
    with app.test_request_context(base_url=SHOP):
        assert sse_url("a") == "/parent/sse?channel=a"
    app.extensions["pg_sse"].close()


def test_a_subdomain_may_have_the_streams(make: Callable[..., Flask]) -> None:
    app = make({"subdomain": "live"}, {"SERVER_NAME": "example.com"}, subdomain_matching=True)
    assert (status(app, "http://live.example.com"), status(app, "http://example.com")) == (200, 404)
    with app.test_request_context(base_url="http://example.com"):
        assert sse_url("a") == "http://live.example.com/sse?channel=a"


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"subdomain": "live"}, {}, r"subdomain='live'\) needs Flask\(__name__, subdomain_matching=True\)"),
        ({"subdomain": "live"}, {"host_matching": True}, r"use register_blueprint\(sse_bp, host=…\)"),
        ({"host": "live.example.com"}, {}, "needs an app with host_matching=True"),
    ],
)
def test_what_no_stream_could_be_reached_with_is_refused(
    make: Callable[..., Flask], options: dict[str, Any], kind: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        make(options, **kind)


def test_under_gunicorn(database_url: str, start_server: Callable[..., WebServer], tmp_path: Any) -> None:
    (tmp_path / "many_hosts.py").write_text(
        "from flask import Flask\nfrom flask_pg_sse import sse_bp\n"
        "app = Flask(__name__, host_matching=True, static_folder=None)\napp.config['SSE_CHANNELS'] = ['*']\n"
        "app.register_blueprint(sse_bp)\n@app.get('/ping', host='<name>')\ndef ping(name): return 'pong'\n"
    )
    server = start_server(database_url, "--pythonpath", str(tmp_path), app="many_hosts:app")
    for path in ("/sse?channel=a", "/sse/a"):
        with request(server.port, path, headers={"Host": "shop.example.com"}) as response:
            assert (response.status, response.next().event) == (200, "sse-open")
