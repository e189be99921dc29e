"""Where tests stand, and which of them the default run has: as tests/README.md says."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import COLLECTED

TESTS = Path(__file__).resolve().parents[1]
README = (TESTS / "README.md").read_text()


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> dict[str, list[pytest.Item]]:
    """All tests of this run by their file, those that are left out too."""
    found = defaultdict(list)
    for item in request.config.stash[COLLECTED]:
        found[item.path.relative_to(TESTS).as_posix()].append(item)
    return found


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def test_every_file_with_slow_tests_has_a_case_in_the_default_run(collected: dict[str, list[pytest.Item]]) -> None:
    rows = dict(re.findall(r"^\| `(\S+\.py)` \| `(.+)` \|$", README, re.MULTILINE))
    assert rows and not [file for file in rows if not (TESTS / file).exists()]
    with_slow_tests = {file for file, items in collected.items() if any(map(is_slow, items))}
    assert with_slow_tests == rows.keys() & collected.keys()
    for file in with_slow_tests:
        assert rows[file] in [item.name for item in collected[file] if not is_slow(item)]


def test_every_test_is_in_a_folder_that_is_described(collected: dict[str, list[pytest.Item]]) -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert described == {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert {file.partition("/")[0] for file in collected} <= described - {"support"}


def test_unit_tests_start_no_server(collected: dict[str, list[pytest.Item]]) -> None:
    for file, items in collected.items():
        for item in items:
            asked_for = set(getattr(item, "fixturenames", ()))
            assert not file.startswith("unit/") or not asked_for & {"running_postgres", "start_server", "browser"}, item
