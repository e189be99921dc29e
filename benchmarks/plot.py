"""The plot: latency and CPU by the number of clients. The same figures give the same SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rig import Measured, median
from benchmarks.servers import FLOOR, GENERATORS, PACKAGE, Variant

# Colours that colour-blind readers can tell apart, on white, which is readable on a dark page too.
_STYLES = {PACKAGE.name: ("#0072B2", "o"), GENERATORS.name: ("#D55E00", "s"), FLOOR.name: ("#666666", "^")}
_SETTINGS: Any = {
    "svg.hashsalt": "flask_pg_sse", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip

Curves = Mapping[str, Sequence[tuple[int, Sequence[Measured]]]]


def draw(curves: Curves, file: Path) -> None:
    """Draw the measurements of `clients`: for each variant, the rounds at each number of clients."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
        latency, cpu = figure.subplots(1, 2)
        for variant in (FLOOR, PACKAGE):
            _line(latency, curves, variant, "p50", "-", "median")
            _line(latency, curves, variant, "p99", "--", "99 %")
        latency.set(title="From publishing to reading", ylabel="ms", yscale="log")
        latency.yaxis.set_major_formatter("{x:g}")
        for variant in (GENERATORS, FLOOR, PACKAGE):
            _line(cpu, curves, variant, "us", "-", "")
        cpu.set(title="CPU of the server", ylabel="µs a delivery")
        cpu.set_ylim(bottom=0)
        sizes = [count for count, _ in curves[PACKAGE.name]]
        for axes in (latency, cpu):
            axes.set(xlabel="clients", xscale="log")
            axes.set_xticks(sizes, [f"{count:,}" for count in sizes])
            axes.minorticks_off()
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1])  # drawn last, on top of the others, and named first
        # Without the date and the version of the library, which would change the file.
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _line(axes: Axes, curves: Curves, variant: Variant, field: str, style: str, what: str) -> None:
    colour, marker = _STYLES[variant.name]
    points = [(count, median(rounds, field)) for count, rounds in curves[variant.name]]
    label = f"{variant.title.strip('`')}{', ' if what else ''}{what}"
    axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
