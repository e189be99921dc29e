"""The stream over HTTP: URLs, headers, first block, refusals; the same for nested, renamed and repeated blueprints."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from flask import Blueprint, Flask, render_template, render_template_string, url_for
from jinja2 import DictLoader
from werkzeug.test import TestResponse

from flask_pg_sse import DatabaseUnavailable, PgSSE, notify, sse_bp, sse_url
from flask_pg_sse.errors import InvalidChannel
from flask_pg_sse.server.capacity import why_no_stream
from flask_pg_sse.testing import Received, stream
from tests.support.postgres import execute

OPENING = b"retry: 3000\nevent: sse-open\ndata: {}\n\n"
RESET = b'event: sse-reset\ndata: {"reason": "no-log"}\n\n'
MakeApp = Callable[..., Flask]


@contextmanager
def get(app: Flask, url: str, **options: Any) -> Iterator[TestResponse]:
    response = app.test_client().get(url, **options)
    try:
        yield response
    finally:
        response.close()


def first_block(response: TestResponse) -> bytes:
    """Return the first line, which leaves at once, and what follows once LISTEN is confirmed."""
    pieces = response.iter_encoded()
    first = next(pieces)
    return first + next(pieces) if first.count(b"\n") == 1 else first


@contextmanager
def streaming(app: Flask, url: str) -> Iterator[Iterator[Received]]:
    events = stream(app.test_client(), url)
    try:
        assert next(events).event == "sse-open"
        yield events
    finally:
        events.close()


# -- headers and the first block


def test_headers_and_the_first_block(database_url: str, make_app: MakeApp) -> None:
    with get(make_app(database_url), "/sse?channel=orders") as response:
        assert first_block(response) == OPENING
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache, no-transform"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert not {"Content-Length", "Content-Encoding", "ETag", "Set-Cookie"} & set(response.headers.keys())


def test_the_retry_is_the_configured_one(database_url: str, make_app: MakeApp) -> None:
    with get(make_app(database_url, SSE_RETRY=750), "/sse?channel=orders") as response:
        assert first_block(response).startswith(b"retry: 750\n")


def test_whatever_the_last_event_id_a_reset_follows_the_opening(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    for last_id in ("0", "7", "-1", "abc", "9" * 300, "1 2", "é", "\0", "a\nb", "%00", "{}", "1.5"):
        with get(app, "/sse", query_string={"channel": "orders", "last_event_id": last_id}) as response:
            assert first_block(response) == OPENING + RESET, last_id
        if "\n" not in last_id:  # no header can hold it
            header = {"Last-Event-ID": last_id.encode().decode("latin-1")}
            with get(app, "/sse?channel=orders", headers=header) as response:
                assert first_block(response) == OPENING + RESET, last_id


def test_an_empty_last_event_id_is_none(database_url: str, make_app: MakeApp) -> None:
    with get(make_app(database_url), "/sse?channel=a&last_event_id=", headers={"Last-Event-ID": ""}) as response:
        assert first_block(response) == OPENING


def test_head_answers_headers_and_opens_nothing(make_app: MakeApp) -> None:
    """Not even a database is needed, so nothing can have been opened."""
    response = make_app().test_client().head("/sse?channel=orders")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "Content-Length" not in response.headers
    assert response.data == b""


@pytest.mark.parametrize("url", ["/sse?channel=secret", "/sse/secret", "/sse", "/sse?channel=flask_pg_sse"])
def test_head_is_refused_as_get_is(make_app: MakeApp, url: str) -> None:
    client = make_app(SSE_CHANNELS=["orders"]).test_client()
    assert client.head(url).status_code == client.get(url).status_code >= 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("url", ["/sse?channel=a", "/sse/?channel=a", "/sse/a"])
def test_other_methods_are_not_allowed(make_app: MakeApp, method: str, url: str) -> None:
    assert make_app().test_client().open(url, method=method).status_code == 405


# -- channels in the URL


@pytest.mark.parametrize(
    ("url", "channels"),
    [
        ("/sse?channel=a", ["a"]),
        ("/sse/?channel=a", ["a"]),
        ("/sse?channel=a&channel=b", ["a", "b"]),
        ("/sse?channel=a&channel=a", ["a"]),
        ("/sse/a", ["a"]),
        ("/sse/a?channel=b", ["a", "b"]),
        ("/sse/a/b/c", ["a/b/c"]),
        ("/sse/a//b", ["a//b"]),
        ("/sse//a", ["/a"]),
        ("/sse/%2Fa", ["/a"]),
        ("/sse///", ["//"]),
        ("/sse/a/", ["a/"]),
        ("/sse?channel=/a", ["/a"]),
        ("/sse/two%20words", ["two words"]),
        ("/sse?channel=two+words", ["two words"]),
        ("/sse/a+b", ["a+b"]),
        ("/sse?channel=a%2Bb", ["a+b"]),
        ("/sse/caf%C3%A9%20%F0%9F%98%80", ["café 😀"]),
        ("/sse?channel=caf%C3%A9", ["café"]),
        ("/sse/100%25", ["100%"]),
        ("/sse/100%2525", ["100%25"]),
        ("/sse?channel=a,b", ["a,b"]),
        ("/sse/a%3Fb%23c", ["a?b#c"]),
        ("/sse?channel=Orders&channel=orders", ["Orders", "orders"]),
        ("/sse/.", ["."]),
    ],
)
def test_channels_of_a_url(database_url: str, make_app: MakeApp, url: str, channels: list[str]) -> None:
    app = make_app(database_url)
    with streaming(app, url) as events:
        assert sorted(listened(app)) == sorted(channels)
        with app.app_context():
            for channel in channels:
                notify(channel, channel)
        assert [next(events).data for _ in channels] == channels


@pytest.mark.parametrize("name", [".", "..", "a/../b", "./a", "a/."])
def test_a_name_that_browsers_would_change_in_a_path_is_refused_there(make_app: MakeApp, name: str) -> None:
    with make_app("postgresql://127.0.0.1:1/x").test_request_context():
        with pytest.raises(InvalidChannel, match=re.escape(f"Use sse_url({name!r})")):
            url_for("sse.channel", channel=name)
        assert sse_url(name) == f"/sse?channel={quote(name, safe='')}"


def listened(app: Flask) -> list[str]:
    channels: list[str] = app.extensions["pg_sse"].runtime._worker.engine._listener._listens.listened()
    return channels


NAMES = [
    "orders",
    "a/b",
    "/a",
    "//",
    "a b",
    "a+b",
    "100%",
    "%2F",
    "café 😀",
    "a&channel=b",
    "a?b#c",
    "a'b\"<c>",
    ".",
    "..",
    "a;b,c",
]


def test_urls_that_are_built_lead_to_their_channel(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    for name in NAMES:
        with app.test_request_context():
            urls = [sse_url(name), url_for("sse.stream", channel=name)]
            if not name.startswith("."):  # as a path, a browser would change it
                urls.append(url_for("sse.channel", channel=name))
        for url in urls:
            with streaming(app, url) as events, app.app_context():
                notify(name, url)
                assert next(events).data == url


def test_url_for_with_a_list_repeats_the_parameter(make_app: MakeApp) -> None:
    with make_app().test_request_context():
        assert url_for("sse.stream", channel=["a", "b"]) == "/sse?channel=a&channel=b"
        assert url_for("sse.channel", channel="a/b") == "/sse/a/b"


def test_sql_in_a_channel_name_is_a_name_like_any_other(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url)
    execute(database_url, "CREATE TABLE precious ()")
    names = ['a"; DROP TABLE precious; --', "a'; DROP TABLE precious; --", 'a""b', "%s %(x)s {}", "\\", "$1", "SELECT"]
    query = "&".join(f"channel={quote(name)}" for name in names)
    with streaming(app, f"/sse?{query}") as events:
        assert sorted(listened(app)) == sorted(names)
        with app.app_context():
            for name in names:
                notify(name, name)
        assert [next(events).data for _ in names] == names
    assert execute(database_url, "SELECT count(*) FROM precious") == [(0,)]


# -- refusals


def refusal(app: Flask, url: str) -> tuple[int, str]:
    with get(app, url) as response:
        text = response.get_data(as_text=True)
        assert response.mimetype == "text/plain"
        assert text.endswith("\n") and len(text.splitlines()) == 1, text
        return response.status_code, text


@pytest.mark.parametrize("url", ["/sse", "/sse/", "/sse?x=1", "/sse?channels=a"])
def test_a_url_without_a_channel_is_a_bad_request(make_app: MakeApp, url: str) -> None:
    status, text = refusal(make_app(), url)
    assert status == 400
    assert "channel=" in text


@pytest.mark.parametrize(
    "name", ["", "flask_pg_sse", "flask_pg_sse.x", "a%0Ab", "a%00", "%C2%85", "a%7F", "%09", "x" * 256, "%C3%A9" * 128]
)
@pytest.mark.parametrize("patterns", [["*"], [], ["flask_pg_sse*", "?*"]])
def test_illegal_and_reserved_names_are_refused_before_any_pattern(
    make_app: MakeApp, name: str, patterns: list[str]
) -> None:
    app = make_app(SSE_CHANNELS=patterns)
    urls = [f"/sse?channel={name}", f"/sse?channel=closed&channel={name}"]
    if name and "%0A" not in name:  # werkzeug's router finds no path with a line end: 404
        urls.append(f"/sse/{name}")
    for url in urls:
        status, text = refusal(app, url)
        assert status == 400, (url, text)
        assert "hannel name" in text


def test_too_many_channels_are_a_bad_request(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_MAX_CHANNELS=3)
    status, text = refusal(app, "/sse/a?channel=b&channel=c&channel=d")
    assert status == 400
    assert "4 channels" in text and "3" in text
    with streaming(app, "/sse/a?channel=b&channel=c&channel=a"):
        pass


@pytest.mark.parametrize("url", ["/sse?channel=secret", "/sse/secret", "/sse?channel=orders&channel=secret"])
def test_a_closed_channel_is_refused_with_what_why_and_remedy(make_app: MakeApp, url: str) -> None:
    status, text = refusal(make_app(SSE_CHANNELS=["orders"]), url)
    assert status == 403
    assert "'secret' is not open" in text
    assert "SSE_CHANNELS" in text
    assert "ask" in text
    assert "app.config" not in text


@pytest.mark.parametrize(
    ("patterns", "opened", "closed"),
    [
        (["news"], ["news"], ["News", "news1", "new", "*"]),
        (["room-*"], ["room-", "room-1", "room-a/b", "room-\u2028x"], ["room", "xroom-1"]),
        (["room-[0-9]"], ["room-1"], ["room-[0-9]", "room-10", "room-x"]),
        (["[*]"], ["*"], ["x"]),
        (["a?c"], ["abc", "a?c", "a/c"], ["ac"]),
        (["a.c", "(x|y)"], ["a.c", "(x|y)"], ["abc", "x"]),
        ([], [], ["a", "*", "[]"]),
    ],
)
def test_patterns(make_app: MakeApp, patterns: list[str], opened: list[str], closed: list[str]) -> None:
    client = make_app(SSE_CHANNELS=patterns).test_client()
    assert [name for name in opened + closed if client.head(f"/sse?channel={quote(name)}").status_code == 200] == opened


def test_the_first_refusal_of_an_app_that_opens_nothing_is_loud_and_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(SSE_CHANNELS=None)
    assert not caplog.records
    for channel in ("orders", "orders", "others"):
        assert refusal(app, f"/sse?channel={channel}")[0] == 403
    (record,) = caplog.records  # the further ones are counted
    assert record.levelno == logging.WARNING
    assert 'app.config["SSE_CHANNELS"] = ["orders"]' in record.getMessage()


def test_in_debug_the_answer_says_the_line_to_write(make_app: MakeApp) -> None:
    app = make_app(SSE_CHANNELS=None)
    app.debug = True
    assert 'app.config["SSE_CHANNELS"] = ["orders"]' in refusal(app, "/sse/orders")[1]


@pytest.mark.parametrize("name", ["*", "a[b]c?", "[", 'a"]; x=["*', "a\\", "a'b", "\u2028", "é😀", "a\u202eb", "{x}%s"])
def test_the_line_to_write_opens_the_channel_that_was_asked_for_and_no_other(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The name comes from the URL: anybody may choose it, and the line is there to be copied."""
    assert refusal(make_app(SSE_CHANNELS=None), f"/sse?channel={quote(name)}")[0] == 403
    (record,) = caplog.records
    assert len(record.getMessage().splitlines()) == 1
    line = record.getMessage().partition(": app.config")[2]
    copied: dict[str, Any] = {}
    exec(f"config{line}", {"config": copied})
    client = make_app(**copied).test_client()
    assert client.head(f"/sse?channel={quote(name)}").status_code == 200
    for other in ("x", "abc", "a", "b", "*x"):
        assert client.head(f"/sse?channel={quote(other)}").status_code == 403


