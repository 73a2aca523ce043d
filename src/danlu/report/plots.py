"""Figures of one run: its loss and its throughput."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from danlu.report.metrics import Metrics, Series

__all__ = ["loss_figure", "throughput_figure"]

# Colours of Okabe and Ito's palette, which colour-blind readers can distinguish too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#9AA0A6"


def loss_figure(metrics: Metrics, *, title: str = "") -> Figure:
    """Draw the training loss with the validation points, on linear and on logarithmic axes.

    Args:
        metrics: a run's metrics with ``loss`` and optionally ``val_loss``, in nats per target.
        title: the figure's heading.

    Returns:
        A figure of two panels: the linear one shows the loss, the logarithmic one whether it follows a power law. The
        thick line is a running median over a fortieth of the run.

    Raises:
        ValueError: the run logged no finite loss.
    """
    loss, validation = _finite(metrics["loss"]), _finite(metrics["val_loss"])
    if not len(loss):
        raise ValueError("the run has no finite loss to draw")
    figure = _figure(title)
    for position, scale in ((1, "linear"), (2, "log")):
        axes = figure.add_subplot(1, 2, position)
        # The first steps do not follow a power law, and step 0 has no logarithm.
        drawn, checked = (loss, validation) if scale == "linear" else (_after(loss, 1), _after(validation, 1))
        if len(drawn):
            axes.plot(drawn.steps, drawn.values, color=_GREY, linewidth=0.7, alpha=0.6, label="each step")
            axes.plot(drawn.steps, _running_median(drawn.values), color=_BLUE, linewidth=1.6, label="running median")
        if len(checked):
            axes.plot(checked.steps, checked.values, "o-", color=_ORANGE, markersize=4, linewidth=1, label="validation")
        axes.set_xscale(scale)
        axes.set_yscale(scale)
        _label(axes, "loss (nats)", scale)
        if scale == "linear":
            # The large losses of the first steps would compress all later ones into a flat line.
            top = float(np.quantile(np.concatenate([loss.values, validation.values]), 0.98)) if len(loss) > 50 else None
            axes.set_ylim(top=top)
            axes.legend(frameon=False)
    return figure


def throughput_figure(metrics: Metrics, *, title: str = "", unit: str = "tokens") -> Figure:
    """Draw the tokens or images trained per second over the steps, and their total number over time.

    Args:
        metrics: a run's metrics with ``items_per_second``, ``items`` and ``time``.
        title: the figure's heading.
        unit: what the items are, in the plural.

    Raises:
        ValueError: the run logged neither ``items_per_second`` nor ``items`` and ``time``.
    """
    speed, items, time = _finite(metrics["items_per_second"]), metrics["items"], metrics["time"]
    if not len(speed) and not (len(items) and len(time)):
        raise ValueError("the run has neither items_per_second nor items and time to draw")
    figure = _figure(title)
    axes = figure.add_subplot(1, 2, 1)
    if len(speed):
        axes.plot(speed.steps, speed.values, color=_GREY, linewidth=0.7, alpha=0.6, label="each step")
        axes.plot(speed.steps, _running_median(speed.values), color=_BLUE, linewidth=1.6, label="running median")
        axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(bottom=0)
    _label(axes, f"{unit} per second", "linear")
    axes = figure.add_subplot(1, 2, 2)
    shared, left, right = np.intersect1d(items.steps, time.steps, assume_unique=True, return_indices=True)
    if len(shared):
        axes.plot(time.values[right] / 60, items.values[left] / 1e6, color=_BLUE, linewidth=1.6)
    _label(axes, f"{unit} (millions)", "linear")
    axes.set_xlabel("time (minutes)")
    return figure


def _figure(title: str) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    # With its own canvas the figure needs neither pyplot nor a display.
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def _label(axes: Any, quantity: str, scale: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    axes.grid(True, which="both", linewidth=0.4, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    if scale == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    else:
        # A loss spans less than a decade, where labels at powers of ten alone are too few.
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))


def _finite(series: Series) -> Series:
    kept = np.isfinite(series.values)
    return Series(series.steps[kept], series.values[kept])


def _after(series: Series, step: int) -> Series:
    kept = series.steps >= step
    return Series(series.steps[kept], series.values[kept])


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of a centred window a fortieth of the series wide.

    At the ends the window shrinks on both sides: an asymmetric window would lag behind a falling loss.
    """
    half, last = max(1, len(values) // 80), len(values) - 1
    reach = [min(half, i, last - i) for i in range(len(values))]
    return np.array([np.median(values[i - r : i + r + 1]) for i, r in enumerate(reach)])
