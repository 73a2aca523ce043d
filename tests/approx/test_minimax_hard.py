"""Minimax polynomials where the exchange on intervals fails: cusps, steps, narrow peaks, ties; beside linear programs.

The reference is independent: the smallest largest error on a fine grid, a linear program that scipy solves. It can only
be below the error on the interval.
"""

import warnings

import mpmath
import numpy as np
import pytest
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import chebvander
from scipy.optimize import linprog

from danlu.approx import ConvergenceWarning, certify, minimax


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def program(f, degree, interval, special=(), points=1500):
    """Return the smallest largest error on a grid that is dense at the ends and around the special points."""
    a, b = interval
    x = (a + b) / 2 - (b - a) / 2 * np.cos(np.pi * np.arange(points + 1) / points)
    near = np.concatenate([[0], np.logspace(-17, -1, 60)])
    x = np.unique(np.clip(np.concatenate([x, *(c + near for c in special), *(c - near for c in special)]), a, b))
    V = chebvander((2 * x - a - b) / (b - a), degree)
    one = np.ones((x.size, 1))
    solution = linprog(
        np.eye(degree + 2)[-1],
        A_ub=np.block([[V, -one], [-V, -one]]),
        b_ub=np.concatenate([f(x), -f(x)]),
        bounds=[(None, None)] * (degree + 1) + [(0, None)],
        method="highs",
    )
    assert solution.status == 0
    return solution.fun


def levelled(best, degree):
    assert best.optimal
    assert best.error - best.lower_bound <= max(1e-9 * best.error, best.rounding)
    assert best.points.size == degree + 2


