"""Signed URLs: what a token opens, for how long, under which keys, and that it stands for nothing else."""

from __future__ import annotations

import base64
import json
import time
import uuid
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
from flask import Flask, session
from hypothesis import example, given
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer, URLSafeTimedSerializer

from flask_pg_sse import ConfigurationError, sse_bp, sse_url
from flask_pg_sse.testing import stream
from flask_pg_sse.tokens import (
    Question,
    Token,
    read_answer,
    read_disconnect,
    read_question,
    read_token,
    sign_answers,
    sign_disconnect,
    sign_question,
    sign_token,
)

MakeApp = Callable[..., Flask]
KEY = "a secret"


def make_url(app: Flask, *args: Any, **options: Any) -> str:
    with app.test_request_context():
        return sse_url(*args, **options)


def token_of(url: str) -> str:
    return parse_qs(urlsplit(url).query)["token"][0]


def first(app: Flask, url: str) -> tuple[str, Any]:
    """Return the first event of a stream and its data.

    One whose right was checked before the worker heard commands is told to come back at once, as a browser does.
    """
    for _ in range(2):
        with stream(app.test_client(), url) as events:
            event = next(events)
        if event.event == "sse-open" or event.json["reason"] != "unavailable":
            break
    return event.event, event.json


def assert_open(app: Flask, url: str) -> None:
    assert first(app, url) == ("sse-open", {})


def assert_refused(app: Flask, url: str, why: str = "is not open to you") -> None:
    response = app.test_client().get(url)
    assert (response.status_code, response.mimetype) == (403, "text/plain")
    assert why in response.get_data(as_text=True)


# -- what it opens


@pytest.fixture
def app(database_url: str, make_app: MakeApp) -> Flask:
    return make_app(database_url, SSE_CHANNELS=[], SECRET_KEY=KEY)


def test_a_token_opens_exactly_its_channels(app: Flask) -> None:
    url = make_url(app, ["a", "b"], sign=True)
    assert_open(app, url)
    token = token_of(url)
    for query in ("channel=a", "channel=b", "channel=b&channel=a"):
        assert_open(app, f"/sse?{query}&token={token}")
    assert_open(app, f"/sse/a?token={token}")
    for query in (
        "channel=c",
        "channel=a&channel=c",
        "channel=A",
        "channel=a,b",
        "channel=a*",
        "channel=",
        "channel=a%00",
    ):
        assert app.test_client().get(f"/sse?{query}&token={token}").status_code in (400, 403), query
    assert_refused(app, "/sse?channel=a")


def test_a_token_for_a_pattern_or_a_comma_is_for_a_channel_of_that_name(app: Flask) -> None:
    for name in ("*", "a?", "[ab]", "a,b"):
        token = token_of(make_url(app, name, sign=True))
        assert_open(app, make_url(app, name) + f"&token={token}")
        assert_refused(app, f"/sse?channel=a&token={token}")
        assert_refused(app, f"/sse?channel=b&token={token}")


def test_beside_a_token_the_other_ways_go_on(database_url: str, make_app: MakeApp) -> None:
    app = make_app(database_url, SSE_CHANNELS=["news"], SECRET_KEY=KEY)
    token = token_of(make_url(app, "mine", sign=True))
    assert_open(app, f"/sse?channel=mine&channel=news&token={token}")
    assert_open(app, "/sse?channel=news&token=rubbish")
    assert_refused(app, "/sse?channel=mine&channel=news&token=rubbish", "the URL's token is not one of this site's")


@pytest.mark.parametrize("name", ["é😀", "two words", "a/b", "a&b=c", "%41", "+", "#x", "x" * 255, "\u2028", "é" * 127])
def test_any_channel_can_be_signed(app: Flask, name: str) -> None:
    assert_open(app, make_url(app, name, sign=True))


def test_as_many_channels_as_a_stream_may_have(app: Flask) -> None:
    assert_open(app, make_url(app, [f"{'é' * 125}{number:03}" for number in range(100)], expires=60))


