"""docs/operate.md and docs/nothing-arrives.md: every message, reason and check of the code is there, and nothing "
"else."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flask_pg_sse
from flask_pg_sse import stats
from flask_pg_sse.cli.doctor.checks import CHECKS
from flask_pg_sse.engine.postgres import watch
from flask_pg_sse.engine.postgres.dsn import Dsn
from flask_pg_sse.engine.postgres.identity import Server
from flask_pg_sse.engine.postgres.listener import DEAF
from flask_pg_sse.serve import OPEN_TO_ALL
from flask_pg_sse.server import capacity
from flask_pg_sse.settings import unknown_keys
from flask_pg_sse.tokens import Tokens
from flask_pg_sse.web.authorize import hint_about
from flask_pg_sse.web.metrics import GAUGES
from tests.support.documents import Document

PACKAGE = Path(flask_pg_sse.__file__).parent
PAGE = Document("docs/operate.md")
START = Document("docs/nothing-arrives.md")
LEVELS = {"warning", "error", "exception", "critical", "log"}
_SERVER = Server(0, 0, 0, "…")
_STAYS = "…. The listener stays with the …. Events that are sent elsewhere do not arrive. Remedy: …."
_UNTIL = "…. Until then events come late, and raw and ephemeral ones not at all."
_TO_CLOSE = "… To close them, set SSE_CHANNELS to those that may stay open, or SSE_SECRET_KEY for signed URLs."
# Texts that another function makes: by the module and the text that is logged, what stands there in the end. A message
# that is new belongs here only if its text is not in the call that logs it.
MADE_ELSEWHERE = {
    ("runtime", "…"): [text.replace("'SSE_X'", "…") for text in unknown_keys({"SSE_X": 1}).values()],
    ("engine.outage", "…: … Next attempt in … s; open streams stay open."): ["Cannot listen: …",
                                                                            "Lost the listener's connection: …"],
    ("engine.postgres.installation", "…."): ["The event log is off: …"],
    ("engine.postgres.installation", "…, after … without it."): ["The event log is on, after … without it."],
    ("engine.postgres.watch", "…"): [watch.apart(Dsn("…", {}), _SERVER, Dsn("…", {}), _SERVER)],
    ("engine.postgres.watch", _STAYS): [f"… {watch.UNSTEADY}{_STAYS}"],
    ("engine.postgres.listener", _UNTIL): [f"{DEAF}{_UNTIL.removeprefix('…')}"],
    ("serve", _TO_CLOSE): [f"{OPEN_TO_ALL}{_TO_CLOSE.removeprefix('…')}"],
    ("web.refusals", "…"): [hint_about([name], Tokens(others=others)).replace(repr(name), "…")
                            for name, others in (("x*", 0), ("a,b", 0), ("", 1))],
    ("web.ops", "…"): ["The metrics need prometheus_client: …"],
    ("web.blueprint", "…"): [capacity.SYNC, capacity.HTTP2, capacity.ONE_THREAD, capacity.EVENTLET],
}  # fmt: skip


def test_links() -> None:
    for page in (PAGE, START):
        page.assert_links_lead_somewhere()


def shown(text: str) -> str:
    """Return a text with `…` for everything that is filled in, as the page shows it."""
    text = re.sub(r"%(?:\.\d+)?[sdrfg]", "…", text).replace("%%", "%")
    return re.sub(r"…(?: ?…|\.…)+", "…", " ".join(text.split()))


def text_of(node: ast.expr, module: str, function: ast.AST, tree: ast.AST) -> list[str]:
    """Return the texts that an expression can have: of a literal, a constant of a module, or a variable set nearby."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [shown(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                parts.append((text_of(part.value, module, function, tree) or ["…"])[0])
            elif isinstance(part, ast.Constant):
                parts.append(str(part.value))
        return [shown("".join(parts))]
    if not isinstance(node, ast.Name):
        return []
    found = getattr(importlib.import_module(f"flask_pg_sse.{module}"), node.id, None)
    if isinstance(found, str):
        return [shown(found)]
    texts: list[str] = []
    for one in ast.walk(function):
        if isinstance(one, ast.Assign) and any(isinstance(to, ast.Name) and to.id == node.id for to in one.targets):
            texts += text_of(one.value, module, function, tree)
    arguments = [one.arg for one in function.args.args] if isinstance(function, ast.FunctionDef) else []
    if isinstance(function, ast.FunctionDef) and node.id in arguments:
        at = arguments.index(node.id) - (arguments[:1] == ["self"])
        for call, outer in calls(tree):
            if isinstance(call.func, ast.Attribute) and call.func.attr == function.name and len(call.args) > at:
                texts += text_of(call.args[at], module, outer, tree)
    return texts


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.AST]]:
    """Yield every call, and the function in which it stands."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    yield node, function


def messages() -> dict[str, str]:
    """Return what the package logs at WARNING and above, each with the place where it is logged."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        for call, function in calls(tree):
            if not isinstance(call.func, ast.Attribute) or call.func.attr not in LEVELS:
                continue
            to = ast.unparse(call.func.value)
            if to == "logger":
                message, *given = call.args[1 if call.func.attr == "log" else 0 :]
            elif call.func.attr == "log" and (to.endswith("refusals") or (module == "web.refusals" and to == "self")):
                message, *given = call.args[1:]
            elif call.args and ast.unparse(call.args[0]) in {f"logger.{level}" for level in LEVELS}:
                message, *given = call.args[3:]  # Repeats.log()
            else:
                continue
            if module == "web.refusals" and to == "logger":
                continue  # it passes on what the others give it
            where = f"flask_pg_sse/{path.relative_to(PACKAGE)}, line {call.lineno}"
            texts = text_of(message, module, function, tree)
            assert texts, f"{where}: the message's text is not found. Write it in the call, or in a constant."
            if texts == ["…"]:  # as `logger.error("%s", TEXT)`
                texts = text_of(given[0], module, function, tree) or texts
            for text in texts:
                for made in MADE_ELSEWHERE.get((module, text), [text]):
                    assert re.search(r"\w{2,}\W+\w{2,}", made.replace("…", "")), (
                        f"{where}: the text {text!r} is made elsewhere. Add what it can be to MADE_ELSEWHERE here."
                    )
                    found[shown(made)] = where
    return found