# -- databases that are missing


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({}, "Set SSE_DATABASE_URL"),
        ({"SSE_DATABASE_URL": "sqlite:///app.db"}, "set SSE_DATABASE_URL"),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite:///app.db"}, "set SSE_DATABASE_URL"),
        ({"SSE_DATABASE_URL": "postgresql://u:hunter2@h:port/d"}, "percent-encoded"),
        ({"SSE_DATABASE_URL": "postgresql://u@h/d", "SSE_LISTEN_URL": "http://u:hunter2@h"}, "SSE_LISTEN_URL"),
        ({"SSE_RETRY": "soon"}, "a whole number"),
        ({"SSE_ALLOWED_ORIGINS": ["example.com"]}, "a list of origins"),
        ({"SECRET_KEY_FALLBACKS": "hunter2"}, "a list of keys"),
    ],
)
@pytest.mark.parametrize("testing", [True, False])
def test_a_wrong_configuration_at_first_use_is_a_line_with_the_remedy(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, config: dict[str, Any], remedy: str, testing: bool
) -> None:
    app = make_app(TESTING=testing, DEBUG=not testing)
    app.config.update(config)  # after the registration
    for _ in range(3):
        with app.test_client().get("/sse?channel=orders&token=x") as response:
            assert (response.status_code, response.mimetype) == (500, "text/plain")
            text = response.get_data(as_text=True)
        assert remedy in text and len(text.splitlines()) == 1
        assert "hunter2" not in text
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    lines = 1 if testing else 3  # in debug each one is logged
    assert [(remedy in record.getMessage(), record.exc_info) for record in errors] == [(True, None)] * lines


