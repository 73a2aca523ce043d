"""Minimax polynomials: closed forms, reference errors and alternation, against Chebyshev interpolation."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray

from danlu.approx import Certificate, certify, minimax
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
