"""Tables in Markdown, line by line, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

# Above this share of a core, a row says that the load generator may have been the limit.
LIMITED = 0.8


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield _row(names)
    yield f"|{'---|' * len(names)}"
    yield from map(_row, rows)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float) -> str:
    """Return a number with three significant digits, below 0.1 with one; a dash for NaN."""
    if value != value:
        return "-"
    if abs(value) < 0.1:
        return f"{value:.1g}"
    value = float(f"{value:.3g}")
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def share(value: float) -> str:
    """Return a share of one core in percent."""
    return f"{100 * value:.{0 if value >= 0.1 else 1}f} %"


def load(value: float) -> str:
    """Return the load generator's CPU, with a remark if it was too much."""
    return f"{share(value)}{' (may be the limit)' if value > LIMITED else ''}"