@pytest.mark.parametrize("power", [0.7, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("centre", [0.1, 0.3, -0.62, 0.9])
@pytest.mark.parametrize("degree", [3, 8, 20])
def test_cusp_away_from_the_middle_is_levelled_to_a_billionth(power, centre, degree):
    def f(x):
        return np.abs(x - centre) ** power

    best = minimax(f, degree)
    levelled(best, degree)
    # The tip itself is one of the alternation points: half of what stands 1e-17 beside it would be missing at 0.1.
    assert np.min(np.abs(best.points - centre)) == 0
    assert best.error == pytest.approx(program(f, degree, (-1, 1), [centre]), rel=2e-4)


@pytest.mark.parametrize("k", range(2, 71))
def test_chebyshev_polynomials_have_the_zero_polynomial_below_their_degree(k):
    for degree in {k // 2, k - 1}:
        best = minimax(Chebyshev.basis(k), degree)
        assert best.optimal
        assert best.error == pytest.approx(1, rel=1e-9)
        assert np.max(np.abs(best.polynomial.coef)) < 1e-7


HARD = {
    "root times kink": (lambda x: np.sqrt(1 + x) * np.abs(x - 0.2), (-1, 1), [-1, 0.2]),
    "piecewise": (lambda x: np.where(x < 0.3, x, 0.3), (-1, 1), [0.3]),
    "three pieces": (
        lambda x: np.select([x < -0.4, x < 0.7], [x * x, 0.16 + x + 0.4], 1.26 - (x - 0.7) ** 2),
        (-1, 1),
        [-0.4, 0.7],
    ),
    "nearly a pole": (lambda x: 1 / (1e-4 + (x - 0.3) ** 2), (-1, 1), [0.3]),
    "narrow bell": (lambda x: np.exp(-(((x - 0.123) / 3e-3) ** 2)), (-1, 1), [0.123]),
    "narrow hat": (lambda x: np.maximum(0, 1 - np.abs(x - 0.31) * 50), (-1, 1), [0.31]),
    "nearly a step": (lambda x: np.tanh(1e4 * (x - 0.1)), (-1, 1), [0.1]),
    "wave": (lambda x: np.sin(200 * x), (-1, 1), []),
    "oscillation without end": (lambda x: (x - 0.2) * np.sin(1 / np.where(x == 0.2, 1, x - 0.2)), (-1, 1), [0.2]),
    "logarithm near 0": (np.log, (1e-9, 1), [1e-9]),
    "cusp between floats": (lambda x: np.abs(3 * x - 1) ** 0.3, (0, 1), [1 / 3]),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("degree", [2, 5, 10])
def test_hard_functions_agree_with_the_linear_program(name, degree):
    f, interval, special = HARD[name]
    best = minimax(f, degree, interval)
    levelled(best, degree)
    reference = program(f, degree, interval, special)
    assert reference <= best.error * (1 + 1e-7)
    assert best.error == pytest.approx(reference, rel=2e-3)


def test_a_jump_costs_half_of_it_and_the_bounds_say_so():
    for degree in (0, 3, 10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            best = minimax(lambda x: np.sign(x - 0.2), degree)
        assert best.lower_bound <= 1 + 1e-9
        assert best.error == pytest.approx(1, abs=1e-6)


def test_certificate_sees_the_tip_of_a_cusp():
    # Between two float64 numbers beside the tip this error differs by a fiftieth.
    def f(x):
        return np.abs(x - 0.3) ** 0.1

    best = minimax(f, 5)
    assert certify(best.polynomial, f).error == pytest.approx(best.error, rel=1e-9)
    assert certify(best.polynomial, f).optimal
    lifted = Chebyshev(best.polynomial.coef + 1e-4 * np.eye(6)[0])
    assert not certify(lifted, f).optimal
    assert certify(lifted, f).error == pytest.approx(best.error + 1e-4, rel=1e-9)


def test_weight_and_parity_reach_the_slow_path_too():
    def f(x):
        return np.abs(np.abs(x) - 0.3) ** 0.3

    even = minimax(f, 8, parity="even")
    levelled(even, 4)
    assert even.error == pytest.approx(program(f, 9, (-1, 1), [0.3, -0.3]), rel=2e-4)
    assert np.all(even.polynomial.coef[1::2] == 0)

    odd = minimax(lambda x: np.sign(x) * f(x) * x**2, 9, parity="odd")
    levelled(odd, 4)
    weighted = minimax(f, 6, (0, 1), weight=lambda x: 1 + x)
    levelled(weighted, 6)
    assert np.max((1 + weighted.points) * np.abs(f(weighted.points) - weighted(weighted.points))) == pytest.approx(
        weighted.error, rel=1e-9
    )


def test_extended_precision_answers_where_it_does_not_level():
    with pytest.warns(ConvergenceWarning, match="could not be levelled"):
        best = minimax(lambda x: abs(x - mpmath.mpf("0.3")) ** mpmath.mpf("0.1"), 4, dps=20)
    assert not best.optimal
    assert best.lower_bound < best.error < 1
    assert minimax(mpmath.exp, 4, dps=20).optimal


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x + 1j, r"f must be real on the interval, got \(-1\+1j\) at -1.0"),
        (lambda x: np.sqrt(x + 0j), r"f must be real on the interval, got 1j at -1.0"),
        (lambda x: complex(x, 1), r"f must be real on the interval"),
        (lambda x: np.where(x > 0.5, np.nan, x), r"f must be finite on the interval, got nan at 0\.5"),
        (lambda x: np.where(np.abs(x - 0.123) < 2e-4, np.nan, np.abs(x - 0.4) ** 0.3), r"finite .* got nan at 0\.12"),
    ],
)
def test_values_that_are_not_real_numbers_are_refused_with_the_point(f, message):
    with pytest.raises(ValueError, match=message):
        minimax(f, 4)
    if "finite" not in message:
        with pytest.raises(ValueError, match="must be real"):
            certify([0.0, 1.0], f)


def test_complex_values_without_imaginary_part_are_real_ones():
    assert minimax(lambda x: np.exp(x + 0j), 4).error == minimax(np.exp, 4).error
    with pytest.raises(ValueError, match="f must be real on the interval"):
        minimax(lambda x: mpmath.exp(1j * x), 3, dps=20)
