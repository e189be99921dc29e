"""One stream with several tokens: each opens its own channels, until it expires, and all are for one subject."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

import pytest
from flask import Flask

from flask_pg_sse.testing import stream
from flask_pg_sse.tokens import Token, sign_token
from tests.http.test_tokens import KEY, assert_open, assert_refused, first, make_url
from tests.support.client import opened, request
from tests.support.postgres import execute
from tests.support.servers import WebServer

MakeApp = Callable[..., Flask]
EXPIRED = ("sse-end", {"reason": "expired"})
NAMES = [f"order-{uuid.uuid5(uuid.NAMESPACE_DNS, str(number))}" for number in range(60)]


def token(channels: str, expires_in: float | None = None, subject: str | None = None, key: str = KEY) -> str:
    expires_at = None if expires_in is None else time.time() + expires_in
    return sign_token([key], Token(frozenset(channels), expires_at, subject))


def url_of(channels: str, *tokens: str) -> str:
    return "/sse?" + "&".join([*(f"channel={name}" for name in channels), *(f"token={text}" for text in tokens)])


@pytest.fixture
def app(database_url: str, make_app: MakeApp) -> Flask:
    return make_app(database_url, SSE_CHANNELS=["news"], SECRET_KEY=KEY)


def channels_of(app: Flask, url: str) -> set[str]:
    """Return the channels of a stream that is open."""
    opened: list[object] = []
    response = app.test_client().get(url, environ_overrides={"flask_pg_sse.testing": opened})
    assert response.status_code == 200, response.text
    response.close()
    [subscription] = opened
    return set(subscription.channels)  # type: ignore[attr-defined]


def test_each_token_opens_its_own_channels(app: Flask) -> None:
    one, other = token("ab"), token("c")
    assert channels_of(app, url_of("abc", one, other)) == {"a", "b", "c"}
    assert channels_of(app, url_of("bc", one, other)) == {"b", "c"}
    assert channels_of(app, f"/sse/a?channel=c&channel=news&token={one}&token={other}") == {"a", "c", "news"}
    assert_refused(app, url_of("abcd", one, other), "Channel 'd' is not open to you")
    assert_refused(app, url_of("ac", one), "Channel 'c' is not open to you")


def test_tokens_that_alone_have_the_names(app: Flask) -> None:
    assert channels_of(app, url_of("", token("ab"), token("c"))) == {"a", "b", "c"}
    long = make_url(app, ["a", *NAMES], sign=True)
    assert "channel=" not in long
    # A tab listens to a, and another to a and many more: the name in clear does not hide those.
    assert channels_of(app, f"{long}&channel=a&channel=news&token={token('a')}") == {"a", "news", *NAMES}


def test_a_token_that_is_not_authentic_opens_nothing(app: Flask) -> None:
    ours, forged = token("a"), token("b", key="another")
    for order in ((ours, forged), (forged, ours)):
        assert channels_of(app, url_of("a", *order)) == {"a"}
        assert_refused(app, url_of("ab", *order), "a token of the URL is not one of this site's")
        assert_refused(app, url_of("", *order), "not this site's, or was cut off")  # it alone has its channels


def test_an_open_stream_with_a_token_that_is_not_authentic_is_logged(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """What that token alone names is not heard, and nobody can know it."""
    assert_open(app, url_of("a", token("a")))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert_open(app, url_of("a", token("a"), "cut-off"))
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("A token of the URL is not one of this site's, or was cut off")
    assert "cut-off" not in caplog.text


def test_tokens_of_different_subjects_are_refused(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    seven, eight, anybodys = token("a", subject="7"), token("b", 60, "8"), token("c")
    for url in (url_of("ab", seven, eight), url_of("", eight, anybodys, seven), url_of("news", seven, eight)):
        assert_refused(app, url, "The URL's tokens are signed for different subjects")
    assert "different subjects" in caplog.text and seven not in caplog.text
    assert_open(app, url_of("abc", seven, token("b", subject="7"), anybodys))
    assert_open(app, url_of("a", seven, token("b", subject="8", key="another")))  # that one is for nobody
    # A user is another one now, and a tab has an old URL: the page fetches a new one.
    assert first(app, url_of("ab", seven, token("b", -1, "8"))) == EXPIRED
    assert_open(app, url_of("a", seven, token("a", -1, "8")))


def test_the_apps_subject_and_the_tokens_subject_may_differ(app: Flask) -> None:
    """As with one token: a user may open a URL that was signed for another, and `disconnect()` finds it by both."""
    app.extensions["pg_sse"].set_hooks(None, lambda: "9")
    assert_open(app, url_of("ab", token("a", subject="7"), token("b", subject="7")))


def test_an_expired_token_that_is_needed_ends_the_stream_at_once(app: Flask) -> None:
    valid, expired = token("a", 60), token("b", -1)
    assert first(app, url_of("ab", valid, expired)) == first(app, url_of("", expired, valid)) == EXPIRED
    assert app.extensions["pg_sse"].runtime.worker._streams is None, "nothing has been started for it"
    for instead in (token("ab", 60), token("b")):
        assert_open(app, url_of("ab", valid, expired, instead))


def test_a_stream_ends_when_the_first_token_expires_that_it_needs(app: Flask) -> None:
    assert_open(app, url_of("ab", token("ab")))  # it listens already when the time begins
    began = time.monotonic()
    unneeded, needed = token("a", 0.1), token("b", 2)
    events = stream(app.test_client(), url_of("ab", unneeded, token("a", 60), needed))
    assert next(events).event == "sse-open"
    end = next(events)
    assert (end.event, end.json) == EXPIRED
    assert time.monotonic() - began > 1
    assert list(events) == []


def test_a_name_that_is_heard_without_quotes_lasts_as_long_as_its_own_token(app: Flask) -> None:
    """As on the server that stands alone: a stream on News also hears what is sent to news, if a token opens that."""
    app.extensions["pg_sse"].hears_unquoted = True
    lasting = sign_token([KEY], Token(frozenset(["News"])))
    for seconds, found in ((60, ("sse-open", {})), (-1, EXPIRED)):
        both = sign_token([KEY], Token(frozenset(["News", "news"]), time.time() + seconds))
        assert first(app, f"/sse/News?token={lasting}&token={both}") == found
    assert_open(app, f"/sse/News?token={lasting}")


def test_as_many_tokens_as_a_stream_may_have_channels(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=[], SSE_MAX_CHANNELS=3, SECRET_KEY=KEY)
    tokens = [token(name) for name in "abcd"]
    assert channels_of(app, url_of("", *tokens[:3])) == {"a", "b", "c"}
    response = app.test_client().get(url_of("abc", *tokens))
    assert response.status_code == 414 and "4 tokens, and one stream has at most 3 channels" in response.text
    response = app.test_client().get(url_of("", token("ab"), token("cd")))
    many = "4 channels, and one stream has at most 3. Open several streams, or raise SSE_MAX_CHANNELS."
    assert response.status_code == 400 and many in response.text


@pytest.mark.slow
def test_under_gunicorn(database_url: str, start_server: Callable[..., WebServer]) -> None:
    """Every channel is heard, `disconnect()` ends it by the subject, and no token is in the access log."""
    server = start_server(
        database_url, "--access-logfile", "-", app="tests.support.apps.members:app", FLASK_SECRET_KEY=KEY
    )
    tokens = [token("x", 600), token("y", 600, "7"), token("z", subject="7")]
    with opened(lambda: request(server.port, url_of("xy", *tokens))) as response:
        for name in "xyz":
            execute(database_url, "SELECT pg_notify(%s, 'to ' || %s)", (name, name))
            assert response.event().data == f"to {name}"
        server.post("/disconnect", b'{"subject": "7"}')
        end = response.event()
        assert (end.event, end.json) == ("sse-end", {"reason": "revoked"})
        response.wait_closed()
    with request(server.port, url_of("x", tokens[0], token("x", subject="8"), tokens[1])) as response:
        assert response.status == 403 and "different subjects" in response.read().decode()
    server.stop()
    assert "GET /sse?channel=x&channel=y&token=***&token=***&token=*** HTTP/1.1" in server.log()
    assert not [text for text in tokens if text.rpartition(".")[2] in server.log()]
