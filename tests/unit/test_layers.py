"""The house rules: a module imports from lower floors and from its own folder, and nothing runs in a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import flask_pg_sse

PACKAGE = Path(flask_pg_sse.__file__).parent
# The ground: no I/O, no Flask.
GROUND = ("errors", "settings", "channels", "event", "tokens", "concurrency", "repeats", "stats")
# The floors above it, lowest first. What users import stands on top: the package itself, and `testing`.
FLOORS = (["server"], ["engine"], ["hub"], ["runtime"], ["web"], ["serve"], ["cli"], ["testing", "__init__"])


def modules() -> dict[str, Path]:
    """Return the modules of the package by their dotted names; a package's `__init__` has that as its last part."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str, path: Path) -> set[str]:
    """Return the modules of the package that a module imports, also within functions."""
    known = modules()
    package = name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            parts = [part for part in base if part]
            if ".".join(parts) in known:
                found.add(".".join(parts))
            else:
                found.update(".".join([*parts, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("flask_pg_sse") for alias in node.names), f"{name} is not relative"
    assert found <= known.keys(), f"{name} imports {found - known.keys()}"
    return found


def floor(name: str) -> int:
    top = name.split(".")[0]
    if top in GROUND:
        return 0
    return next(number for number, tops in enumerate(FLOORS, 1) if top in tops)


def folder(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[:-1])


def test_modules_import_from_lower_floors_and_from_their_own_folder() -> None:
    for name, path in modules().items():
        for other in imports_of(name, path):
            below = floor(other) < floor(name)
            # A folder within a floor is a house of its own, which may use what stands beside it in the floor.
            own = floor(other) == floor(name) and folder(other) == folder(name)[: len(folder(other))]
            assert below or own, f"{name} imports {other}"


def test_an_engine_imports_no_other_engine() -> None:
    for name, path in modules().items():
        if name.startswith("engine."):
            for other in imports_of(name, path):
                inside = other.startswith("engine.") and len(folder(other)) > 1
                assert not inside or folder(other) == folder(name), f"{name} imports {other}"


def test_nothing_imports_in_a_circle() -> None:
    arrows = {name: imports_of(name, path) for name, path in modules().items()}
    while True:
        free = {name for name, others in arrows.items() if not others & arrows.keys()}
        if not free:
            break
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows, f"circles among {sorted(arrows)}"


def test_few_rooms_stand_at_the_top() -> None:
    tops = {name.split(".")[0] for name in modules()} - {"__init__"}
    assert len(tops) <= 16, tops
    assert tops <= {*GROUND, *(top for floor in FLOORS for top in floor)}


def test_no_module_outgrows_its_room() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) <= 400, lengths


def test_the_readme_shows_the_same_house() -> None:
    """Every folder and every module is named where it stands."""
    table = (PACKAGE.parent / "README.md").read_text().split("<!-- layers -->")[1].split("## ")[0]
    shown = {}
    for top, cell in re.findall(r"^\| `?([a-z_]+)/?`? \|[^|]*\| (.*) \|$", table, re.MULTILINE):
        shown[top] = set(re.findall(r"`([a-z_/]+)`", cell))
    there: dict[str, set[str]] = {}
    for name in modules():
        top, *inside = name.split(".")
        if inside[-1:] == ["__init__"] or top == "__init__":
            continue
        if top in GROUND:
            there.setdefault("ground", set()).add("/".join([top, *inside]))
        else:
            there.setdefault(top, set()).add("/".join(inside) or top)
    assert shown == there


def test_nothing_under_gevent_bypasses_its_patches() -> None:
    """A name imported from one of these modules would stay what it was before the patch, under --preload."""
    patched = {"select", "socket", "threading", "time", "queue", "ssl", "signal", "subprocess"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module not in patched, f"{name} imports from {node.module}"


def test_locks_work_between_greenlets_and_threads_of_the_system() -> None:
    """Those of `threading` do not, once gevent has patched it. Programs of one's own may use them."""
    theirs = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}
    for name, path in modules().items():
        if name.split(".")[0] in ("cli", "testing") or name == "stats":  # `stats` is given its lock
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "threading":
                assert node.attr not in theirs, f"{name}: use Lock or Event of concurrency.locks"


def test_one_module_knows_of_forks() -> None:
    found = [name for name, path in modules().items() if "register_at_fork" in path.read_text()]
    assert found == ["concurrency.forks"]
