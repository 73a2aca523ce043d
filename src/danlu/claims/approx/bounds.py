"""The Poisson and the geometric tail: the inequality, its exact coefficients, and its stable form."""

import math

import mpmath
import numpy as np

from danlu.approx import geometric_gap, poisson_tail, series_coefficients
from danlu.claims.frame import Claim, absolute, at_most, exact


def _largest_ratio(extra: int) -> float:
    """Largest Poisson tail over ``p^(j + extra)`` on a grid of p and j up to 50."""
    p = np.linspace(0.0005, 0.9995, 4000)
    rate = -np.log1p(-p)
    return float(max(np.max(poisson_tail(j, rate) / p ** (j + extra)) for j in range(51)))


def _sum_from_one(p: float, j: int) -> float:
    """The gap as the post's last display prints it: without the term of p^0."""
    rate = -math.log1p(-p)
    return sum(rate**i / math.factorial(i) for i in range(j + 1)) - sum(p**i for i in range(1, j + 1))


def _small_tail_error(tail: float) -> float:
    with mpmath.workdps(60):
        return float(abs(tail / mpmath.gammainc(21, 0, mpmath.mpf("0.5"), regularized=True) - 1))


def _one_minus_distribution(j: int, rate: float) -> float:
    return 1 - sum(math.exp(-rate) * rate**i / math.factorial(i) for i in range(j + 1))


CLAIMS = (
    Claim(
        name="inequality",
        statement="largest Poisson tail over p^(j+1) on 4000 points, j up to 50; control: one power more",
        source="kexue.fm 10902, after Ajtai, Komlos and Szemeredi 1978",
        expected=1.0,
        tolerance=at_most(1e-12),
        measure=lambda: _largest_ratio(1),
        control=lambda: _largest_ratio(2),
        seconds=0.3,
    ),
    Claim(
        name="gap-at-one-half",
        statement="gap of the two sums at p = 1/2, j = 1: log 2 - 1/2; control: the post's sum from i = 1",
        source="kexue.fm 10902, lower index corrected",
        expected=math.log(2) - 0.5,
        tolerance=absolute(1e-14),
        measure=lambda: float(geometric_gap(0.5, 1)),
        control=lambda: _sum_from_one(0.5, 1),
        seconds=0.01,
    ),
    Claim(
        name="series",
        statement="coefficient of p^6 for j = 2: permutations of six with at most two cycles; control: exactly two",
        source="derivation: unsigned Stirling numbers, (120 + 274) / 720",
        expected=197 / 360,
        tolerance=exact(),
        measure=lambda: float(series_coefficients(2, 7)[6]),
        control=lambda: float(series_coefficients(2, 7)[6] - series_coefficients(1, 7)[6]),
        seconds=0.01,
    ),
    Claim(
        name="small-tail",
        statement="relative error of P(X > 20) at rate 1/2, about 6e-27; control: one minus the distribution function",
        source="mpmath, 60 digits",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _small_tail_error(float(poisson_tail(20, 0.5))),
        control=lambda: _small_tail_error(_one_minus_distribution(20, 0.5)),
        seconds=0.1,
    ),
)
