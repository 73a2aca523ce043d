"""Minimax polynomials: closed forms, reference errors and alternation, against Chebyshev interpolation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mpmath
import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray

from danlu.approx import Certificate, Minimax, certify, minimax
from danlu.claims.frame import Claim, absolute, at_most, exact, relative

Array = NDArray[np.float64]
Solver = Callable[[Callable[[Array], Array], int], Certificate]


def _runge(x: Array) -> Array:
    return np.asarray(1 / (1 + 25 * x * x))


def _interpolation(f: Callable[[Array], Array], degree: int) -> Certificate:
    return certify(Chebyshev.interpolate(f, degree), f)


def _alternations(result: Certificate) -> float:
    """Alternating extrema within a thousandth of the largest error."""
    return float(np.count_nonzero(np.abs(result.values) > 0.999 * result.error))


@dataclass(frozen=True)
class _Problem:
    """A function on an interval with a class of polynomials and a weight."""

    f: Callable[[Array], Array]
    degree: int
    interval: tuple[float, float] = (-1.0, 1.0)
    parity: Literal["odd", "even"] | None = None
    weight: Callable[[Array], Array] | None = None

    def needed(self) -> int:
        """The number of alternating extrema: one more than the powers that the class has."""
        powers = [k for k in range(self.degree + 1) if self.parity is None or k % 2 == (self.parity == "odd")]
        return len(powers) + 1


_PROBLEMS = (
    _Problem(np.abs, 8, (-1.0, 2.0)),
    _Problem(np.exp, 5, (0.5, 3.0), None, lambda x: np.exp(-x)),
    _Problem(np.ones_like, 5, (0.1, 1.0), "odd"),
    _Problem(lambda x: 1e6 * np.cos(3 * x), 6, (-2.0, 2.0), "even"),
    _Problem(np.sin, 5, (-3.0, 3.0), "odd", lambda x: 1 + x * x),
    _Problem(np.sqrt, 7, (0.0, 2.0), None, lambda x: 1 / (1 + x)),
    _Problem(lambda x: np.abs(x - 0.3) ** 0.5, 12),
    _Problem(lambda x: np.arctan(1e3 * (x - 0.1)), 9),
    _Problem(lambda x: np.maximum(x, 0) + np.abs(x + 0.5), 15, (-2.0, 2.0)),
    _Problem(lambda x: 64 * x**7 - 112 * x**5 + 56 * x**3 - 7 * x, 6),  # Chebyshev's own: the best has one term less
    _Problem(np.cosh, 0),
)


def _best(problem: _Problem) -> Minimax:
    return minimax(problem.f, problem.degree, problem.interval, problem.parity, problem.weight)


def _least_squares(problem: _Problem) -> Minimax:
    """The nearly best polynomial of the class: least squares at Chebyshev points."""
    a, b = problem.interval
    x = (a + b) / 2 + (b - a) / 2 * np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    w = np.ones_like(x) if problem.weight is None else problem.weight(x)
    columns = [k for k in range(problem.degree + 1) if problem.parity is None or k % 2 == (problem.parity == "odd")]
    solution = np.linalg.lstsq(w[:, None] * x[:, None] ** columns, w * problem.f(x))[0]
    coefficients = np.zeros(problem.degree + 1)
    coefficients[columns] = solution
    polynomial = np.polynomial.Polynomial(coefficients)
    found = certify(
        polynomial, problem.f, problem.interval, degree=problem.degree, parity=problem.parity, weight=problem.weight
    )
    return Minimax(**vars(found), polynomial=polynomial.convert(kind=Chebyshev))


def _departure(problem: _Problem, result: Minimax) -> float:
    """How far a result is from the theorem: error on a grid, level, signs, parity, number of points."""
    a, b = problem.interval

    def error(x: Array) -> Array:
        w = 1.0 if problem.weight is None else problem.weight(x)
        return np.asarray(w * (problem.f(x) - result.polynomial(x)))

    x = np.linspace(a, b, 20001)
    largest = max(np.max(np.abs(error(x))), np.max(np.abs(error(result.points))))
    level = error(result.points)
    mirrored = {None: result.polynomial(x), "odd": -result.polynomial(-x), "even": result.polynomial(-x)}
    other = result.polynomial(x) - mirrored[problem.parity]
    return float(
        max(
            abs(largest / result.error - 1),
            1 - float(np.min(np.abs(level))) / result.error,
            1 - result.lower_bound / result.error,
            float(np.max(np.abs(level - result.values))) / result.error,
            float(np.any(level[1:] * level[:-1] >= 0)),
            abs(result.points.size - problem.needed()) + abs(result.needed - problem.needed()),
            float(np.max(np.abs(other))) / result.error,
        )
    )


def _pole_distance(solver: Solver) -> float:
    """Relative distance from the closed form of 1 / (x - 2) at degree 8."""
    expected = (2 - math.sqrt(3)) ** 8 / 3
    return abs(solver(lambda x: 1 / (x - 2), 8).error / expected - 1)


def _worst_gap(solver: Solver) -> float:
    """Largest relative gap to the lower bound, beyond rounding, of |x|, Runge's function and exp at degrees 2 to 20."""
    worst = 0.0
    for f in (np.abs, _runge, np.exp):
        for degree in range(2, 21):
            result = solver(f, degree)
            excess = result.error - result.lower_bound - result.rounding
            worst = max(worst, excess / result.error)
    return worst


