"""Which server an address leads to, look by look, and when that is enough to follow it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flask_pg_sse.engine.postgres.identity import Finding, Server, Sightings

A, B, C = (Server(1, started, 5, "") for started in range(3))


def findings(ours: Server, *looks: Server, every: float = 30.0) -> list[str]:
    sightings = Sightings()
    return [sightings.saw(found, ours, number * every).name for number, found in enumerate(looks)]


def test_two_looks_in_a_row_at_another_server_are_a_move() -> None:
    assert findings(A, A, A, B, B) == ["SAME", "SAME", "OTHER", "MOVED"]
    assert findings(A, A, B, C, C)[:2] == ["SAME", "OTHER"]


def test_an_address_that_leads_now_here_now_there_is_no_move() -> None:
    assert findings(A, *[B, A] * 20, every=2.0) == ["OTHER", "UNSTEADY", *["UNSTEADY", "UNSTEADY"] * 19]
    assert findings(A, *[B, C] * 20, every=2.0)[1:] == ["UNSTEADY"] * 39
    # Two in a row are chance then, and ten are not.
    assert findings(A, B, A, *[B] * 10, every=2.0)[2:] == ["UNSTEADY"] * 9 + ["MOVED"]


def test_ten_minutes_later_two_looks_are_enough_again() -> None:
    assert findings(A, B, A, *[A] * 20, B, B)[-2:] == ["OTHER", "MOVED"]


def test_a_server_that_was_left_a_moment_ago_needs_more_looks() -> None:
    for pause, expected in [(60.0, "UNSTEADY"), (700.0, "MOVED")]:
        sightings = Sightings()
        assert [sightings.saw(B, A, now).name for now in (0.0, 2.0)] == ["OTHER", "MOVED"]
        sightings.left(A, 2.0)
        assert [sightings.saw(A, B, pause + now).name for now in (0.0, 2.0)][1] == expected


@given(st.lists(st.sampled_from([A, B, C])))
def test_no_move_without_two_looks_in_a_row_that_agree(looks: list[Server]) -> None:
    for (before, found), finding in zip(pairwise([A, *looks]), findings(A, *looks), strict=True):
        if finding == Finding.MOVED.name:
            assert before == found != A
        assert (finding == Finding.SAME.name) <= (found == A)