def test_a_database_that_is_away_does_not_stop_the_app_from_starting(make_app: MakeApp) -> None:
    app = make_app("postgresql://u@127.0.0.1:1/d")
    assert app.test_client().head("/sse?channel=orders").status_code == 200
    with app.app_context(), pytest.raises(DatabaseUnavailable):
        notify("orders", "x")


# -- blueprints


def test_another_prefix(database_url: str, make_app: MakeApp) -> None:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS="*", SSE_DATABASE_URL=database_url)
    app.register_blueprint(sse_bp, url_prefix="/live")
    try:
        with app.test_request_context():
            assert sse_url("a") == url_for("sse.stream", channel="a") == "/live?channel=a"
        with streaming(app, "/live/a"), streaming(app, "/live/?channel=a"):
            pass
        assert app.test_client().get("/sse?channel=a").status_code == 404
    finally:
        app.extensions["pg_sse"].close()


@pytest.mark.parametrize("prefix", ["/", "/live/", "/a/b"])
def test_sse_url_follows_any_prefix(prefix: str) -> None:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS="*")
    app.register_blueprint(sse_bp, url_prefix=prefix)
    with app.test_request_context():
        urls = [
            sse_url("a"),
            url_for("sse.channel", channel="a"),
            render_template_string("{{ sse_server_url }}/?channel=a"),
        ]
    for url in urls:
        assert app.test_client().head(url).status_code == 200, url


