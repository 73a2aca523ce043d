"""The Poisson and the geometric tail: the inequality, its exact coefficients, its stable form and its capacities."""

import itertools
import math

import mpmath
import numpy as np

from danlu.approx import capacity, geometric_gap, poisson_tail, poisson_tail_bound, series_coefficients
from danlu.claims.frame import Claim, absolute, at_most, exact

_TAILS = ((20, 0.5), (0, 3.0), (3, 3.9), (3, 4.1), (50, 200.0), (5, 1e-8), (7, 0.0))
_GAPS = ((0.5, 1), (1e-3, 2), (0.1, 3), (0.9, 2), (0.97, 6), (0.999, 20), (0.3, 0))


def _largest_ratio(extra: int) -> float:
    """Largest Poisson tail over the bound ``p^(j+1)``, times ``p^-extra``, on a grid of p and j up to 50."""
    p = np.linspace(0.0005, 0.9995, 4000)
    rate = -np.log1p(-p)
    return float(max(np.max(poisson_tail(j, rate) / poisson_tail_bound(j, rate) / p**extra) for j in range(51)))


def _tail_error(*, complement: bool) -> float:
    """Largest relative error of P(X > j), from 1e-44 to 1; the control is one minus the distribution function."""
    worst = 0.0
    for j, rate in _TAILS:
        below = sum(math.exp(-rate) * rate**i / math.factorial(i) for i in range(j + 1))
        tail = 1 - below if complement else float(poisson_tail(j, rate))
        with mpmath.workdps(60):
            true = mpmath.gammainc(j + 1, 0, mpmath.mpf(rate), regularized=True)
            worst = max(worst, float(abs(tail / true - 1) if true else abs(tail)))
    return worst


def _gap_error(first: int) -> float:
    """Largest relative error of the gap of the two sums; the geometric one begins at p to the ``first``."""
    worst = 0.0
    for p, j in _GAPS:
        with mpmath.workdps(60):
            rate = -mpmath.log1p(-mpmath.mpf(p))
            true = mpmath.fsum(rate**i / mpmath.factorial(i) - mpmath.mpf(p) ** i for i in range(j + 1))
            printed = true + mpmath.fsum(mpmath.mpf(p) ** i for i in range(first))
            gap = geometric_gap(p, j) if first == 0 else printed
            worst = max(worst, abs(float((gap - true) / true if true else gap)))
    return worst


def _cycles(permutation: tuple[int, ...]) -> int:
    seen: set[int] = set()
    count = 0
    for start in permutation:
        count += start not in seen
        while start not in seen:
            seen.add(start)
            start = permutation[start]
    return count


def _series_matches(*, at_most_two: bool) -> float:
    """How many of seven coefficients are the share of permutations with at most (or exactly) two cycles."""
    found = series_coefficients(2, 7)
    matches = 0
    for k, coefficient in enumerate(found):
        cycles = [_cycles(permutation) for permutation in itertools.permutations(range(k))]
        counted = sum(c <= 2 if at_most_two else c == 2 for c in cycles)
        matches += coefficient * len(cycles) == counted
    return float(matches)


def _capacity_misses(extra: int) -> float:
    """Bins whose capacity is not the smallest j with ``(1 - exp(-rate))^(j + 1 + extra)`` at most the overflow."""
    misses = 0
    for rate, overflow in itertools.product((0.01, 0.3, 1.0, 2.5, 6.0), (0.9, 0.1, 1e-3, 1e-9)):
        j = 0
        while (-math.expm1(-rate)) ** (j + 1 + extra) > overflow:
            j += 1
        misses += capacity(rate, overflow) != j
    return float(misses)


CLAIMS = (
    Claim(
        name="inequality",
        statement="largest Poisson tail over p^(j+1) on 4000 points, j up to 50; control: one power more",
        source="kexue.fm 10902, after Ajtai, Komlos and Szemeredi 1978: equality at j = 0, above it never",
        expected=1.0,
        tolerance=absolute(1e-12),
        measure=lambda: _largest_ratio(0),
        control=lambda: _largest_ratio(1),
        seconds=0.2,
    ),
    Claim(
        name="gap-at-one-half",
        statement="relative error of the gap of the two sums, log 2 - 1/2 at p = 1/2, j = 1, and at six more points; "
        "control: the post's sum from i = 1",
        source="kexue.fm 10902, lower index corrected; mpmath, 60 digits",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _gap_error(0),
        control=lambda: _gap_error(1),
        seconds=0.1,
    ),
    Claim(
        name="series",
        statement="coefficients, of the first seven for j = 2, that are the share of permutations with at most two "
        "cycles; control: exactly two",
        source="derivation: unsigned Stirling numbers, counted",
        expected=7,
        tolerance=exact(),
        measure=lambda: _series_matches(at_most_two=True),
        control=lambda: _series_matches(at_most_two=False),
        seconds=0.1,
    ),
    Claim(
        name="small-tail",
        statement="largest relative error of P(X > j) at seven places, down to 6e-27; control: one minus the "
        "distribution function",
        source="mpmath, 60 digits",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _tail_error(complement=False),
        control=lambda: _tail_error(complement=True),
        seconds=0.1,
    ),
    Claim(
        name="capacity",
        statement="capacities of twenty bins that are not the smallest j with p^(j+1) at most the overflow; control: "
        "p^(j+2)",
        source="derivation: the inequality solved for j",
        expected=0,
        tolerance=exact(),
        measure=lambda: _capacity_misses(0),
        control=lambda: _capacity_misses(1),
        seconds=0.1,
    ),
)
