"""The configuration: what each key takes, when it is read, and what an error says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse import ConfigurationError, sse_bp, sse_url
from flask_pg_sse.settings import Settings, key_of, table

LISTS = ["SSE_CHANNELS", "SSE_ALLOWED_ORIGINS"]
NUMBERS = ["SSE_RETRY", "SSE_BUFFER_BYTES", "SSE_MAX_CHANNELS"]


def read(key: str, value: object) -> Any:
    return getattr(Settings.from_config({key: value}), key.removeprefix("SSE_").lower())


def error(key: str, value: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_config({key: value})
    return str(caught.value)


def test_nothing_need_be_set() -> None:
    settings = Settings.from_config({})
    assert settings == Settings()
    assert settings.channels == ()
    assert settings.allowed_origins == ()
    assert (settings.heartbeat, settings.retry, settings.buffer_bytes, settings.max_channels) == (15, 3000, 262144, 100)


@pytest.mark.parametrize("key", [key for key, *_ in table()])
def test_none_is_not_set(key: str) -> None:
    assert Settings.from_config({key: None}) == Settings()


def test_the_table_names_every_key_once_with_words() -> None:
    rows = list(table())
    assert len({key for key, *_ in rows}) == len(rows)
    assert all(key == key_of(key.removeprefix("SSE_").lower()) and expects and help for key, expects, _, help in rows)


# -- lists


@pytest.mark.parametrize("value", [["a", "room-*"], ("a", "room-*"), "a,room-*", " a , room-* "])
def test_a_list_is_a_sequence_or_a_string_with_commas(value: object) -> None:
    assert read("SSE_CHANNELS", value) == ("a", "room-*")


def test_a_list_may_be_a_set() -> None:
    assert set(read("SSE_CHANNELS", {"a", "b"})) == {"a", "b"}
    assert read("SSE_CHANNELS", frozenset("a")) == ("a",)


@pytest.mark.parametrize("value", [[], (), set(), "", "  "])
@pytest.mark.parametrize("key", LISTS)
def test_an_empty_list_is_none(key: str, value: object) -> None:
    assert read(key, value) == ()


@given(st.text(st.characters(exclude_characters=","), min_size=1).map(str.strip).filter(bool))
def test_a_string_is_one_pattern_and_never_its_letters(text: str) -> None:
    assert read("SSE_CHANNELS", text) == (text,)


@pytest.mark.parametrize(
    "value",
    [5, 1.5, True, {"a": 1}, b"a", bytearray(b"a"), [1], ["a", None], [b"a"], [["a"]], [""], "a,,b", ",", object()],
)
@pytest.mark.parametrize("key", LISTS)
def test_what_is_no_list_of_texts_is_refused(key: str, value: object) -> None:
    assert key in error(key, value)
    assert repr(value) in error(key, value)


def test_origins_are_exact_and_in_lower_case() -> None:
    value = ["HTTPS://Example.COM", "http://localhost:5000", "http://[::1]:3000", "capacitor://localhost", "*"]
    assert read("SSE_ALLOWED_ORIGINS", value) == tuple(text.lower() for text in value)
    said = ["https://a.com:443", "http://a.com:80", "https://a.com:80", "http://a.com:443", "https://[::1]:443"]
    as_browsers_do = ("https://a.com", "http://a.com", "https://a.com:80", "http://a.com:443", "https://[::1]")
    assert read("SSE_ALLOWED_ORIGINS", said) == as_browsers_do


@pytest.mark.parametrize(
    "origin",
    [
        "example.com", "https://", "https://*.example.com", "https://example.com/", "https://example.com/path", "null",
        "https://example.com?x", "https://exa mple.com", "https://user@example.com", "https://example.com\n", "//x",
        "**",
    ],
)  # fmt: skip
def test_what_is_no_origin_is_refused(origin: str) -> None:
    assert "SSE_ALLOWED_ORIGINS" in error("SSE_ALLOWED_ORIGINS", [origin])


# -- numbers and texts


@pytest.mark.parametrize(("value", "number"), [(1, 1), (5000, 5000), ("5000", 5000), (" 7 ", 7)])
@pytest.mark.parametrize("key", NUMBERS)
def test_whole_numbers(key: str, value: object, number: int) -> None:
    assert read(key, value) == number
    assert type(read(key, value)) is int


@pytest.mark.parametrize(
    "value",
    [0, -1, "0", "-1", 1.0, 1.5, "1.5", True, False, "true", "", "x", float("nan"), float("inf"), [1], b"1", {}],
)
@pytest.mark.parametrize("key", NUMBERS)
def test_other_values_are_no_whole_number(key: str, value: object) -> None:
    message = error(key, value)
    assert all(part in message for part in (key, repr(value), "whole number from 1 to 2147483647"))


@pytest.mark.parametrize(("value", "number"), [(15, 15.0), (0.5, 0.5), ("2.5", 2.5), ("1e1", 10.0)])
def test_seconds(value: object, number: float) -> None:
    assert read("SSE_HEARTBEAT", value) == number


@pytest.mark.parametrize(
    "value", [0, -1, -0.5, "0", float("nan"), "nan", float("inf"), "inf", 10**400, "", "x", True, [15], b"15", object()]
)
def test_other_values_are_no_seconds(value: object) -> None:
    message = error("SSE_HEARTBEAT", value)
    assert all(part in message for part in ("SSE_HEARTBEAT", repr(value), "number of seconds greater than 0"))


@pytest.mark.parametrize(
    ("value", "base"), [("https://e.org", "https://e.org"), ("http://[::1]:5000/live/", "http://[::1]:5000/live")]
)
def test_server_url(value: str, base: str) -> None:
    assert read("SSE_SERVER_URL", value) == base


@pytest.mark.parametrize(
    "value",
    ["", "e.org", "//e.org", "ftp://e.org", "https://", "https://:80", "https://e.org?x=1", "https://e.org?", "http://[x",
     "https://e.org#x", "https://e.org/\n", "https://e .org", 5, True, b"https://e.org", ["https://e.org"]],
)  # fmt: skip
def test_what_is_no_server_url_is_refused(value: object) -> None:
    message = error("SSE_SERVER_URL", value)
    assert all(part in message for part in ("SSE_SERVER_URL", repr(value), "http"))


# -- databases, whose values may hold a password


@pytest.mark.parametrize("value", [5, 0, 1.5, True, False, b"postgresql://u:hunter2@h/d", [], {}, ()])
@pytest.mark.parametrize("key", ["SSE_DATABASE_URL", "SSE_LISTEN_URL"])
def test_what_is_no_url_at_all_is_refused_without_a_word_of_it(key: str, value: object) -> None:
    message = error(key, value)
    assert key in message
    assert "PostgreSQL URL" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("key", ["SSE_DATABASE_URL", "SSE_LISTEN_URL"])
def test_an_empty_variable_of_the_environment_is_not_set(key: str, value: str) -> None:
    assert read(key, value) is None


@pytest.mark.parametrize("key", [key for key, *_ in table() if "_URL" not in key] + ["SSE_SERVER_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@host/db", "postgresql://:hunt:er2/@hunter2@host?x=1", "x://:hunter2@",
        "https://u:hun'hunter2@h/?x", 'x://u:hun"ter\'hunt@h/?x', "host=h Password=hunter2 user=u",
    ],
)  # fmt: skip
def test_a_url_that_was_given_to_the_wrong_key_does_not_show_its_password(key: str, url: str) -> None:
    if key == "SSE_CHANNELS":
        assert read(key, url)  # a pattern may be anything
        url = f"{url},,"
    for value in (url, [url, 5], {"url": url}):
        if key in ("SSE_SECRET_KEY", "SSE_OPS_TOKEN") and value is url:
            continue  # as good a key as any
        assert "hunt" not in error(key, value)


# -- on, off, or as the database has it


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True), (False, False), (1, True), (0, False), ("true", True), ("TRUE", True), ("1", True),
        ("False", False), ("0", False), ("auto", "auto"), ("Auto", "auto"),
    ],
)  # fmt: skip
def test_the_event_log_is_on_off_or_auto(value: object, expected: object) -> None:
    found = read("SSE_EVENT_LOG", value)
    assert found == expected and type(found) is type(expected)


def test_direct_writes_have_a_word_of_their_own() -> None:
    assert read("SSE_DIRECT_WRITE", "Always") == "always"


def test_the_only_broker_is_this_process() -> None:
    assert read("SSE_BROKER_URL", " memory:// ") == "memory://"
    assert read("SSE_BROKER_URL", "") is None, "an environment file may name it and leave it empty"
    text = error("SSE_BROKER_URL", "redis://:secret@host")
    assert '"memory://"' in text and "secret" not in text
    error("SSE_BROKER_URL", 1)


@pytest.mark.parametrize("value", ["yes", "", 2, -1, 1.0, [], "on", b"1"])
@pytest.mark.parametrize(
    ("key", "word", "other"), [("EVENT_LOG", "auto", "always"), ("DIRECT_WRITE", "always", "AUTO")]
)
def test_another_word_is_an_error(key: str, word: str, other: str, value: object) -> None:
    assert f'true, false or "{word}"' in error(f"SSE_{key}", value)
    assert word in error(f"SSE_{key}", other)


# -- the environment


def test_every_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "DIRECT_WRITE": "0",
        "CHANNELS": "news,room-*",
        "DATABASE_URL": "postgresql://u:p@h/d",
        "LISTEN_URL": "postgresql://u:p@h:5433/d",
        "ALLOWED_ORIGINS": '["https://a.org", "https://b.org"]',
        "SERVER_URL": "https://e.org",
        "EVENT_LOG": "False",
        "LOG_OWNER": "sse_owner",
        "RETENTION": "3600",
        "HEARTBEAT": "2.5",
        "RETRY": "1000",
        "BUFFER_BYTES": "65536",
        "SECRET_KEY": "s3cret",
        "SEND_TIMEOUT": "10",
        "MAX_AGE": "3600",
        "MAX_STREAMS": "500",
        "MAX_STREAMS_PER_CLIENT": "6",
        "MAX_CHANNELS": "5",
        "BROKER_URL": "memory://",
        "OPS_TOKEN": "of the operators",
    }
    assert {f"SSE_{name}" for name in texts} == {key for key, *_ in table()}, "a new key belongs here"
    for name, text in texts.items():
        monkeypatch.setenv(f"FLASK_SSE_{name}", text)
    app = Flask("tests")
    app.config.from_prefixed_env()
    assert Settings.from_config(app.config) == Settings(
        channels=("news", "room-*"),
        database_url="postgresql://u:p@h/d",
        listen_url="postgresql://u:p@h:5433/d",
        allowed_origins=("https://a.org", "https://b.org"),
        server_url="https://e.org",
        event_log=False,
        log_owner="sse_owner",
        retention=3600.0,
        heartbeat=2.5,
        retry=1000,
        buffer_bytes=65536,
        secret_key="s3cret",
        send_timeout=10.0,
        max_age=3600.0,
        max_streams=500,
        max_streams_per_client=6,
        max_channels=5,
        broker_url="memory://",
        direct_write=False,
        ops_token="of the operators",
    )


@pytest.mark.parametrize(
    ("text", "patterns"), [("*", ("*",)), ("[ab]", ("[ab]",)), ("a", ("a",)), ("", ()), ("null", ())]
)
def test_patterns_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, patterns: tuple[str, ...]) -> None:
    monkeypatch.setenv("FLASK_SSE_CHANNELS", text)
    app = Flask("tests")
    app.config.from_prefixed_env()
    assert Settings.from_config(app.config).channels == patterns


@pytest.mark.parametrize("text", ["true", "5", "{}", '{"a": 1}', "[1]", "[null]"])
def test_json_in_the_environment_that_is_no_list_of_texts_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FLASK_SSE_CHANNELS", text)
    app = Flask("tests")
    app.config.from_prefixed_env()
    with pytest.raises(ConfigurationError, match=r"SSE_CHANNELS is .*must be a list of patterns") as caught:
        app.register_blueprint(sse_bp)
    assert repr(json.loads(text)) in str(caught.value)


# -- when it is read


def test_a_wrong_value_is_an_error_at_registration(make_app: Callable[..., Flask]) -> None:
    with pytest.raises(ConfigurationError, match="SSE_RETRY is 'soon', and must be a whole number"):
        make_app(SSE_RETRY="soon")


def test_values_may_change_until_first_use_and_then_stand(make_app: Callable[..., Flask]) -> None:
    app = make_app(SSE_SERVER_URL="https://first.org")
    app.config.update(SSE_SERVER_URL="https://second.org")
    with app.app_context():
        assert sse_url("a") == "https://second.org/?channel=a"
        app.config.update(SSE_SERVER_URL="https://third.org")
        assert sse_url("a") == "https://second.org/?channel=a"


def test_a_wrong_value_that_comes_later_is_an_error_at_first_use(make_app: Callable[..., Flask]) -> None:
    app = make_app()
    app.config.update(SSE_CHANNELS=5)
    with app.app_context(), pytest.raises(ConfigurationError, match="SSE_CHANNELS is 5"):
        sse_url("a")


def test_a_pattern_in_a_string_opens_no_other_channel(make_app: Callable[..., Flask]) -> None:
    client = make_app(SSE_CHANNELS="news*").test_client()
    assert client.head("/sse?channel=news-today").status_code == 200
    for channel in ("orders", "n", "*", "s"):
        assert client.head(f"/sse?channel={channel}").status_code == 403


# -- keys that are no settings


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("SSE_CHANEL", "SSE_CHANNELS"), ("SSE_CHANNEL", "SSE_CHANNELS"), ("sse_channels", "SSE_CHANNELS"),
        ("SSE_HEART_BEAT", "SSE_HEARTBEAT"), ("SSE_HEARTBEAT_INTERVAL", "SSE_HEARTBEAT"),
        ("SSE_DB_URL", "SSE_DATABASE_URL"), ("SSE_EVENTLOG", "SSE_EVENT_LOG"), ("SSE_SECRET", "SSE_SECRET_KEY"),
        ("SSE_MAX_STREAM", "SSE_MAX_STREAMS"), ("SSE_ALLOW_ORIGINS", "SSE_ALLOWED_ORIGINS"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_warned_about_with_the_one_that_was_meant(
    caplog: pytest.LogCaptureFixture, key: str, meant: str
) -> None:
    app = Flask("tests")
    app.config[key] = "hunter2"
    app.register_blueprint(sse_bp)
    [warning] = caplog.records
    assert (warning.levelname, repr(key) in caplog.text) == ("WARNING", True)
    assert warning.getMessage().endswith(f"Did you mean {meant}?")
    assert "hunter2" not in caplog.text


def test_a_key_that_is_like_no_other_is_warned_about_too(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("tests")
    app.config["SSE_QWXYZ"] = 1
    app.register_blueprint(sse_bp)
    assert ["'SSE_QWXYZ' is not a setting" in text for text in caplog.messages] == [True]


def test_settings_and_keys_of_other_packages_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("tests")
    app.config.update({key: default for key, _, default, _ in table()})
    # flask-sse and invenio-sse have the first, forks of flask-sse the others.
    app.config.update(SSE_REDIS_URL="redis://", SSE_REDIS_TIMEOUT=10, SSE_REDIS_CHANNEL_KEY_PREFIX="", REDIS_URL="")
    app.register_blueprint(sse_bp)
    assert not caplog.records


def test_a_key_that_is_set_after_the_registration_is_warned_about_at_first_use_and_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Flask("tests")
    app.config["SSE_CHANEL"] = "a"
    app.register_blueprint(sse_bp)
    app.register_blueprint(sse_bp, name="again", url_prefix="/again")
    app.config.from_mapping(SSE_HEART_BEAT=5)
    for _ in range(2):
        with app.test_request_context():
            sse_url("a")
    assert [text.split("'")[1] for text in caplog.messages] == ["SSE_CHANEL", "SSE_HEART_BEAT"]


def test_a_secret_of_digits_from_the_environment_is_refused_with_the_way_to_write_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_SSE_OPS_TOKEN", "12345678")
    app = Flask("tests")
    app.config.from_prefixed_env()
    with pytest.raises(ConfigurationError, match="FLASK_… variable digits are a number; write '\"…\"'") as raised:
        Settings.from_config(app.config)
    assert "1234" not in str(raised.value)
    monkeypatch.setenv("FLASK_SSE_OPS_TOKEN", '"12345678"')
    app.config.from_prefixed_env()
    assert Settings.from_config(app.config).ops_token == "12345678"