def test_another_name() -> None:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS="*")
    app.register_blueprint(sse_bp, name="live")
    with app.test_request_context():
        assert sse_url("a") == url_for("live.stream", channel="a") == "/sse?channel=a"


def test_a_nested_and_renamed_blueprint_streams_and_knows_its_url(database_url: str) -> None:
    app = Flask("tests")
    app.config.update(
        TESTING=True, SSE_CHANNELS="*", SSE_DATABASE_URL=database_url, SSE_ALLOWED_ORIGINS="https://a.org"
    )
    inner, outer = Blueprint("inner", __name__, url_prefix="/in"), Blueprint("outer", __name__, url_prefix="/out")
    inner.register_blueprint(sse_bp, name="live", url_prefix="/events")
    outer.register_blueprint(inner)
    app.register_blueprint(outer)
    try:
        with app.test_request_context():
            assert sse_url(["a", "b"]) == "/out/in/events?channel=a&channel=b"
            assert url_for("outer.inner.live.channel", channel="a") == "/out/in/events/a"
        with get(app, "/out/in/events/a", headers={"Origin": "https://a.org"}) as response:
            assert first_block(response) == OPENING
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.org"
    finally:
        app.extensions["pg_sse"].close()


def test_registered_twice_it_is_one_runtime_and_sse_url_leads_to_the_first() -> None:
    app = Flask("tests")
    app.config.update(TESTING=True, SSE_CHANNELS="*")
    app.register_blueprint(sse_bp)
    state = app.extensions["pg_sse"]
    app.register_blueprint(sse_bp, name="again", url_prefix="/again")
    assert app.extensions["pg_sse"] is state
    with app.test_request_context():
        assert sse_url("a") == "/sse?channel=a"
    assert app.test_client().head("/again/a").status_code == 200


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="autorize"):
        Flask("tests").register_blueprint(sse_bp, autorize=lambda channel: True)


