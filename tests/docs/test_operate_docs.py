"""docs/operate.md: the tables are those of the code, and the example works as it stands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask

from flask_pg_sse.stats import COUNTERS
from flask_pg_sse.web.metrics import GAUGES

PAGE = Path(__file__).parents[2] / "docs" / "operate.md"


def expected_table() -> str:
    rows = ["| metric | | |", "|---|---|---|"]
    for counter in COUNTERS:
        label = f"`{counter.label}`: {', '.join(counter.values[:-1])}" if counter.label else ""
        rows.append(f"| `{counter.name}` | {counter.help} | {label} |")
    rows += [f"| `flask_pg_sse_{name}` | {help} | |" for name, help in GAUGES.items()]
    return "\n".join(rows)


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    shown = PAGE.read_text().split("<!-- table: metrics -->\n")[1].split("\n\n")[0]
    assert shown == expected_table(), f"put this there:\n{expected_table()}"


def test_the_example_opens_the_metrics(make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"<!-- run: ops -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setenv("SSE_OPS_TOKEN", "t")
    app = make_app(None, SSE_BROKER_URL="memory://")
    exec(code, {"app": app, "os": os})
    client = app.test_client()
    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"Authorization": "Bearer t"})
    assert answer.status_code == 200 and "flask_pg_sse_streams 0.0\n" in answer.text
    assert [client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
