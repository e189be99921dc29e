"""The house rules: a module imports only from lower floors, and the README shows the same table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import flask_pg_sse

PACKAGE = Path(flask_pg_sse.__file__).parent
FLOORS = [
    {"errors", "event", "wire", "page", "channels", "settings", "tokens", "backoff", "wakeup", "progress"},
    {
        "hub", "places", "subscription", "recent", "access", "server", "shutdown", "outlet", "block", "group",
        "admission", "departures", "sharing", "backlog", "attention",
    },
    {
        "postgres.dsn", "postgres.connect", "postgres.pool", "postgres.schema", "postgres.presence", "postgres.log",
        "postgres.publish", "postgres.wanted", "postgres.decode", "postgres.control", "postgres.listener",
        "postgres.prune", "replay", "stream", "ticker", "orders",
    },
    {"runtime"},
    {"web.api", "web.authorize", "web.blueprint"},
    {"cli", "testing"},
]  # fmt: skip
# Neighbours on one floor may use each other where the arrow goes one way.
ALLOWED_BESIDE = {
    ("event", "errors"), ("channels", "errors"), ("settings", "errors"),
    ("wire", "errors"), ("wire", "event"),
    ("block", "outlet"), ("subscription", "block"), ("hub", "block"), ("group", "block"), ("group", "subscription"),
    ("hub", "group"), ("subscription", "backlog"), ("backlog", "block"),
    ("subscription", "access"), ("subscription", "outlet"), ("server", "outlet"), ("places", "subscription"),
    ("server", "sharing"),
    ("hub", "subscription"), ("hub", "recent"), ("hub", "places"), ("hub", "departures"),
    ("hub", "admission"), ("admission", "places"), ("admission", "subscription"), ("admission", "access"),
    ("places", "access"),
    ("departures", "subscription"), ("hub", "attention"), ("attention", "subscription"),
    ("stream", "replay"),
    ("postgres.connect", "postgres.dsn"), ("postgres.pool", "postgres.connect"), ("postgres.pool", "postgres.dsn"),
    ("postgres.schema", "postgres.connect"), ("postgres.presence", "postgres.schema"),
    ("postgres.log", "postgres.pool"), ("postgres.log", "postgres.decode"), ("postgres.publish", "postgres.pool"),
    ("postgres.prune", "postgres.pool"), ("postgres.prune", "postgres.presence"),
    ("postgres.listener", "postgres.connect"), ("postgres.listener", "postgres.dsn"),
    ("postgres.listener", "postgres.decode"), ("postgres.listener", "postgres.control"),
    ("postgres.listener", "postgres.wanted"), ("postgres.listener", "orders"), ("postgres.control", "orders"),
    ("postgres.listener", "postgres.log"), ("postgres.listener", "postgres.presence"),
    ("web.blueprint", "web.api"), ("web.blueprint", "web.authorize"), ("web.api", "web.authorize"),
    # PgSSE registers the blueprint, within a function.
    ("web.api", "web.blueprint"),
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """Return the modules of the package that a module imports."""
    found: set[str] = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            if PACKAGE.joinpath(*parts).is_dir():
                found.update(".".join([*parts, alias.name]) for alias in node.names)
            else:
                found.add(".".join(parts))
    return found


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def test_every_module_has_its_floor() -> None:
    assert modules().keys() == set().union(*FLOORS)


def test_modules_import_only_from_lower_floors() -> None:
    for name, path in modules().items():
        for other in imports_of(name, path):
            assert (name, other) in ALLOWED_BESIDE or floor(other) < floor(name), f"{name} imports {other}"


def test_no_module_outgrows_its_room() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) <= 400, lengths


def test_the_readme_shows_the_same_floors() -> None:
    table = (PACKAGE.parent / "README.md").read_text().split("<!-- layers -->")[1].split("## ")[0]
    shown = {}
    for number, cell in re.findall(r"^\| (\d), [^|]*\| (.*) \|$", table, re.MULTILINE):
        names = re.findall(r"`([a-z_/]+)`", cell)
        for folder in ("postgres", "web"):
            if f"{folder}/" in names:
                inside = {name.partition(".")[2] for name in FLOORS[int(number)] if name.startswith(f"{folder}.")}
                names = [f"{folder}.{name}" if name in inside else name for name in names]
                names.remove(f"{folder}/")
        shown[int(number)] = set(names)
    assert shown == dict(enumerate(FLOORS))


def test_nothing_under_gevent_bypasses_its_patches() -> None:
    """A name imported from one of these modules would stay what it was before the patch, under --preload."""
    patched = {"select", "socket", "threading", "time", "queue", "ssl", "signal", "subprocess"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module not in patched, f"{name} imports from {node.module}"
