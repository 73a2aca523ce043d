"""Minimax polynomials against closed forms, 165-bit reference values, the certificate and the known traps."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev, Polynomial

from danlu.approx import ConvergenceWarning, certify, max_norm_derivative, minimax, optimal_composition


def runge(x):
    return 1 / (1 + 25 * x * x)


# Optimal errors on [-1, 1] computed elsewhere with 165 bits (Sollya); it stops at 1e-5 relative on |x|.
REFERENCE = [
    (np.exp, 5, 4.520551e-5),
    (np.exp, 8, 1.106429e-8),
    (np.abs, 5, 0.0676209),
    (np.abs, 8, 0.0346899),
    (np.abs, 10, 0.0278452),
    (np.abs, 12, 0.0232474),
    (np.abs, 15, 0.0199489),
    (np.abs, 20, 0.0139867),
    (runge, 5, 0.2171584),
    (runge, 8, 0.0980881),
    (runge, 10, 0.0659229),
    (runge, 12, 0.0443054),
    (runge, 15, 0.0297767),
    (runge, 20, 0.00903934),
]


@pytest.mark.parametrize(("f", "degree", "expected"), REFERENCE)
def test_error_agrees_with_the_reference(f, degree, expected):
    assert minimax(f, degree).error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("f", [np.abs, runge, np.exp])
def test_every_degree_is_levelled_to_a_billionth_or_to_rounding(f):
    for degree in range(2, 21):
        best = minimax(f, degree)
        assert best.optimal
        assert best.error - best.lower_bound <= max(1e-9 * best.error, best.rounding)
        assert best.points.size == degree + 2
        if best.error > 1e-13:
            assert np.all(best.values[1:] * best.values[:-1] < 0)
        x = np.linspace(-1, 1, 5003)
        assert np.max(np.abs(best(x) - f(x))) <= best.error * (1 + 1e-9) + best.rounding


@pytest.mark.parametrize("degree", [30, 45, 60])
def test_runge_and_absolute_value_are_solved_to_degree_sixty(degree):
    for f in (runge, np.abs):
        best = minimax(f, degree)
        assert best.error - best.lower_bound <= max(1e-9 * best.error, best.rounding)


@settings(max_examples=12)
@given(st.floats(1.05, 20), st.integers(0, 18))
def test_simple_pole_has_its_closed_form_error(pole, degree):
    # Chebyshev: E_n(1 / (x - a)) = (a - sqrt(a^2 - 1))^n / (a^2 - 1).
    expected = (pole - math.sqrt(pole**2 - 1)) ** degree / (pole**2 - 1)
    best = minimax(lambda x: 1 / (x - pole), degree)
    assert abs(best.error - expected) <= 1e-12 * expected + best.rounding


@pytest.mark.parametrize("power", range(1, 13))
def test_leading_power_costs_a_chebyshev_polynomial(power):
    best = minimax(lambda x: x**power, power - 1)
    assert best.error == pytest.approx(2.0 ** (1 - power), rel=1e-12)


def test_fifth_power_by_degree_four_is_the_printed_cubic():
    best = minimax(lambda x: x**5, 4)
    np.testing.assert_allclose(best.polynomial.convert(kind=Polynomial).coef, [0, -0.3125, 0, 1.25, 0], atol=1e-14)
    assert best.error == pytest.approx(0.0625, rel=1e-13)


def test_line_through_the_exponential_has_its_closed_form():
    best = minimax(np.exp, 1, (0, 1))
    slope = math.e - 1
    middle = math.log(slope)
    intercept = (1 + slope - slope * middle) / 2
    np.testing.assert_allclose(best.polynomial.convert(kind=Polynomial).coef, [intercept, slope], rtol=1e-13)
    assert best.error == pytest.approx(0.1059334163, abs=1e-10)
    np.testing.assert_allclose(best.points, [0, middle, 1], atol=1e-7)


def test_cubic_of_the_exponential_matches_the_reference():
    best = minimax(np.exp, 3)
    expected = [0.99457948, 0.99566771, 0.54297279, 0.17953348]
    np.testing.assert_allclose(best.polynomial.convert(kind=Polynomial).coef, expected, atol=5e-9)
    assert best.error == pytest.approx(0.00552837, abs=5e-9)
    np.testing.assert_allclose(best.points, [-1, -0.68223, 0.04954, 0.73171, 1], atol=6e-6)


def test_parabola_of_the_absolute_value_is_known():
    best = minimax(np.abs, 2)
    np.testing.assert_allclose(best.polynomial.convert(kind=Polynomial).coef, [1 / 8, 0, 1], atol=1e-13)


@pytest.mark.parametrize("degree", [2, 4, 8, 14, 20])
def test_even_function_at_even_degree_is_not_a_trap(degree):
    # A symmetric start levels nothing; the best polynomial is that of the next odd degree.
    for f in (np.abs, runge, np.cos):
        even, odd = minimax(f, degree), minimax(f, degree + 1)
        assert even.error == pytest.approx(odd.error, rel=1e-9, abs=2 * even.rounding)


@pytest.mark.parametrize("degree", [0, 2, 10, 38, 39])
def test_best_approximation_of_a_chebyshev_polynomial_from_below_is_zero(degree):
    t40 = Chebyshev.basis(40)
    best = minimax(t40, degree)
    assert best.error == pytest.approx(1, rel=1e-9)
    assert np.max(np.abs(best.polynomial.coef)) < 1e-9


def test_polynomials_of_the_class_are_found_exactly():
    t40 = Chebyshev.basis(40)
    for f, degree in ((np.zeros_like, 5), (lambda x: 3.0, 4), (t40, 40), (t40, 45), (lambda x: 1 + x - 2 * x**3, 3)):
        best = minimax(f, degree)
        assert best.error <= 4 * best.rounding
    assert minimax(np.zeros_like, 5).error == 0


@pytest.mark.parametrize("scale", [1e100, 1e-100, 1e300, -3.7])
def test_scaling_the_function_scales_the_answer(scale):
    best, plain = minimax(lambda x: scale * np.abs(x), 7), minimax(np.abs, 7)
    assert best.error == pytest.approx(abs(scale) * plain.error, rel=1e-12)
    np.testing.assert_allclose(best.polynomial.coef / scale, plain.polynomial.coef, atol=1e-12)


@settings(max_examples=12)
@given(st.floats(-50, 50), st.floats(0.01, 30), st.integers(1, 9))
def test_moving_and_stretching_the_interval_changes_nothing(a, length, degree):
    plain = minimax(np.abs, degree)
    moved = minimax(lambda x: np.abs(2 * (x - a) / length - 1), degree, (a, a + length))
    assert moved.error == pytest.approx(plain.error, rel=1e-8)


@pytest.mark.parametrize("degree", [1, 5, 10, 20])
def test_square_root_is_solved_up_to_its_singular_end(degree):
    # sqrt on [0, 1] by degree n is |x| on [-1, 1] by degree 2 n.
    assert minimax(np.sqrt, degree, (0, 1)).error == pytest.approx(minimax(np.abs, 2 * degree).error, rel=1e-9)


@pytest.mark.parametrize(("lower", "degree"), [(1e-3, 3), (1e-3, 5), (1e-3, 7), (1e-6, 5), (1e-2, 9), (0.9, 7)])
def test_odd_parity_reproduces_the_step_of_the_optimal_composition(lower, degree):
    best = minimax(np.ones_like, degree, (lower, 1), parity="odd")
    step = optimal_composition(lower, 1, degree=degree)
    assert best.error == pytest.approx(step.error, rel=1e-10)
    assert best.points.size == (degree + 1) // 2 + 1
    power = best.polynomial.convert(kind=Polynomial).coef
    np.testing.assert_allclose(power[1::2], step.coefficients[0], rtol=1e-6)
    assert np.all(power[::2] == 0)


def test_interior_nodes_of_the_odd_steps_match_the_reference():
    five = minimax(np.ones_like, 5, (1e-3, 1), parity="odd").points
    np.testing.assert_allclose(five, [1e-3, 0.3674004, 0.8207813, 1], atol=1e-6)
    seven = minimax(np.ones_like, 7, (1e-3, 1), parity="odd").points
    np.testing.assert_allclose(seven, [1e-3, 0.26694, 0.63773, 0.90417, 1], atol=1e-5)


@pytest.mark.parametrize(("f", "parity"), [(np.abs, "even"), (np.cos, "even"), (np.sin, "odd"), (np.cbrt, "odd")])
def test_parity_on_a_symmetric_interval_is_the_unrestricted_answer(f, parity):
    degree = 7 if parity == "odd" else 8
    restricted, free = minimax(f, degree, (-2, 2), parity=parity), minimax(f, degree, (-2, 2))
    assert restricted.error == pytest.approx(free.error, rel=1e-8, abs=4 * free.rounding)
    wrong = restricted.polynomial.coef[(0 if parity == "odd" else 1) :: 2]
    assert np.all(wrong == 0)


def test_weight_levels_the_weighted_error():
    best = minimax(np.exp, 4, (-1, 1), weight=lambda x: np.exp(-x))
    relative = np.abs(best(best.points) * np.exp(-best.points) - 1)
    np.testing.assert_allclose(relative, best.error, rtol=1e-8)
    assert best.points.size == 6


def test_certificate_accepts_the_optimum_and_rejects_a_thousandth_off():
    for f, degree in ((np.exp, 3), (np.abs, 6), (runge, 9)):
        best = minimax(f, degree)
        assert certify(best.polynomial, f).optimal
        for k in range(degree + 1):
            coef = best.polynomial.coef.copy()
            if abs(coef[k]) < 1e-6:
                continue
            coef[k] *= 1 + 1e-3
            verdict = certify(Chebyshev(coef), f)
            assert not verdict.optimal
            assert verdict.lower_bound <= best.error * (1 + 1e-9) <= verdict.error * (1 + 2e-9)


def test_certificate_knows_the_class_it_is_asked_about():
    cubic = Polynomial([0, -0.3125, 0, 1.25])
    assert certify(cubic, lambda x: x**5, degree=4).optimal
    assert not certify(cubic, lambda x: x**5, degree=5).optimal
    step = optimal_composition(0.1, 1).coefficients[0]
    odd = [0, step[0], 0, step[1], 0, step[2]]
    assert certify(odd, np.ones_like, (0.1, 1), parity="odd").optimal
    assert not certify(odd, np.ones_like, (0.1, 1)).optimal
    assert certify(lambda x: x**2 + 1 / 8, np.abs, degree=2).optimal


def test_certificate_rejects_interpolation_at_chebyshev_points():
    interpolant = Chebyshev.interpolate(np.exp, 8)
    verdict = certify(interpolant, np.exp)
    assert not verdict.optimal
    assert verdict.lower_bound < 1.106429e-8 < verdict.error


def test_mean_of_two_runs_is_the_same_unique_optimum():
    # The same problem reached from the two sides of the interval, so from mirrored starts.
    one = minimax(np.exp, 6)
    other = minimax(lambda x: np.exp(-x), 6)
    mirrored = other.polynomial.coef * (-1.0) ** np.arange(7)
    np.testing.assert_allclose(one.polynomial.coef, mirrored, atol=1e-10)
    assert certify(Chebyshev((one.polynomial.coef + mirrored) / 2), np.exp).optimal


def test_extended_precision_goes_below_the_rounding_error_of_float64():
    best = minimax(mpmath.exp, 15, dps=40)
    assert float(best.error) == pytest.approx(1.48146e-18, rel=4e-6)
    assert 0 <= best.gap <= 1e-9
    with mpmath.workdps(40):
        assert abs(best(mpmath.mpf("0.3")) - mpmath.exp(mpmath.mpf("0.3"))) <= best.error
    np.testing.assert_allclose(best.polynomial(0.3), math.exp(0.3), rtol=1e-15)


def test_extended_precision_agrees_with_float64_where_both_can():
    assert float(minimax(abs, 4, dps=25).error) == pytest.approx(minimax(np.abs, 4).error, rel=1e-9)


def test_function_of_one_number_works_too():
    assert minimax(math.exp, 3).error == pytest.approx(minimax(np.exp, 3).error, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": -1}, "degree must be an integer of at least 0"),
        ({"interval": (1, 1)}, "interval must have a < b"),
        ({"interval": (2, -1)}, "interval must have a < b"),
        ({"interval": (0, math.inf)}, "must be finite"),
        ({"interval": 3}, "interval must be two numbers"),
        ({"parity": "od"}, "did you mean 'odd'"),
        ({"parity": "odd"}, "f must be odd on"),
        ({"parity": "even", "interval": (-1, 2)}, "interval must be symmetric"),
        ({"weight": lambda x: x}, "weight must be positive"),
        ({"f": lambda x: 1 / x, "interval": (0, 1)}, "f must be finite on the interval"),
        ({"f": lambda x: np.full_like(x, np.nan)}, "f must be finite on the interval, got nan"),
        ({"dps": 0}, "dps must be an integer of at least 1"),
        ({"dps": 20, "parity": "even"}, "parity must be None"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        minimax(**{"f": np.exp, "degree": 3, **arguments})


def test_certificate_of_a_bare_function_needs_a_degree():
    with pytest.raises(ValueError, match="degree must be given"):
        certify(np.exp, np.exp)


def test_a_function_that_cannot_be_levelled_comes_back_with_both_bounds_and_a_warning():
    noise = np.random.default_rng(0)
    with pytest.warns(ConvergenceWarning, match=r"is reached, while no polynomial is below"):
        best = minimax(lambda x: noise.standard_normal(x.shape), 5)
    assert not best.optimal
    assert best.lower_bound < best.error


def test_the_derivative_of_the_maximum_norm_is_exact_for_small_steps():
    f = np.array([2.0, -2.0, 1.0, 2.0])
    directions = np.random.default_rng(0).integers(-8, 9, (50, 4)) / 8
    step = 2.0**-10
    for h in directions:
        assert max_norm_derivative(f, h) == (np.abs(f + step * h).max() - 2) / step
    assert max_norm_derivative(np.zeros(4), directions[0]) == np.abs(directions[0]).max()
    # It is no gradient: neither of two opposite directions lowers a maximum taken with both signs.
    assert max_norm_derivative([1.0, -1.0], [1.0, 1.0]) == max_norm_derivative([1.0, -1.0], [-1.0, -1.0]) == 1
    with pytest.raises(ValueError, match="h must have the shape of f"):
        max_norm_derivative([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("f", "degree"), [(np.exp, 3), (runge, 8), (np.abs, 6)])
def test_the_best_polynomial_meets_kolmogorov_s_criterion_and_a_near_one_does_not(f, degree):
    best = minimax(f, degree)
    x = np.unique(np.concatenate([np.linspace(-1, 1, 4001), best.points]))
    random = np.random.default_rng(1)
    error = best(x) - f(x)
    for _ in range(200):
        h = Chebyshev(random.standard_normal(degree + 1))(x)
        assert max_norm_derivative(error, h, tolerance=1e-7) > 0
    other = best.polynomial + 1e-3 * best.error * Chebyshev(random.standard_normal(degree + 1))
    assert max_norm_derivative(other(x) - f(x), best(x) - other(x), tolerance=1e-7) < 0
