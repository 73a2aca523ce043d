"""The Remez exchange in extended precision by mpmath, for errors below what float64 resolves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import chebval

from danlu.approx._exchange import Array, Problem, exchange, extrema, rounding

_TOLERANCE = 1e-9

Number = Any  # mpmath.mpf, which ships no types


@dataclass(frozen=True)
class ExtendedMinimax:
    """The best polynomial in extended precision.

    Attributes:
        coefficients: of the Chebyshev series on ``interval``, mpmath numbers.
        interval: the interval.
        error: ``max |w (f - p)|`` over the interval.
        lower_bound: no polynomial of the degree has a smaller maximal error.
        points: alternating extrema, ascending.
        dps: decimal digits it was computed with.
        optimal: whether ``error`` exceeds ``lower_bound`` by no more than a billionth (or than rounding).
    """

    coefficients: tuple[Number, ...]
    interval: tuple[float, float]
    error: Number
    lower_bound: Number
    points: tuple[Number, ...]
    dps: int
    optimal: bool

    def __call__(self, x: Number) -> Number:
        """Evaluate at one number, to ``dps`` digits."""
        with mpmath.workdps(self.dps):
            a, b = map(mpmath.mpf, self.interval)
            return chebval((2 * mpmath.mpf(x) - a - b) / (b - a), np.array(self.coefficients, dtype=object))

    @property
    def gap(self) -> float:
        """Relative distance between the error and the lower bound."""
        return float((self.error - self.lower_bound) / self.error) if self.error else 0.0

    @property
    def polynomial(self) -> Chebyshev:
        """The polynomial rounded to float64."""
        return Chebyshev([float(c) for c in self.coefficients], domain=list(self.interval))


def extended_minimax(
    f: Callable[[Number], Number],
    degree: int,
    interval: tuple[float, float],
    weight: Callable[[Number], Number] | None,
    dps: int,
) -> ExtendedMinimax:
    """Run the exchange with ``dps`` digits and ten guard digits."""
    with mpmath.workdps(dps + 10):
        a, b = map(mpmath.mpf, interval)
        lift = np.frompyfunc(mpmath.mpf, 1, 1)
        to_x = np.frompyfunc(lambda t: (a + b) / 2 + (b - a) / 2 * t, 1, 1)
        value = np.frompyfunc(lambda x: _finite("f", f(x), x), 1, 1)
        weigh = np.frompyfunc(lambda x: mpmath.mpf(1) if weight is None else _positive(weight(x), x), 1, 1)

        def sample(t: Array) -> tuple[Array, Array, Array]:
            x = to_x(t)
            return value(x), lift(np.ones(t.size)), weigh(x)

        problem = Problem(sample, degree, max(4, 64 // (degree + 1)), float(mpmath.mpf(10) ** -dps), lift, _solve)
        coefficients, reference = exchange(problem)

        def residual(t: Array) -> Array:
            y, _, w = sample(t)
            return np.asarray(w * (y - chebval(t, coefficients)))

        knots = np.unique(np.concatenate([lift(np.array([-1.0, 1.0])), reference]))
        error, points, values, doubts = extrema(residual, knots, 7, degree + 2, 3)
        bound = np.min(np.abs(values)) if points.size == degree + 2 else mpmath.mpf(0)
        noise = 16 * rounding(problem.eps, degree + 2) * max(abs(y) for y in value(to_x(knots)))
        optimal = bool(
            error <= noise or (error - bound <= max(_TOLERANCE * error, noise) and doubts.max() <= 1e-6 * error)
        )
        return ExtendedMinimax(tuple(coefficients), interval, error, bound, tuple(to_x(points)), dps, optimal)


def _solve(matrix: Array, right: Array) -> Array:
    try:
        solution = list(mpmath.lu_solve(mpmath.matrix(matrix.tolist()), mpmath.matrix(right.tolist())))
    except ZeroDivisionError:  # points too close to determine a polynomial: the zero one, whose error is measured
        solution = [mpmath.mpf(0)] * right.size
    return np.array(solution, dtype=object)


def _finite(name: str, value: Number, x: Number) -> Number:
    if mpmath.im(value) != 0:
        raise ValueError(f"{name} must be real on the interval, got {value} at {mpmath.nstr(x, 10)}")
    number = mpmath.mpf(mpmath.re(value))
    if not mpmath.isfinite(number):
        raise ValueError(f"{name} must be finite on the interval, got {number} at {mpmath.nstr(x, 10)}")
    return number


def _positive(value: Number, x: Number) -> Number:
    number = _finite("weight", value, x)
    if not number > 0:
        raise ValueError(f"weight must be positive on the interval, got {number} at {mpmath.nstr(x, 10)}")
    return number