def test_more_channels_than_a_stream_may_have(make_app: MakeApp) -> None:
    app = make_app(None, SSE_MAX_CHANNELS=2)
    with app.test_request_context():
        assert sse_url(["a", "b", "a"]).count("channel=") == 3
        with pytest.raises(ValueError, match=r"at most 2\. Open several streams, or raise SSE_MAX_CHANNELS\."):
            sse_url(["a", "b", "c"])
    elsewhere = make_app(None, SSE_MAX_CHANNELS=2, SSE_SERVER_URL="https://e.org")
    with elsewhere.app_context():
        assert sse_url(["a", "b", "c"]), "the server there has a limit of its own"


def test_the_url(app: Flask) -> None:
    """Channels in clear, then the rest, the token last."""
    url = make_url(app, ["a", "b"], expires=60, subject=7, cursor=5)
    names = [name for name, _ in parse_qsl(urlsplit(url).query)]
    assert names == ["channel", "channel", "last_event_id", "token"]
    assert url.startswith("/sse?channel=a&channel=b&last_event_id=5&token=")
    unsigned: list[dict[str, Any]] = [{}, {"sign": False}, {"cursor": 5}]
    signed: list[dict[str, Any]] = [{"sign": True}, {"expires": 60}, {"subject": "7"}]
    assert not any("token" in make_url(app, "a", **options) for options in unsigned)
    assert all("token=" in make_url(app, "a", **options) for options in signed)


def test_a_token_is_absolute_under_the_server_url(make_app: MakeApp) -> None:
    app = make_app(SSE_SERVER_URL="https://live.example.com/x", SECRET_KEY=KEY)
    assert make_url(app, "a", sign=True).startswith("https://live.example.com/x/?channel=a&token=")


@pytest.mark.parametrize("name", ["", "a\nb", "flask_pg_sse", "flask_pg_sse.x", "x" * 256])
def test_what_no_stream_can_have_is_not_signed_and_not_opened_by_a_token(app: Flask, name: str) -> None:
    with pytest.raises(ValueError):
        make_url(app, name, sign=True)
    forged = sign_token([KEY], Token(frozenset([name])))
    assert app.test_client().get("/sse", query_string={"channel": name, "token": forged}).status_code == 400


# -- for how long


def test_an_expired_token_gets_its_end_and_never_data(app: Flask) -> None:
    url = make_url(app, "a", expires=0.001)
    time.sleep(0.002)
    assert first(app, url) == ("sse-end", {"reason": "expired"})
    with app.test_client().get(url) as response:
        block = response.get_data()
    assert block.startswith(b"retry: ") and block.count(b"\n\n") == 1
    assert app.extensions["pg_sse"].runtime.worker._streams is None, "nothing has been started for it"
    assert app.test_client().head(url).status_code == 200


def test_the_position_comes_back_with_the_end(app: Flask) -> None:
    """So that a page which fetches a new URL can go on from there."""
    url = make_url(app, "a", expires=0.001, cursor=17)
    time.sleep(0.002)
    for header, expected in (({}, "17"), ({"Last-Event-ID": "23"}, "23"), ({"Last-Event-ID": "x\x80"}, "")):
        with app.test_client().get(url, headers=header) as response:
            ids = [line for line in response.get_data(as_text=True).split("\n") if line.startswith("id")]
        assert ids == ([f"id: {expected}"] if expected else [])


def retry_of(app: Flask, expired_for: float) -> float:
    """Return the seconds after which a client comes back whose token expired so many seconds ago."""
    token = sign_token([KEY], Token(frozenset("a"), time.time() - expired_for))
    with app.test_client().get("/sse", query_string={"channel": "a", "token": token}) as response:
        lines = response.get_data(as_text=True).split("\n")
    assert 'data: {"reason": "expired"}' in lines
    return int(lines[0].removeprefix("retry: ")) / 1000


@pytest.mark.parametrize(
    ("expired_for", "least", "most"), [(0.01, 1.5, 4.5), (60, 30, 91), (2000, 1000, 3001), (10**8, 1200, 3600)]
)
def test_the_longer_ago_a_token_expired_the_later_its_client_comes_back(
    app: Flask, expired_for: float, least: float, most: float
) -> None:
    retries = [retry_of(app, expired_for) for _ in range(20)]
    assert all(least <= retry <= most for retry in retries)
    assert max(retries) - min(retries) > (most - least) / 10, "clients that expired together do not come together"


