"""What was measured: times of several implementations side by side, and their growth with size."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster than the base: the median over rounds with its quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds a call for each implementation and round. ``work`` is what one call does, in ``unit`` (tokens, GFLOP)."""

    title: str
    base: str
    seconds: dict[str, list[float]]
    work: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str | None = None) -> Ratio:
        """Times faster than ``base``, from the rounds in which both were measured."""
        pairs = zip(self.seconds[base or self.base], self.seconds[name], strict=True)
        low, middle, high = np.quantile([of_base / own for of_base, own in pairs], [0.25, 0.5, 0.75])
        return Ratio(median=float(middle), low=float(low), high=float(high))

    def rate(self, name: str) -> float | None:
        """Work per second at the median."""
        return self.work[name] / self.median(name) if name in self.work else None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types, with the medians, rates and ratios worked out."""
        rows = {
            name: {
                "median_seconds": self.median(name),
                "min_seconds": min(self.seconds[name]),
                "ratio_to_base": asdict(self.ratio(name)),
                "rate": self.rate(name),
                "note": self.notes.get(name, ""),
            }
            for name in self.seconds
        }
        return {"kind": "comparison", **asdict(self), "summary": rows}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Median seconds and peak bytes of each implementation over a range of sizes; None where it was not measured."""

    title: str
    axis: str
    sizes: list[int]
    seconds: dict[str, list[float | None]]
    peak_bytes: dict[str, list[int | None]]

    def slopes(self, name: str) -> tuple[float, float]:
        """Log-log slopes of time and of peak memory over size: 1 is linear, 2 quadratic."""
        return loglog_slope(self.sizes, self.seconds[name]), loglog_slope(self.sizes, self.peak_bytes[name])

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types, with the slopes worked out."""
        slopes = {
            name: dict(zip(("time", "memory"), map(_json_number, self.slopes(name)), strict=True))
            for name in self.seconds
        }
        return {"kind": "sweep", **asdict(self), "slopes": slopes}


def loglog_slope(x: Sequence[float], y: Sequence[float | None]) -> float:
    """Least-squares slope of log y over log x; NaN with fewer than two points.

    >>> round(loglog_slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b is not None and b > 0]
    if len(points) < 2:
        return math.nan
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
