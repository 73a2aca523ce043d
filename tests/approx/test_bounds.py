"""The Poisson tail and the geometric bound against exact rational series, scipy and the printed gaps."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from danlu.approx import capacity, geometric_gap, poisson_tail, poisson_tail_bound, series_coefficients


@given(st.integers(0, 60), st.floats(1e-6, 200))
def test_poisson_tail_is_the_regularised_incomplete_gamma_function(j, rate):
    assert float(poisson_tail(j, rate)) == pytest.approx(scipy.special.gammainc(j + 1, rate), rel=1e-11, abs=1e-300)


def test_small_tails_keep_their_digits():
    with mpmath.workdps(60):
        exact = mpmath.gammainc(51, 0, mpmath.mpf("0.01"), regularized=True)
        assert float(poisson_tail(50, 0.01)) == pytest.approx(float(exact), rel=1e-12)


@given(st.integers(0, 50), st.floats(0, 0.9999))
def test_poisson_tail_never_exceeds_the_geometric_one(j, p):
    rate = -math.log1p(-p)
    tail, bound = float(poisson_tail(j, rate)), float(poisson_tail_bound(j, rate))
    assert tail <= bound * (1 + 1e-12)
    assert bound == pytest.approx(p ** (j + 1), rel=1e-10, abs=1e-300)


def test_ratio_of_the_tails_rises_from_one_over_a_factorial_towards_one():
    p = np.concatenate([np.geomspace(1e-5, 0.5, 40), 1 - np.geomspace(0.5, 1e-12, 40)])
    for j in (1, 2, 5, 20):
        rate = -np.log1p(-p)
        ratio = poisson_tail(j, rate) / poisson_tail_bound(j, rate)
        assert np.all(np.diff(ratio) > -1e-9)
        assert ratio[0] == pytest.approx(1 / math.factorial(j + 1), rel=1e-2 * (j + 1))
        assert np.all(ratio <= 1 + 1e-12)


@pytest.mark.parametrize(
    ("p", "gaps"),
    [
        (0.5, {0: 0.0, 1: 0.193147, 2: 0.183374, 3: 0.113878, 5: 0.0310793, 10: 9.76562e-4}),
        (0.9, {0: 0.0, 1: 1.40259, 2: 3.24353, 3: 4.54921, 5: 5.01326, 10: 3.13781}),
    ],
)
def test_printed_gaps_are_reproduced(p, gaps):
    for j, gap in gaps.items():
        assert float(geometric_gap(p, j)) == pytest.approx(gap, rel=4e-6)


@given(st.floats(1e-8, 0.999999), st.integers(1, 40))
def test_gap_agrees_with_fifty_digits(p, j):
    with mpmath.workdps(400):
        rate = -mpmath.log(1 - mpmath.mpf(p))
        left = sum(mpmath.mpf(p) ** i for i in range(j + 1))
        right = sum(rate**i / mpmath.factorial(i) for i in range(j + 1))
        assert float(geometric_gap(p, j)) == pytest.approx(float(right - left), rel=1e-8, abs=1e-300)


def test_direct_subtraction_would_lose_the_sign():
    p, j = 0.01, 12
    rate = -math.log1p(-p)
    direct = sum(rate**i / math.factorial(i) for i in range(j + 1)) - sum(p**i for i in range(j + 1))
    assert abs(direct) > 1e6 * float(geometric_gap(p, j)) or direct <= 0
    assert float(geometric_gap(p, j)) > 0


def test_series_of_both_orders_are_the_printed_ones():
    assert series_coefficients(2, 7) == tuple(map(Fraction, ("1", "1", "1", "5/6", "17/24", "37/60", "197/360")))
    assert series_coefficients(3, 7) == tuple(map(Fraction, ("1", "1", "1", "1", "23/24", "109/120", "619/720")))


@given(st.integers(0, 8), st.integers(1, 14))
def test_coefficients_are_one_up_to_the_order_and_below_one_after(j, count):
    found = series_coefficients(j, count)
    assert all((c == 1) == (k <= j) and 0 <= c <= 1 for k, c in enumerate(found))
    if count > j + 1:
        assert found[j + 1] == 1 - Fraction(1, math.factorial(j + 1))


def test_series_starting_at_one_is_not_the_inequality():
    # The post's last display sums p^i from 1: with its missing 1 the two sides no longer agree to order j.
    p = 1e-3
    gap = float(geometric_gap(p, 3))
    assert gap < p**4
    assert gap + 1 > 0.99


@given(st.floats(0.01, 5), st.floats(1e-12, 0.9))
def test_capacity_is_the_smallest_that_the_bound_proves(rate, overflow):
    j = capacity(rate, overflow)
    assert float(poisson_tail(j, rate)) <= overflow * (1 + 1e-9)
    assert float(poisson_tail_bound(j, rate)) <= overflow * (1 + 1e-9)
    if j > 0:
        assert float(poisson_tail_bound(j - 1, rate)) > overflow * (1 - 1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poisson_tail(-1, 1.0), "j must be an integer of at least 0"),
        (lambda: poisson_tail(1, -1.0), r"rate must be in \[0, inf\)"),
        (lambda: poisson_tail(1, math.nan), r"rate must be in \[0, inf\), got nan"),
        (lambda: geometric_gap(1.0, 2), r"p must be in \[0, 1\), got 1.0"),
        (lambda: series_coefficients(1, 0), "count must be an integer of at least 1"),
        (lambda: capacity(1.0, 1.0), r"overflow must be in \(0, 1\)"),
        (lambda: capacity(50.0, 0.5), "rate must leave a bin empty"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
