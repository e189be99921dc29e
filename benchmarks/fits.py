"""Fit straight lines through measurements, and say in words what they mean, or that no line fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tables import number

# A line fits if no measurement deviates from it by more than _GOOD of itself. If all measurements deviate from one
# value by at most _SAME, or grow by at most _SAME from the first size to the last, they count as the same.
_GOOD = 0.25
_SAME = 0.1
_TIMES = "\N{MULTIPLICATION SIGN}"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """`fixed` + x times `slope`, and the largest deviation, as a share of the measurement."""

    fixed: float
    slope: float
    deviation: float


def _through(points: Points, fixed: float, slope: float) -> Line:
    return Line(fixed, slope, max(abs(fixed + slope * x - y) / y for x, y in points))


def line(points: Points) -> Line:
    """Fit a line by least squares of the relative errors, so small sizes count as much as large ones. Not below 0."""
    # Normal equations of fixed / y + slope * x / y = 1.
    a = sum(1 / y**2 for _, y in points)
    b = sum(x / y**2 for x, y in points)
    c = sum(x**2 / y**2 for x, y in points)
    d = sum(1 / y for _, y in points)
    e = sum(x / y for x, y in points)
    fixed, slope = (c * d - b * e) / (a * c - b * b), (a * e - b * d) / (a * c - b * b)
    return _through(points, fixed, slope) if fixed > 0 else _through(points, 0.0, e / c)


def level(points: Points) -> Line:
    """Fit one value for all sizes."""
    return _through(points, sum(1 / y for _, y in points) / sum(1 / y**2 for _, y in points), 0.0)


def sentence(costs: str, points: Points, letter: str, what: str, unit: str) -> str:
    """Say how a cost (in µs, ms or kB) grows with the number of `what`: in a line, not at all, or otherwise."""
    if len(points) < 3 or min(y for _, y in points) <= 0:
        return f"{costs} what the table says: too little for a line."
    same, found = level(points), line(points)
    grows = abs(found.slope) * (points[-1][0] - points[0][0]) / same.fixed
    if same.deviation <= (_GOOD if grows <= _SAME else _SAME):
        return f"{costs} {amount(same.fixed, unit)}, whatever the number of {what}{_off(same)}."
    if found.deviation > _GOOD:
        return f"{costs} what the table says: no straight line fits{_off(found)}."
    if found.slope < 0:
        least, most = (amount(extreme(y for _, y in points), unit) for extreme in (min, max))
        return f"{costs} {least} to {most}: it does not grow with the number of {what}."
    fixed = f"{amount(found.fixed, unit)} + " if found.fixed else ""
    return f"{costs} {fixed}{letter} {_TIMES} {amount(found.slope, unit)}{_off(found)}."


def _off(found: Line) -> str:
    return f" (largest deviation {100 * found.deviation:.0f} %)"


def amount(value: float, unit: str) -> str:
    """Return a quantity in the unit in which it is easily read."""
    larger = {"µs": "ms", "ms": "s", "kB": "MB"}.get(unit)
    smaller = {"ms": "µs", "s": "ms"}.get(unit)
    if larger and abs(value) >= 1000:
        return amount(value / 1000, larger)
    if smaller and abs(value) < 1:
        return amount(value * 1000, smaller)
    return f"{number(value)} {unit}"