def documented() -> list[str]:
    section = PAGE.text.split("## Messages of the log\n")[1].split("\n## ")[0]
    return re.findall(r"^- `(.+)`$", section, re.MULTILINE)


def begins(message: str, entry: str) -> bool:
    """Tell whether a message begins as an entry says. An entry that ends with `…` leaves out the rest."""
    return message == entry or (entry.endswith("…") and message.startswith(entry.removesuffix("…")))


def test_every_message_of_the_log_is_explained() -> None:
    entries = documented()
    assert not [entry for entry in entries if len(re.findall(r"[A-Za-z]{2,}", entry)) < 2], "such fit too much"
    assert len(entries) > 30 and len(set(entries)) == len(entries)
    for message, where in messages().items():
        if not any(begins(message, entry) for entry in entries):
            raise AssertionError(
                f"{where} logs a message that docs/operate.md does not explain. Add to its section Messages of the "
                f"log, with what it means and what to do:\n\n- `{message[:100].rpartition(' ')[0]} …`\n  …\n"
            )


def test_no_message_is_explained_that_is_not_there() -> None:
    known = messages()
    for entry in documented():
        assert any(begins(message, entry) for message in known), (
            f"docs/operate.md explains a message that the package does not log (any more): {entry}"
        )


def table(title: str) -> list[str]:
    section = PAGE.text.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_every_check_of_doctor_is_in_the_table() -> None:
    assert table("Doctor") == list(CHECKS)


@pytest.mark.parametrize(
    ("title", "counter", "no_reason"),
    [("Why a stream ends", stats.ENDED, {"client", "stalled"}), ("Why a page reloads its state", stats.RESETS, set())],
)
def test_every_reason_is_explained(title: str, counter: stats.Counter, no_reason: set[str]) -> None:
    """`client` and `stalled` are for the counters alone: nobody is there who could be told."""
    assert set(table(title)) == set(counter.values) - no_reason - {"other"}


def test_the_first_page_begins_with_one_command() -> None:
    first = START.text.split("\n\n")[2]
    assert first.strip() == "flask sse doctor --url https://www.example.com"


def test_the_alerts_are_rules_on_metrics_that_there_are() -> None:
    """The rules are read as YAML. What they ask for are metrics and labels of the code."""
    yaml: Any = importlib.import_module("yaml")
    code = PAGE.text.split("<!-- table: alerts -->\n```yaml\n")[1].split("```")[0]
    rules = yaml.safe_load(code)["groups"][0]["rules"]
    counters = {counter.name: counter for counter in stats.COUNTERS}
    known = {*counters, *(f"flask_pg_sse_{name}" for name in GAUGES)}
    assert len(rules) > 4
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "annotations"} and rule["annotations"]["summary"]
        names = re.findall(r"flask_pg_sse_\w+", rule["expr"])
        assert names and set(names) <= known, rule["expr"]
        for name, label, values in re.findall(r'(flask_pg_sse_\w+)\{(\w+)=~?"([^"]+)"\}', rule["expr"]):
            assert label == counters[name].label and set(values.split("|")) <= set(counters[name].values), rule


def test_ten_troubles_have_a_runbook() -> None:
    section = PAGE.text.split("## Runbook\n")[1]
    assert re.findall(r"^(\d+)\. \*\*", section, re.MULTILINE) == [str(number) for number in range(1, 11)]
