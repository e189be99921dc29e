"""docs/testing.md is right: its suite runs under pytest, and finds the mistake that it says it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT, Document

PAGE = Document("docs/testing.md")


def example(name: str) -> str:
    return PAGE.example(name)


def test_examples_and_links() -> None:
    PAGE.assert_every_example_is_run("docs/test_testing_docs.py")
    PAGE.assert_links_lead_somewhere()


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(example("shop.py"))
    (tmp_path / "conftest.py").write_text(example("conftest.py"))
    (tmp_path / "test_shop.py").write_text(example("test_shop.py"))
    capture = example("capture").replace("\n", "\n    ")
    (tmp_path / "test_capture.py").write_text(f"def test_capture(app):\n    {capture}")
    return tmp_path


def pytest_in(folder: Path, *options: str) -> tuple[str, int]:
    """Return the last line of a run, and its exit status. Warnings are errors there, ours and those of others."""
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_the_suite_passes_without_a_database(suite: Path, options: tuple[str, ...]) -> None:
    said, status = pytest_in(suite, *options)
    assert status == 0 and "7 passed" in said, said


@pytest.mark.slow
def test_the_suite_finds_a_notify_after_the_commit(suite: Path) -> None:
    code = example("shop.py")
    commit = "        db.session.commit()\n"
    assert code.count(commit) == 1
    (suite / "shop.py").write_text(code.replace(commit, "").replace("        notify(", f"{commit}        notify("))
    said, status = pytest_in(suite)
    assert status == 1, said
    for name in ("test_an_order_is_announced", "test_an_order_reaches_the_browser"):
        assert f"FAILED test_shop.py::{name}" in said, said


@pytest.mark.slow
def test_the_fixture_may_be_imported(suite: Path) -> None:
    code = example("conftest.py").replace(
        'pytest_plugins = ["flask_pg_sse.testing.fixtures"]',
        "from flask_pg_sse.testing.fixtures import sse_events  # noqa: F401",
    )
    (suite / "conftest.py").write_text(code)
    said, status = pytest_in(suite, "-k", "announced")
    assert status == 0 and "2 passed" in said, said


def test_pytest_is_not_imported_without_the_fixture() -> None:
    code = "import sys, flask_pg_sse.testing; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
