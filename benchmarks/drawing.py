"""The picture beside a benchmark's JSON: bars for comparisons, log-log lines for sweeps."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.measured import Comparison, Sweep


def draw(items: Sequence[Comparison | Sweep], path: Path, title: str) -> None:
    """Draw one row a comparison (bars of median time, whiskers from fastest to slowest round) or sweep (two plots)."""
    heights = [max(1.6, 0.42 * len(item.seconds) + 0.9) if isinstance(item, Comparison) else 3.4 for item in items]
    figure = pyplot.figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(len(items), 2, height_ratios=heights)
    for row, item in enumerate(items):
        if isinstance(item, Comparison):
            _bars(figure.add_subplot(grid[row, :]), item)
        else:
            _lines(figure.add_subplot(grid[row, 0]), item, item.seconds, "seconds", 0)
            _lines(figure.add_subplot(grid[row, 1]), item, item.peak_bytes, "peak bytes", 1)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _bars(axes: Axes, item: Comparison) -> None:
    names = list(item.seconds)
    medians = [item.median(name) for name in names]
    spread = [
        [middle - min(item.seconds[name]) for name, middle in zip(names, medians, strict=True)],
        [max(item.seconds[name]) - middle for name, middle in zip(names, medians, strict=True)],
    ]
    colours = ["tab:blue" if "danlu" in name else "0.7" for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, error_kw={"lw": 0.8})
    axes.invert_yaxis()
    axes.set_title(item.title, fontsize=9, loc="left")
    axes.set_xlabel("seconds a call", fontsize=8)
    axes.tick_params(labelsize=8)


def _lines(axes: Axes, item: Sweep, values: dict, label: str, which: int) -> None:
    for name, column in values.items():
        points = [(size, value) for size, value in zip(item.sizes, column, strict=True) if value]
        if points:
            style = "-o" if "danlu" in name else "--s"
            axes.loglog(*zip(*points, strict=True), style, ms=3, label=f"{name} (slope {item.slopes(name)[which]:.2f})")
    if axes.lines:
        axes.legend(fontsize=7)
    axes.set_title(item.title, fontsize=9, loc="left")
    axes.set_xlabel(item.axis, fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
