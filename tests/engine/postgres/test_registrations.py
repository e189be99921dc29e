"""What an app registers with psycopg2, psycopg 3 and SQLAlchemy, and the package, do not reach each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flask_pg_sse.engine.postgres.schema import schema_sql
from tests.support.postgres import execute

ROOT = Path(__file__).resolve().parents[3]
DRIVERS = ("psycopg2", "psycopg")
CALLERS = [
    *("psycopg2", "psycopg2 with rows", "psycopg", "psycopg raw", "psycopg client"),
    *(
        name
        for driver in DRIVERS
        for name in (
            *(
                f"{kind}{driver} {options}"
                for options in ({}, {"stream_results": True}, {"yield_per": 10})
                for kind in ("", "session ")
            ),
            f"raw_connection {driver}",
        )
    ),
]


@pytest.mark.parametrize("logged", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["log", "no log"])
@pytest.mark.parametrize("what", ["everything", pytest.param("usual", marks=pytest.mark.slow)])
def test_an_apps_registrations_and_the_package_do_not_meet(database_url: str, what: str, logged: bool) -> None:
    """In a process of its own, because psycopg2's registrations cannot be taken back."""
    if logged:
        execute(database_url, schema_sql())
    command = [sys.executable, "-W", "error", "-m", "tests.support.apps.registering", database_url, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = ["own", "one", "two's \\", '{"n": 1.5}', *(["x" * 9000] if logged else [])]
    for name in CALLERS:
        expected += [name, "'", "\\", "in passing"]
    got = json.loads(done.stdout)
    # No order is promised between events of the log and others in one transaction.
    assert sorted(got) == sorted(expected)
    assert [data for data in got if data != "in passing"] == [data for data in expected if data != "in passing"]