def test_a_call_without_the_blueprint_say_what_to_do() -> None:
    with Flask("tests").app_context(), pytest.raises(RuntimeError, match=r"register_blueprint\(sse_bp\)"):
        notify("orders", "x")


def test_an_app_factory_with_the_extension_object(database_url: str) -> None:
    sse = PgSSE(url_prefix="/live", name="live")

    def create_app() -> Flask:
        app = Flask("tests")
        app.config["TESTING"] = True
        sse.init_app(app)
        return app

    app = create_app()
    app.config.update(SSE_DATABASE_URL=database_url, SSE_CHANNELS=["orders"])
    try:
        with streaming(app, "/live?channel=orders") as events, app.test_request_context():
            assert sse.sse_url("orders") == "/live?channel=orders"
            sse.notify("orders", "hello")
            assert next(events).data == "hello"
    finally:
        with app.app_context():
            sse.close()


def test_two_apps_in_one_process_share_nothing(database_url: str, postgres_server: Any, make_app: MakeApp) -> None:
    other = make_app(
        postgres_server.url(), SSE_CHANNELS=["theirs", "both"], SSE_RETRY=1, SSE_SERVER_URL="https://b.org"
    )
    app = make_app(database_url, SSE_CHANNELS=["ours", "both"])
    assert app.test_client().head("/sse/theirs").status_code == 403
    assert other.test_client().head("/sse/ours").status_code == 403
    with streaming(app, "/sse/both") as ours, streaming(other, "/sse/both") as theirs:
        with app.test_request_context():
            assert sse_url("both") == "/sse?channel=both"
            notify("both", "for ours")
        with other.test_request_context():
            assert sse_url("both") == "https://b.org/?channel=both"
            notify("both", "for theirs")
        assert (next(ours).data, next(theirs).data) == ("for ours", "for theirs")
        other.extensions["pg_sse"].close()
        assert next(theirs).event == "sse-end"
        with app.app_context():
            notify("both", "still here")
        assert next(ours).data == "still here"


# -- URLs and templates


@pytest.mark.parametrize("channels", [["a", "b"], ("a", "b"), (name for name in "ab")])
def test_sse_url_has_each_channel_in_clear(make_app: MakeApp, channels: Any) -> None:
    with make_app().test_request_context():
        assert sse_url(channels) == "/sse?channel=a&channel=b"


def test_sse_url_external(make_app: MakeApp) -> None:
    with make_app().test_request_context(base_url="https://shop.example.org/sub"):
        assert sse_url("a") == "/sub/sse?channel=a"
        assert sse_url("a", external=True) == "https://shop.example.org/sub/sse?channel=a"


@pytest.mark.parametrize("external", [True, False])
def test_sse_url_is_absolute_under_the_server_url(make_app: MakeApp, external: bool) -> None:
    with make_app(SSE_SERVER_URL="https://live.example.org/x/").app_context():
        url = sse_url(NAMES, external=external)
    assert url.startswith("https://live.example.org/x/?channel=orders&channel=a")
    assert parse_qs(urlsplit(url).query) == {"channel": NAMES}


@pytest.mark.parametrize("channels", [[], (), "", ["a", ""], ["flask_pg_sse"], [5], "a\nb"])
def test_sse_url_refuses_what_no_stream_can_have(make_app: MakeApp, channels: Any) -> None:
    with make_app().test_request_context(), pytest.raises(ValueError, match=r"channel|Channel"):
        sse_url(channels)


