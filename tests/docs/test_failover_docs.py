"""docs/failover.md is right: its examples are run by the tests of its rows, and each of those tests has a row."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.documents import Document

FAILOVER = Document("docs/failover.md")
ROWS = Path(__file__).resolve().parents[1] / "promises" / "test_failover.py"


def test_examples_and_links() -> None:
    FAILOVER.assert_every_example_is_run("promises/test_failover.py")
    FAILOVER.assert_links_lead_somewhere()


def test_each_row_is_a_test_and_each_test_a_row() -> None:
    named = re.findall(r"`(test_\w+)` \|$", FAILOVER.text, re.MULTILINE)
    assert sorted(named) == sorted(re.findall(r"^def (test_\w+)", ROWS.read_text(), re.MULTILINE))
