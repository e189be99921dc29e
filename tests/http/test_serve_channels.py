"""Which channels the server that stands alone has, who may listen to them, and under which names they are heard."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import pytest
from flask import Flask

from flask_pg_sse import disconnect, notify, sse_bp, sse_url
from flask_pg_sse.channels import heard_unquoted, unquoted
from flask_pg_sse.engine.postgres.unquoted import UnquotedNames
from flask_pg_sse.serve import create_app
from flask_pg_sse.testing import Received, stream
from flask_pg_sse.web.blueprint import SSEBlueprint
from tests.support.client import eventually
from tests.support.postgres import connect, execute

Alone = Callable[..., Flask]


@pytest.fixture
def alone(database_url: str) -> Iterator[Alone]:
    """Make the app of the server that stands alone, for an environment with these variables."""
    apps: list[Flask] = []

    def make(url: str = database_url, **environ: str) -> Flask:
        app = create_app({"SSE_DATABASE_URL": url, **environ})
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["pg_sse"].close()


def status(app: Flask, url: str) -> int:
    with app.test_client().get(url) as response:
        if response.status_code == 200:
            first_line, opening, *_ = itertools.islice(response.iter_encoded(), 2)
            assert first_line.startswith(b"retry: ") and opening.startswith(b"event: sse-open")
        return response.status_code


def sessions(url: str) -> int:
    """Return how many sessions the package has in the database."""
    query = "SELECT FROM pg_stat_activity WHERE application_name ~ '^flask_pg_sse' AND datname = current_database()"
    return len(execute(url, query))


def heard(events: Iterator[Received], database_url: str, *sent: tuple[str, str]) -> list[str | None]:
    """Return what a stream gets of notifications (channel, payload), before one on the channel `fence`."""
    connection = connect(database_url)
    with connection.cursor() as cursor:
        for channel, payload in (*sent, ("fence", "end")):
            cursor.execute("SELECT pg_notify(%s, %s)", (channel, payload))
    connection.close()
    found: list[str | None] = []
    while (event := next(events)).data != "end":
        found.append(event.data)
    return found


# -- which paths are channels


@pytest.mark.parametrize(
    "path",
    [
        "favicon.ico", "robots.txt", "apple-touch-icon.png", "apple-touch-icon-120x120-precomposed.png", ".env",
        ".well-known/appspecific/com.chrome.devtools.json", ".git/config", "app/.env", "index.php", "wp/xmlrpc.PHP",
    ],
)  # fmt: skip
def test_what_browsers_and_scanners_ask_for_is_no_channel(alone: Alone, database_url: str, path: str) -> None:
    app = alone()
    assert status(app, f"/{path}") == 404
    assert sessions(database_url) == 0  # and so no LISTEN


def test_all_other_paths_are_channels(alone: Alone) -> None:
    app = alone()
    for path in ("orders", "a/b", "orders.php5", "robots", "user-7", "static/app.js", "channel=orders", "Zoë"):
        assert status(app, f"/{path}") == 200
    assert status(app, "/?channel=.hidden&channel=index.php") == 200  # who writes it so means a channel
    assert status(app, "/") == 400


@pytest.mark.parametrize("name", ["livez", "healthz", "readyz"])
def test_the_names_of_health_are_no_channels(alone: Alone, name: str) -> None:
    app = alone()
    client = app.test_client()
    eventually(lambda: client.get(f"/{name}").status_code == 200)  # the first LISTEN may take longer than it waits
    response = client.get(f"/{name}")
    assert (response.status_code, response.text, response.mimetype) == (200, "ok\n", "text/plain")
    assert status(app, f"/?channel={name}") == status(app, f"/channel={name}") == 404


def test_livez_needs_no_database_and_the_others_do(alone: Alone) -> None:
    app = alone("postgresql://127.0.0.1:1/none")
    assert [app.test_client().get(f"/{name}").status_code for name in ("livez", "healthz", "readyz")] == [200, 503, 503]


# -- who may listen


def test_all_channels_are_open_unless_something_says_who_may_listen(alone: Alone) -> None:
    assert status(alone(), "/orders") == 200
    listed = alone(SSE_CHANNELS="orders,room-*")
    assert [status(listed, f"/{name}") for name in ("orders", "room-7", "secret")] == [200, 200, 403]
    assert status(alone(SSE_CHANNELS=""), "/orders") == 403
    signing = alone(SSE_SECRET_KEY="k")
    assert status(signing, "/orders") == 403
    with signing.test_request_context():
        signed = sse_url("orders", sign=True)
    assert signed.startswith("/?channel=orders&token=")
    assert status(signing, signed) == 200


def test_an_app_signs_urls_for_it_and_ends_its_streams(
    database_url: str, alone: Alone, make_app: Callable[..., Flask]
) -> None:
    app = make_app(database_url, SECRET_KEY="k", SSE_SERVER_URL="https://live.example.com")
    server = alone(SSE_SECRET_KEY="k")
    with app.app_context():
        signed = sse_url("user-7", expires=60, subject=7)
    assert signed.startswith("https://live.example.com/?channel=user-7&token=")
    events = stream(server.test_client(), signed.removeprefix("https://live.example.com"))
    assert next(events).event == "sse-open"
    with app.app_context():
        disconnect(subject=7)
    assert next(events).json == {"reason": "revoked"}
    events.close()


def test_an_authorizer_closes_the_others(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    app = alone()
    monkeypatch.setattr(SSEBlueprint, "default_authorize", None)
    sse_bp.authorize(lambda channel: channel == "orders")  # also if it is set after the app was made
    try:
        assert [status(app, f"/{name}") for name in ("orders", "secret")] == [200, 403]
    finally:
        del sse_bp.default_authorize


# -- the names of the older projects' senders, which did not quote them


def test_a_stream_hears_what_is_sent_without_quotes(alone: Alone, database_url: str) -> None:
    events = stream(alone().test_client(), "/?channel=Notifications&channel=fence")
    assert next(events).event == "sse-open"
    execute(database_url, "NOTIFY Notifications, 'without quotes'")
    execute(database_url, "NOTIFY \"Notifications\", 'with quotes'")
    execute(database_url, "NOTIFY \"NOTIFICATIONS\", 'another name'")
    assert heard(events, database_url) == ["without quotes", "with quotes"]
    events.close()


def test_names_without_quotes_are_what_postgres_makes_of_them(database_url: str) -> None:
    names = ["Orders", "orders", "ORDERS", "_X9$", "Zoë", "ÄÖÜ", "İI", "user", "a" * 64, "B" * 63, "ß" * 40, "😀A"]
    connection = connect(database_url)
    with connection.cursor() as cursor:
        for name in names:
            cursor.execute(f"SELECT 1 AS {name}")
            [column] = cursor.description
            assert (unquoted(name) or name) == column.name
    connection.close()
    for name in ("user-7", "a b", "9x", "", "$x", 'x"y', "a/b", "x\u007f", "Flask_pg_sse", "FLASK_PG_SSE_x"):
        assert unquoted(name) is None


def test_nothing_comes_twice(alone: Alone, database_url: str) -> None:
    app = alone()
    events = stream(app.test_client(), "/?channel=Orders&channel=ORDERS&channel=orders&channel=fence")
    other = stream(app.test_client(), "/?channel=Orders&channel=fence")
    assert next(events).event == next(other).event == "sse-open"
    sent = [("orders", "1"), ("Orders", "2"), ("ORDERS", "3"), ("orders", "4")]
    assert heard(events, database_url, *sent) == ["1", "2", "3", "4"]
    assert [next(other).data for _ in "1234"] == ["1", "2", "4", "end"]
    events.close()
    other.close()


@pytest.fixture(params=["database_url", "logged_url"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def test_events_of_notify_go_by_the_exact_name(url: str, alone: Alone) -> None:
    app = alone(url)
    events = stream(app.test_client(), "/?channel=Orders&channel=fence")
    assert next(events).event == "sse-open"
    with app.app_context():
        notify("orders", "of the other channel")
        notify("Orders", "of this channel")
    execute(url, "NOTIFY Orders, 'raw'")
    assert heard(events, url) == ["of this channel", "raw"]
    events.close()


def test_only_where_that_name_is_open_too(alone: Alone, database_url: str) -> None:
    def hears(app: Flask, url: str) -> bool:
        events = stream(app.test_client(), url)
        assert next(events).event == "sse-open"
        found = heard(events, database_url, ("orders", "raw"))
        events.close()
        return bool(found)

    listed = "/?channel=Orders&channel=fence"
    assert hears(alone(SSE_CHANNELS="Orders,fence,orders"), listed)
    assert not hears(alone(SSE_CHANNELS="Orders,fence"), listed)
    signing = alone(SSE_SECRET_KEY="k", SSE_CHANNELS="fence")
    with signing.test_request_context():
        both = sse_url(["Orders", "orders"], sign=True).partition("token=")[2]
        one = sse_url("Orders", sign=True).partition("token=")[2]
    assert hears(signing, f"{listed}&token={both}")
    assert not hears(signing, f"{listed}&token={one}")
    asking = alone(SSE_CHANNELS="fence")
    allowed = {"Orders"}
    asking.extensions["pg_sse"].set_hooks(allowed.__contains__, None)
    assert not hears(asking, listed)
    allowed.add("orders")
    assert hears(asking, listed)


def test_a_right_to_that_name_can_be_taken_away(alone: Alone) -> None:
    app = alone(SSE_CHANNELS="Orders,orders", SSE_SECRET_KEY="k")
    events = stream(app.test_client(), "/Orders")
    assert next(events).event == "sse-open"
    with app.app_context():
        disconnect(channel="orders")
    assert next(events).json == {"reason": "revoked"}
    events.close()


def test_a_flask_app_goes_by_the_exact_name(database_url: str, make_app: Callable[..., Flask]) -> None:
    events = stream(make_app(database_url).test_client(), "/sse?channel=Orders&channel=fence")
    assert next(events).event == "sse-open"
    assert heard(events, database_url, ("orders", "raw")) == []
    events.close()


def test_a_name_is_heard_until_its_last_stream_has_left() -> None:
    names = UnquotedNames()
    assert names.add(["Orders", heard_unquoted("orders")]) == ["Orders", "orders"]
    assert names.add([heard_unquoted("orders")]) == ["orders"]
    assert names.add(["orders"]) == ["orders"]  # by its own name
    assert names.remove([heard_unquoted("orders")]) == ["orders"]
    assert names.heard == {"orders": heard_unquoted("orders")}
    assert names.remove(["Orders", heard_unquoted("orders")]) == ["Orders", "orders"]
    assert names.heard == {}


def test_the_start_says_that_all_is_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flask_pg_sse import serve

    monkeypatch.setenv("SSE_DATABASE_URL", database_url)
    monkeypatch.setenv("FLASK_SKIP_DOTENV", "1")
    with caplog.at_level(logging.WARNING):
        serve._serve()
    assert "All channels are open to everybody" in caplog.text
    caplog.clear()
    monkeypatch.setenv("SSE_CHANNELS", "orders")
    serve._serve()
    assert "open" not in caplog.text