def test_notify_refuses_what_no_stream_can_have(make_app: MakeApp) -> None:
    with make_app().app_context(), pytest.raises(InvalidChannel):
        notify("flask_pg_sse.control", "x")


USES = [
    ("{{ sse_server_url }}", "{base}"),
    ("{{ sse_server_url + '/?channel=a' }}", "{base}/?channel=a"),
    ("{{ sse_server_url ~ '/?channel=a' }}", "{base}/?channel=a"),
    ("{{ sse_server_url|tojson }}", '"{base}"'),
    ("{{ '%s/x'|format(sse_server_url) }}", "{base}/x"),
    ('<div sse-connect="{{ sse_server_url }}/?channel=a"></div>', '<div sse-connect="{base}/?channel=a"></div>'),
    ("{{ sse_url(['a', 'b']) }}", None),
]


@pytest.mark.parametrize(("template", "expected"), USES)
@pytest.mark.parametrize("base", ["https://live.example.org", None])
def test_templates(make_app: MakeApp, template: str, expected: str | None, base: str | None) -> None:
    with make_app(SSE_SERVER_URL=base).test_request_context():
        found = render_template_string(template)
    if expected is None:
        assert found == (f"{base}/" if base else "/sse") + "?channel=a&amp;channel=b"
    else:
        assert found == expected.format(base=base or "/sse")


MACRO = "{% macro board() %}{{ sse_url('a') }} {{ sse_server_url }} {{ sse_cursor }}{% endmacro %}"


def test_templates_without_a_context_have_the_same_names(make_app: MakeApp) -> None:
    app = make_app()
    app.jinja_env.loader = DictLoader({
        "macros": MACRO,
        "imports": "{% from 'macros' import board %}{{ board() }}",
        "included": "{{ sse_url('a') }} {{ sse_server_url }} {{ sse_cursor }}",
        "includes": "{% include 'included' without context %}",
    })  # fmt: skip
    with app.test_request_context():
        bare = app.jinja_env.get_template("included").render()
        pages = [render_template("imports"), render_template("includes"), bare]
    for page in pages:
        assert page.startswith("/sse?channel=a /sse <") and "sse_cursor" in page


def test_templates_that_use_no_url_render_without_a_request(make_app: MakeApp) -> None:
    with make_app().app_context():
        assert render_template_string("{{ 1 + 1 }}") == "2"


# -- servers that cannot stream


@pytest.mark.parametrize(
    ("environ", "remedy"),
    [
        ({"gunicorn.socket": object(), "wsgi.multithread": False, "SERVER_SOFTWARE": "gunicorn"}, "-k gevent"),
        ({"gunicorn.socket": object(), "wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/2.0"}, "proxy"),
        ({"wsgi.multithread": False, "SERVER_SOFTWARE": "gevent/24.2 Python/3.11"}, "monkey.patch_all"),
        ({"wsgi.multithread": False, "SERVER_SOFTWARE": "Werkzeug/3.1"}, "--without-threads"),
    ],
)
def test_a_server_that_would_freeze_is_refused_in_words(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, environ: dict[str, Any], remedy: str
) -> None:
    assert remedy in (why_no_stream(environ) or "")
    with get(make_app(), "/sse?channel=a", environ_overrides=environ) as response:
        assert response.status_code == 500
        assert response.mimetype == "text/plain"
        text = response.get_data(as_text=True)
    assert remedy in text
    assert len(text.splitlines()) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert remedy in caplog.text


@pytest.mark.parametrize(
    "environ",
    [
        {"gunicorn.socket": object(), "wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/1.1"},
        {"wsgi.multithread": True, "SERVER_SOFTWARE": "Werkzeug/3.1"},
        {"wsgi.multithread": False},
    ],
)
def test_servers_that_can_stream_are_left_in_peace(environ: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as threads:  # as under a server that has some
        assert threads.submit(why_no_stream, environ).result() is None


def test_the_test_client_can_stream_also_with_its_context_kept(database_url: str, make_app: MakeApp) -> None:
    with make_app(database_url).test_client() as client:
        events = stream(client, "/sse?channel=a")
        assert next(events).event == "sse-open"
        events.close()
