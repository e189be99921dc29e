"""The tokens of one URL: which channels they name and open, when they expire, for which subject, and how many."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.tokens import Token, Tokens, read_token, read_tokens, sign_token, without_token
from flask_pg_sse.web.request import parse_query

KEY = "a secret"
CHANNELS = st.frozensets(st.sampled_from("abcd"), min_size=1)
TOKENS = st.builds(Token, CHANNELS, st.none() | st.floats(0, 100), st.none() | st.sampled_from("12"), st.booleans())


def token(channels: str, expires_at: float | None = None, subject: str | None = None, *, alone: bool = False) -> Token:
    return Token(frozenset(channels), expires_at, subject, alone)


@pytest.mark.parametrize(
    ("named", "tokens", "channels"),
    [
        ("", [token("a")], "a"),
        ("", [token("b"), token("ca")], "bac"),
        ("a", [token("a"), token("b")], "ab"),
        ("a", [token("ab")], "a"),  # the URL chooses
        ("a", [token("a"), token("ab")], "a"),
        ("a", [token("a"), token("ab", alone=True)], "aab"),
        ("c", [token("ab")], "cab"),
        ("b", [], "b"),
    ],
)
def test_the_channels_are_those_that_the_url_names_and_those_that_a_token_alone_has(
    named: str, tokens: list[Token], channels: str
) -> None:
    assert Tokens(tokens).channels_with(list(named)) == list(channels)


@pytest.mark.parametrize(
    ("tokens", "channels", "at"),
    [
        ([], "a", math.inf),
        ([token("a", 5)], "a", 5),
        ([token("a", 5), token("b", 7)], "ab", 5),
        ([token("a", 5), token("b", 7)], "b", 7),
        ([token("a", 5), token("ab", 7)], "ab", 7),  # nothing needs the first
        ([token("a"), token("ab", 7)], "a", math.inf),
        ([token("ab", 7), token("a")], "ab", 7),
        ([token("a", 5)], "c", math.inf),  # it is open in another way, or refused
    ],
)
def test_a_stream_lasts_until_its_first_channel_has_lost_its_last_token(
    tokens: list[Token], channels: str, at: float
) -> None:
    assert Tokens(tokens).expires_at(channels) == at


@given(st.lists(TOKENS), CHANNELS, st.floats(0, 100))
def test_every_channel_of_a_token_has_one_in_force_as_long_as_the_stream_lasts(
    tokens: list[Token], channels: frozenset[str], now: float
) -> None:
    def opens(token: Token, channel: str) -> bool:
        return channel in token.channels and (token.expires_at is None or token.expires_at > now)

    signed = [channel for channel in channels if channel in Tokens(tokens).channels]
    in_force = all(any(opens(token, channel) for token in tokens) for channel in signed)
    assert in_force == (Tokens(tokens).expires_at(channels) > now)


def test_an_expired_token_is_for_nobody() -> None:
    tokens = Tokens([token("a", 5, "1"), token("b", 7, "2"), token("c")])
    assert [tokens.subjects(now) for now in (4, 5, 7)] == [{"1", "2"}, {"2"}, set()]


def test_only_authentic_tokens_count_and_each_once() -> None:
    one, other, forged = sign_token([KEY], token("a")), sign_token([KEY], token("b")), sign_token(["x"], token("c"))
    tokens = read_tokens([KEY], [one, "", other, forged, one, "rubbish", forged])
    assert tokens == Tokens([token("a"), token("b")], others=2)
    assert tokens.channels == {"a", "b"}
    assert read_tokens([KEY], []) == read_tokens([KEY], ["", ""]) == Tokens([], 0)


def test_a_token_says_that_it_alone_has_the_names() -> None:
    for alone in (True, False):
        assert read_token([KEY], sign_token([KEY], token("ab", alone=alone))) == token("ab", alone=alone)


def test_a_query_has_at_most_as_many_tokens_as_a_stream_has_channels() -> None:
    """Their signatures are verified before anything else is known about the client."""
    assert len(parse_query(b"&".join([b"token=x"] * 100), 100)["token"]) == 100
    with pytest.raises(ValueError, match="has 101 tokens, and one stream has at most 100 channels"):
        parse_query(b"&".join([b"token=x"] * 50 + [b"tok%65n=x"] * 51), 100)


def test_every_token_is_masked() -> None:
    url = "/sse?token=one&channel=a&token=two&tok%65n=three&last_event_id=5&token=four"
    assert without_token(url) == "/sse?token=***&channel=a&token=***&tok%65n=***&last_event_id=5&token=***"
    assert without_token("token=one&token=two") == "token=***&token=***"