CLAIMS = (
    Claim(
        name="absolute-value",
        statement="error of the best polynomial of degree 20 to |x|; control: Chebyshev interpolation",
        source="Sollya at 165 bits",
        expected=0.0139867,
        tolerance=relative(1e-5),
        measure=lambda: minimax(np.abs, 20).error,
        control=lambda: _interpolation(np.abs, 20).error,
        seconds=0.1,
    ),
    Claim(
        name="bernstein-constant",
        statement="degree times error for |x| at degree 60, near its limit; control: Chebyshev interpolation",
        source="Varga and Carpenter 1985: 0.2801694990...",
        expected=0.2801694990,
        tolerance=absolute(1e-4),
        measure=lambda: 60 * minimax(np.abs, 60).error,
        control=lambda: 60 * _interpolation(np.abs, 60).error,
        seconds=0.2,
    ),
    Claim(
        name="simple-pole",
        statement="relative distance from Chebyshev's closed form for 1 / (x - 2), degree 8; control: interpolation",
        source="Chebyshev: E_n = (a - sqrt(a^2 - 1))^n / (a^2 - 1)",
        expected=1e-10,
        tolerance=at_most(),
        measure=lambda: _pole_distance(minimax),
        control=lambda: _pole_distance(_interpolation),
        seconds=0.1,
    ),
    Claim(
        name="alternation",
        statement="alternating extrema for |x| at degree 8, which need n + 2; control: Chebyshev interpolation",
        source="Chebyshev's alternation theorem; kexue.fm 10972",
        expected=10,
        tolerance=exact(),
        measure=lambda: _alternations(minimax(np.abs, 8)),
        control=lambda: _alternations(_interpolation(np.abs, 8)),
        seconds=0.1,
    ),
    Claim(
        name="gap",
        statement="largest gap to the lower bound over 57 problems (|x|, Runge, exp; degrees 2 to 20); control: "
        "Chebyshev interpolation",
        source="derivation: de la Vallee-Poussin's bound",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _worst_gap(minimax),
        control=lambda: _worst_gap(_interpolation),
        seconds=1.5,
    ),
    Claim(
        name="theorem",
        statement=f"largest departure from alternation, on a grid, of {len(_PROBLEMS)} problems with weights, "
        "parities, kinks and cusps; control: least squares at Chebyshev points",
        source="Chebyshev's alternation theorem, checked in plain arithmetic",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: max(_departure(problem, _best(problem)) for problem in _PROBLEMS),
        control=lambda: max(_departure(problem, _least_squares(problem)) for problem in _PROBLEMS),
        seconds=1.0,
    ),
    Claim(
        name="extended-precision",
        statement="error for exp at degree 20 with 40 digits; control: the same in float64",
        source="Sollya at 165 bits",
        expected=1.88892e-26,
        tolerance=relative(1e-5),
        measure=lambda: float(minimax(mpmath.exp, 20, dps=40).error),
        control=lambda: minimax(np.exp, 20).error,
        seconds=2.0,
    ),
)
