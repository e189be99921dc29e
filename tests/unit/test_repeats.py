"""Which of many equal messages are logged: judged by the messages and the clock alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.repeats import Repeats, duration, one_line, printable, sentence, times


def logged(repeats: Repeats, kind: str, seconds: range) -> dict[int, int]:
    """Count a message in each of these seconds; return the seconds at which one was to be logged, and its number."""
    return {now: number for now in seconds if (number := repeats.count(kind, now))}


def test_the_first_is_logged_at_once_and_the_next_ones_ever_more_rarely() -> None:
    repeats = Repeats(first=60, most=240)
    assert logged(repeats, "away", range(0, 1000, 5)) == {0: 1, 60: 12, 180: 24, 420: 48, 660: 48, 900: 48}


def test_one_line_a_minute() -> None:
    assert logged(Repeats(60, 60), "full", range(0, 200, 5)) == {0: 1, 60: 12, 120: 12, 180: 12}


def test_another_kind_is_another_message() -> None:
    repeats = Repeats(60, 60)
    assert repeats.count("lost", 0) == 1
    assert repeats.count("refused", 1) == 1
    assert repeats.count("lost", 2) == repeats.count("refused", 2) == 0


def test_the_end_is_told_once_with_its_length() -> None:
    repeats = Repeats()
    assert repeats.over(0) is None
    logged(repeats, "away", range(100, 175, 5))
    ended = repeats.over(175)
    assert ended is not None and (ended.seconds, ended.messages) == (75, 15)
    assert repeats.over(176) is None
    # Much later the same is a new trouble, which is logged at once, and at a minute's distance again.
    assert logged(repeats, "away", range(5000, 5100, 10)) == {5000: 1, 5060: 6}


def test_a_trouble_that_comes_and_goes_is_no_flood() -> None:
    repeats = Repeats(first=60, most=3600)
    lines = 0
    for now in range(600):  # it comes back each second, and is over half a second later
        lines += repeats.count("lost", now) > 0
        lines += repeats.over(now + 0.5) is not None
    assert lines == 20


def test_a_new_trouble_does_not_wait_as_long_as_the_old_one_did() -> None:
    repeats = Repeats(first=60, most=3600)
    logged(repeats, "away", range(7000))
    repeats.over(7000)
    at = range(7000, 7100)
    assert min(logged(repeats, "away", at)) < 7062


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "over"]), st.integers(0, 5000)), max_size=60))
def test_every_message_is_logged_or_counted(steps: list[tuple[str, int]]) -> None:
    repeats = Repeats(first=60, most=600)
    said_at: dict[str, int] = {}
    now = 0
    for kind, pause in steps:
        now += pause
        if kind == "over":
            repeats.over(now)
        elif repeats.count(kind, now):
            assert now - said_at.get(kind, -60) >= 60
            said_at[kind] = now
        else:
            assert now - said_at[kind] < 600


def test_no_number_of_kinds_costs_more_than_a_bounded_memory() -> None:
    repeats = Repeats(60, 60)
    assert sum(repeats.count(f"kind {number}", 0) for number in range(10_000)) == 101
    assert repeats.count("another", 60) == 10_000 - 100


def test_words() -> None:
    assert (times(1), times(12)) == ("", " (12 times since this was last logged)")
    assert [duration(seconds) for seconds in (0.31, 75, 7000, 7200)] == ["0.3 s", "75.0 s", "117 min", "2.0 h"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'connection to server at "h", port 5 failed: Connection refused\n\tIs the server running on that host?\n',
            'connection to server at "h", port 5 failed: Connection refused. Is the server running on that host?',
        ),
        (
            "server closed the connection unexpectedly\n"
            "\tThis probably means the server terminated abnormally\n\tbefore or while processing the request.\n",
            "server closed the connection unexpectedly. "
            "This probably means the server terminated abnormally before or while processing the request",
        ),
        ("connection to a failed\nconnection to b failed\n", "connection to a failed. connection to b failed"),
        ("One sentence.\n", "One sentence"),
        ("a.\n\n  b  c", "a. b c"),
        ("ERROR:\n  it", "ERROR: it"),
        ("", "ValueError"),
    ],
)
def test_messages_of_other_libraries_in_one_line(text: str, line: str) -> None:
    assert one_line(ValueError(text)) == line
    assert sentence(line) == (line if line.endswith("?") else f"{line}.")


def test_text_for_a_terminal_is_one_line_and_gives_it_no_commands() -> None:
    assert printable("Übersicht → {7}") == "Übersicht → {7}"
    assert printable("a\nb\x1b[31m\x7f\x85\u2028\u202e") == r"a\nb\x1b[31m\x7f\x85\u2028\u202e"
