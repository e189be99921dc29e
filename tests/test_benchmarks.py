"""The benchmarks run, and print what they promise; what they measure is not judged here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import publishing

ROOT = Path(__file__).resolve().parent.parent


def test_publishing_prints_its_tables() -> None:
    tiny = ["--quick", "--clients", "1", "--sizes", "100", "--rounds", "1", "--seconds", "0.01", "--events", "1000"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.publishing", *tiny, "--fsync", "off"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in done.stdout.splitlines() if line.startswith("|")]
    for _, title, _ in [*publishing.SINGLE, *publishing.TRANSACTIONS, *publishing.BULK]:
        assert [row for row in rows if title in row], title
    assert re.search(r"^Pruned [1-9][\d,]* events in .* batches", done.stdout, re.MULTILINE)
    assert "fsync off" in done.stdout
    for row in rows:
        assert not {"nan", "inf"}.intersection(row), row