def test_a_page_that_ignores_expired_asks_a_few_times_a_day(app: Flask) -> None:
    """Such a page comes back with the same URL each time, and nobody remembers it."""
    now = attempts = 0.0
    while now < 86400:
        now += retry_of(app, now + 0.01)
        attempts += 1
    assert attempts < 100


def test_a_retry_that_is_longer_already_is_kept(app: Flask) -> None:
    app.config["SSE_RETRY"] = 86_400_000
    assert retry_of(app, 10**8) >= 43_200


def test_a_stream_ends_when_its_token_expires(app: Flask) -> None:
    assert_open(app, make_url(app, "a", sign=True))  # it listens already when the time begins
    began = time.monotonic()
    events = stream(app.test_client(), make_url(app, "a", expires=2))
    assert next(events).event == "sse-open"
    end = next(events)
    assert (end.event, end.json) == ("sse-end", {"reason": "expired"})
    assert time.monotonic() - began > 1
    assert list(events) == []


@pytest.mark.parametrize("expires", [60, 60.5, timedelta(minutes=1), timedelta(days=400), 10**9])
def test_times_until_the_end(app: Flask, expires: Any) -> None:
    assert_open(app, make_url(app, "a", expires=expires))


@pytest.mark.parametrize("expires", [0, -1, float("nan"), float("inf"), 1e300, timedelta(0), timedelta(-1)])
def test_times_that_are_none(app: Flask, expires: Any) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        make_url(app, "a", expires=expires)


@pytest.mark.parametrize("expires", ["60", True, [60], b"1"])
def test_times_of_another_type(app: Flask, expires: Any) -> None:
    with pytest.raises(TypeError, match="a number of seconds or a timedelta"):
        make_url(app, "a", expires=expires)


# -- for whom


@pytest.mark.parametrize("subject", ["7", 7, uuid.UUID(int=7), "é😀", "x" * 255, "a b"])
def test_subjects(subject: Any) -> None:
    text = str(subject)
    assert read_token([KEY], sign_token([KEY], Token(frozenset("a"), None, text))) == Token(frozenset("a"), None, text)


