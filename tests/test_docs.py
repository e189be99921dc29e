"""What docs/ says is true: its examples run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flask import Flask

from flask_pg_sse import notify, schema_sql, sse_cursor, sse_url
from flask_pg_sse.testing import stream
from tests.conftest import execute

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "never-lose-an-event.md").read_text()


def example(name: str) -> str:
    found = re.search(rf"<!-- run: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"the page has no example {name!r}"
    return found[1]


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text()
    for name in re.findall(r"<!-- run: (\S+) -->", PAGE):
        assert f'example("{name}")' in here, name


def test_the_page_and_its_stream(database_url: str, make_app: Callable[..., Flask]) -> None:
    execute(database_url, schema_sql())
    app = make_app(database_url)
    placed = []

    def read_orders(query: str) -> SimpleNamespace:
        with app.app_context():
            placed.append(notify("orders", "placed while the page was on its way"))
        return SimpleNamespace(all=list)

    names: dict[str, Any] = {
        "app": app, "sse_cursor": sse_cursor, "sse_url": sse_url, "select": str, "Order": "orders",
        "db": SimpleNamespace(session=SimpleNamespace(scalars=read_orders)),
        "render_template": lambda name, orders, live: live,
    }  # fmt: skip
    exec(example("page"), names)
    client = app.test_client()
    events = stream(client, client.get("/orders").text)
    assert next(events).event == "sse-open"
    assert next(events).id == str(placed[0])


def test_what_to_look_at(database_url: str) -> None:
    execute(database_url, schema_sql())
    execute(database_url, "SELECT flask_pg_sse.notify('orders', 'x')")
    statements = [statement for statement in example("look").split(";") if statement.strip()]
    answers = [execute(database_url, statement) for statement in statements]
    assert answers[0][0][0] == 1
    assert answers[1][0][:2] == ("orders", 1)
    assert answers[2] == [(0,)]


def test_the_event_that_a_page_waits_for_has_the_name_that_is_sent() -> None:
    names = re.findall(r'addEventListener\("(.+?)"', example("reset"))
    assert names == ["sse-reset"]


def test_every_reason_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "flask_pg_sse").rglob("*.py"))
    sent = set(re.findall(r'"(too-old|future-id|unknown-id|reconnected|no-log)"', source))
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE))
    assert sent == explained


def test_the_tests_that_the_page_names_are_there() -> None:
    for name in re.findall(r"`(?:tests/)?(test_\w+\*?\.py)`", PAGE):
        assert list((ROOT / "tests").glob(name)), name