@pytest.mark.parametrize("subject", ["", "x" * 256, "\ud800"])
def test_subjects_that_are_none(app: Flask, subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        make_url(app, "a", subject=subject)


@pytest.mark.parametrize("subject", [True, 1.5, b"7", ["7"], object()])
def test_subjects_of_another_type(app: Flask, subject: Any) -> None:
    with pytest.raises(TypeError, match="subject is a string, a whole number or a UUID"):
        make_url(app, "a", subject=subject)


# -- keys


def test_without_a_key_nothing_is_signed_and_no_token_counts(make_app: MakeApp) -> None:
    app = make_app(SSE_CHANNELS=[])
    with pytest.raises(ConfigurationError, match=r"sse_url\(\) that signs needs a secret key: set SECRET_KEY"):
        make_url(app, "a", sign=True)
    for key in ("", "None", "x"):
        assert_refused(app, f"/sse?channel=a&token={sign_token([key], Token(frozenset('a')))}")


def test_another_app_that_knows_only_the_key(database_url: str, app: Flask, make_app: MakeApp) -> None:
    """A relay on another host: another name, another prefix, no authorizer, no public channels."""
    url = make_url(app, ["a", "b"], expires=60, subject=7)
    relay = Flask("another")
    relay.config.update(SSE_DATABASE_URL=database_url, SSE_SECRET_KEY=KEY, SECRET_KEY="its own")
    relay.register_blueprint(sse_bp, url_prefix="/", name="live")
    assert_open(relay, url.replace("/sse?", "/?"))
    relay.extensions["pg_sse"].close()
    assert_refused(make_app(SSE_CHANNELS=[], SECRET_KEY="another"), url)


def test_keys_are_replaced_without_a_break(app: Flask, make_app: MakeApp) -> None:
    old_url = make_url(app, "a", sign=True)
    database_url = app.config["SSE_DATABASE_URL"]
    new = make_app(database_url, SSE_CHANNELS=[], SECRET_KEY="new", SECRET_KEY_FALLBACKS=[KEY, "older"])
    assert_open(new, old_url)
    new_url = make_url(new, "a", sign=True)
    assert_open(new, new_url)
    assert_refused(app, new_url, "token is not one of this site's")  # the old key does not sign any more
    without = make_app(database_url, SSE_CHANNELS=[], SECRET_KEY="new")
    assert_refused(without, old_url)
    assert_open(without, new_url)


def test_the_fallbacks_are_taken_beside_a_key_of_its_own(app: Flask, make_app: MakeApp) -> None:
    url = make_url(app, "a", sign=True)
    config = {"SECRET_KEY": "the app's", "SSE_SECRET_KEY": "new", "SECRET_KEY_FALLBACKS": [KEY]}
    assert_open(make_app(app.config["SSE_DATABASE_URL"], SSE_CHANNELS=[], **config), url)


@pytest.mark.parametrize("key", [b"bytes", "é", b"\xff\x00", "x" * 1000])
def test_kinds_of_keys(make_app: MakeApp, key: Any) -> None:
    app = make_app(SECRET_KEY=key)
    assert read_token([key], token_of(make_url(app, "a", sign=True))) == Token(frozenset("a"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"SECRET_KEY": "x", "SECRET_KEY_FALLBACKS": "old"}, "SECRET_KEY_FALLBACKS is a str, and must be a list"),
        ({"SECRET_KEY": "x", "SECRET_KEY_FALLBACKS": [""]}, "SECRET_KEY_FALLBACKS holds empty"),
        ({"SECRET_KEY": "x", "SECRET_KEY_FALLBACKS": [5]}, "SECRET_KEY_FALLBACKS holds a value of type int"),
        ({"SECRET_KEY": 5}, "SECRET_KEY holds a value of type int"),
        ({"SSE_SECRET_KEY": ""}, "SSE_SECRET_KEY"),
        ({"SSE_SECRET_KEY": ["hunter2"]}, "SSE_SECRET_KEY"),
    ],
)
def test_keys_that_are_none_are_said_at_registration(make_app: MakeApp, config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        make_app(**config)
    assert "hunter2" not in str(caught.value)


# -- it stands for nothing else, and nothing else for it


def test_nothing_else_that_the_app_signs_is_a_token(app: Flask) -> None:
    @app.get("/login")
    def login() -> str:
        session.update(c=["a"], s="7")
        return ""

    cookie = app.test_client().get("/login").headers["Set-Cookie"].split("=", 1)[1].split(";")[0]
    content = {"c": ["a"]}
    others = [
        cookie,
        sign_disconnect([KEY], None, "a", 7),
        sign_question([KEY], Question("a", 7)),
        sign_answers([KEY], "a", [{"c": "a"}])[0],
        URLSafeSerializer(KEY).dumps(content),
        URLSafeTimedSerializer(KEY, salt="cookie-session").dumps(content),
        URLSafeSerializer(KEY, salt="flask_pg_sse").dumps(content),
        URLSafeSerializer(KEY, salt="flask_pg_sse: a stream's channels").dumps(content),  # SHA-1
    ]
    for text in others:
        assert read_token([KEY], str(text)) is None, text
        assert_refused(app, f"/sse?channel=a&token={text}")


def test_an_answer_fits_into_notifications_and_only_its_question_can_be_read_from_it() -> None:
    worker = {"name": "4194304-0123abcd", "host": "é" * 64, "version": "10.10.10.dev1", "listener": "not started"}
    counts = ("pid", "streams", "behind", "channels", "delivered", "bytes", "lag", "memory", "state")
    workers = [{**worker, **dict.fromkeys(counts, 2**60 + number)} for number in range(64)]
    texts = sign_answers([KEY, "new"], "nonce", workers)
    assert len(texts) > 1 and all(len(text) < 8000 and text.isascii() for text in texts)
    assert [one for text in texts for one in read_answer([KEY, "new"], text, "nonce")] == workers
    for keys, nonce in (([KEY], "nonce"), ([KEY, "new"], "another"), ([], "nonce")):
        assert read_answer(keys, texts[0], nonce) == []
    question = Question("channel", 7)
    assert read_question(["new", KEY], sign_question(["new"], question)) == question
    others = [sign_disconnect([KEY], "channel", None, 7), *sign_answers([KEY], "channel", []), *texts, "x"]
    assert [read_question([KEY, "new"], text) for text in others] == [None] * len(others)


def test_a_token_is_nothing_else(app: Flask) -> None:
    token = token_of(make_url(app, "a", expires=60, subject="7"))
    assert read_disconnect([KEY], token) is None

    @app.get("/who")
    def who() -> dict[str, Any]:
        return dict(session)

    client = app.test_client()
    client.set_cookie("session", token)
    assert client.get("/who").json == {}


def test_tampering(app: Flask) -> None:
    """No part may be another's, no bit may differ."""
    token = token_of(make_url(app, "a", sign=True))
    other = token_of(make_url(app, "b", sign=True))
    payload, signature = token.rsplit(".", 1)
    changed = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(len(token))]
    changed[-1:] = []  # the last letter of base64 holds bits that do not count
    changed += [
        f"{other.rsplit('.', 1)[0]}.{signature}", payload, f"{payload}.", f".{signature}", f".{payload}.{signature}",
        signature, f"{token}.{signature}", f"{token}\n", f" {token}", token.upper(), "null", "e30.", ".", "..", "\0",
        base64.urlsafe_b64encode(json.dumps({"c": ["a"]}).encode()).decode() + "." + signature,
        "." + base64.urlsafe_b64encode(zlib.compress(b"x" * 10_000_000)).decode() + "." + signature,
    ]  # fmt: skip
    for text in changed:
        assert read_token([KEY], text) is None, text
    for text in changed[:: max(1, len(changed) // 20)]:
        response = app.test_client().get("/sse", query_string={"channel": "a", "token": text})
        assert response.status_code in (403, 414), text


def test_bytes_that_are_not_utf_8_are_no_token(app: Flask) -> None:
    """Werkzeug gives them as lone surrogates."""
    assert_refused(app, "/sse?channel=a&token=%80")
    assert_refused(app, f"/sse?channel=a&token={token_of(make_url(app, 'a', sign=True))}%80")


@given(st.text(st.characters()), st.sampled_from([[], [KEY], [b"x", KEY]]))
@example("\udc80", [KEY])
def test_any_text_is_no_token(text: str, keys: list[str]) -> None:
    assert read_token(keys, text) is None and read_disconnect(keys, text) is None


@given(
    st.frozensets(st.text(st.characters(codec="utf-8"), min_size=1), max_size=5),
    st.none() | st.floats(0, 1e10),
    st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_what_is_signed_is_read(channels: frozenset[str], expires_at: float | None, subject: str | None) -> None:
    text = sign_token([KEY], Token(channels, expires_at, subject))
    assert text.isascii() and not set(text) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    found = read_token(["older", KEY], text)
    assert found is not None
    assert (found.channels, found.subject) == (channels, subject)
    assert found.expires_at == (None if expires_at is None else pytest.approx(expires_at, abs=0.001))


# -- the command


def run(app: Flask, *args: str) -> Any:
    return app.test_cli_runner().invoke(args=["sse", "sign", *args])


def test_the_command_prints_a_url_that_opens(app: Flask) -> None:
    result = run(app, "a", "b", "--expires", "60", "--subject", "7")
    assert result.exit_code == 0
    url = result.output.strip()
    assert url.startswith("/sse?channel=a&channel=b&token=")
    assert_open(app, url)
    token = read_token([KEY], token_of(url))
    assert token is not None and token.subject == "7" and token.channels == {"a", "b"}
    assert token.expires_at is not None and 50 < token.expires_at - time.time() <= 60


def test_the_command_without_an_end(app: Flask) -> None:
    token = read_token([KEY], token_of(run(app, "a").output.strip()))
    assert token == Token(frozenset("a"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["flask_pg_sse"], "reserved"),
        (["a", "--expires", "0"], "greater than 0"),
        (["a", "--expires", "x"], "not a valid float"),
        (["a", "--subject", ""], "1 to 255 bytes"),
        ([], "Missing argument"),
    ],
)
def test_the_command_says_what_is_wrong(app: Flask, args: list[str], said: str) -> None:
    result = run(app, *args)
    assert result.exit_code != 0 and said in result.output and "Traceback" not in result.output


def test_the_command_without_a_key(make_app: MakeApp) -> None:
    result = run(make_app(), "a")
    assert result.exit_code == 1
    assert "The URL was not signed: " in result.output and "SECRET_KEY" in result.output
