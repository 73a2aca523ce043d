"""Compositions against the printed lists, the error tables, closed forms and the greedy optimality theorem."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.approx import TABLES, large_gap_step, optimal_composition, published
from danlu.approx.composition import _alternate, _cubic

PAPER_CUSHION = 0.02407327424182761  # the ratio at which the optimal quintic leaves (1 - E) / (1 + E) = 0.1

# Pure optimum at lower = 1e-3, six printed decimals.
LIST_A = [
    (8.470329, -25.108075, 18.629276),
    (4.182834, -3.108701, 0.580607),
    (3.961857, -2.954064, 0.562976),
    (3.286586, -2.464720, 0.507358),
    (2.273750, -1.644660, 0.416191),
    (1.888716, -1.265157, 0.376519),
    (1.875001, -1.250001, 0.375000),
    (1.875, -1.25, 0.375),
]
# Safety 1.01 inside the recursion, cushion 0.02, ten steps: rows 1, 2, 3, 4, 5, 6, 7 and the last.
LIST_C = {
    0: (8.237312, -23.157747, 16.680568),
    1: (4.082442, -2.893048, 0.525285),
    2: (3.926348, -2.854747, 0.531802),
    3: (3.298219, -2.424542, 0.486320),
    4: (2.297037, -1.636626, 0.400263),
    5: (1.876381, -1.234790, 0.358919),
    6: (1.856442, -1.213245, 0.356800),
}
CUBIC_ERRORS = [0.9948199, 0.9866146, 0.9657073, 0.9140326, 0.7956135, 0.5681472, 0.2650503, 0.0537293]
CUBIC_ERRORS.extend([2.167e-3, 3.521e-6, 9.3e-12])


def test_pure_optimum_is_list_a():
    np.testing.assert_allclose(optimal_composition(1e-3, 8).coefficients, LIST_A, atol=6e-7, rtol=0)


def test_cushion_of_the_paper_gives_the_published_polar_express_list():
    design = optimal_composition(1e-3, 8, cushion=PAPER_CUSHION)
    np.testing.assert_allclose(design.coefficients, TABLES["polar_express_unscaled"].rows, rtol=1e-10)


def test_safety_inside_the_recursion_gives_the_default_of_the_official_code():
    design = optimal_composition(1e-3, 10, cushion=0.02, safety=1.01)
    for t, row in LIST_C.items():
        np.testing.assert_allclose(design.coefficients[t], row, atol=6e-7, rtol=0)
    # The official code centres its Taylor limit on the right end of the interval, 1 + 2.4e-6, and this one on 1.
    np.testing.assert_allclose(design.coefficients[-1], (1.874995, -1.249991, 0.374995), rtol=2e-5)


def test_safety_inside_and_outside_the_recursion_differ():
    inside = optimal_composition(1e-3, 5, cushion=0.02, safety=1.01)
    outside = optimal_composition(1e-3, 5, cushion=0.02).with_safety(1.01)
    assert inside.coefficients[0] == pytest.approx(outside.coefficients[0], rel=1e-12)
    assert abs(inside.coefficients[4][0] / outside.coefficients[4][0] - 1) > 1e-2


def test_modded_nanogpt_row_is_cushion_002_and_not_the_2_of_its_comment():
    design = optimal_composition(1e-3, 5, cushion=0.02, safety=1.02)
    np.testing.assert_allclose(design.coefficients, TABLES["modded_nanogpt"].rows, rtol=1e-9)
    with pytest.raises(ValueError, match=r"cushion must be in \[0, 1\)"):
        optimal_composition(1e-3, 5, cushion=2, safety=1.02)


def test_sixth_row_of_the_post_has_a_negative_cubic_coefficient():
    assert TABLES["polar_express_unscaled"].rows[5][1] < 0
    misprint = (1.8913014077874002, +1.2679958271945908, 0.37680408948524996)
    rows = (*TABLES["polar_express_unscaled"].rows[:5], misprint)
    x = np.array([0.5])
    for a, b, c in rows:
        x = a * x + b * x**3 + c * x**5
    assert abs(x[0] - 1) > 1


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            optimal_composition(1e-3, 7).errors,
            [0.99152970, 0.96457, 0.8597707, 0.5458933, 0.1134485, 9.1647e-4, 4.811e-10],
        ),
        (
            published("polar_express_unscaled", 7).errors,
            [0.9917128, 0.9659657, 0.8657237, 0.5604174, 0.1235591, 1.1849e-3, 1.04e-9],
        ),
        (
            published("polar_express_unscaled", 8).with_safety(1.01, last=True).errors,
            [0.9917950, 0.9666, 0.8697, 0.5771, 0.1538, 5.593e-3, 9e-6, 2.4e-6],
        ),
        (
            optimal_composition(1e-3, 11, degree=3).errors,
            CUBIC_ERRORS,
        ),
    ],
    ids=["quintic", "published", "published with safety", "cubic"],
)
def test_error_table_is_reproduced(errors, expected):
    # Each printed figure to one unit of its last printed digit: some were rounded and some truncated.
    for got, printed in zip(errors, expected, strict=True):
        digits = len(f"{printed:e}".split("e")[0].rstrip("0").replace(".", ""))
        unit = 10.0 ** (math.floor(math.log10(printed)) - digits + 1)
        assert abs(got - printed) <= unit


def test_first_steps_of_degree_five_and_seven_match_the_reference():
    five = optimal_composition(1e-3, 1)
    np.testing.assert_allclose(five.coefficients[0], (8.4703288, -25.1080747, 18.6292756), rtol=1e-8)
    assert five.error == pytest.approx(0.9915296963, abs=1e-10)
    seven = optimal_composition(1e-3, 1, degree=7)
    expected = (11.77484537, -69.53406065, 128.77049273, -70.99950268)
    np.testing.assert_allclose(seven.coefficients[0], expected, rtol=1e-9)
    assert seven.error == pytest.approx(0.98822522, abs=1e-8)


@given(st.floats(1e-9, 0.9999), st.floats(0.1, 10))
def test_degree_three_exchange_equals_its_closed_form(ratio, scale):
    exchanged, low = _alternate(ratio, 1)
    closed, closed_low = _cubic(ratio)
    np.testing.assert_allclose(exchanged, closed, rtol=1e-7)
    assert low == pytest.approx(closed_low, rel=1e-9)
    # The second printed form: alpha = sqrt(3 / (u^2 + l u + l^2)), beta = 4 / (2 + l u (l + u) alpha^3).
    left, right = ratio * scale, scale
    alpha = math.sqrt(3 / (right * right + left * right + left * left))
    beta = 4 / (2 + left * right * (left + right) * alpha**3)
    step = optimal_composition(left, 1, degree=3, upper=right)
    np.testing.assert_allclose(step.coefficients[0], (1.5 * alpha * beta, -0.5 * alpha**3 * beta), rtol=1e-12)


@given(st.floats(1e-6, 0.9), st.sampled_from([3, 5, 7, 9, 11]), st.floats(0.01, 100))
def test_every_step_equioscillates_at_one_node_more_than_it_has_coefficients(ratio, degree, scale):
    step = optimal_composition(ratio * scale, 1, degree=degree, upper=scale)
    x = np.unique(np.concatenate([np.geomspace(ratio, 1, 4001), np.linspace(ratio, 1, 4001)])) * scale
    error = step(x) - 1
    peaks = error[np.abs(error) > (1 - 1e-3) * step.error]
    alternations = 1 + np.count_nonzero(np.diff(np.sign(peaks)))
    assert alternations == (degree + 1) // 2 + 1
    assert np.max(np.abs(error)) <= step.error * (1 + 1e-9) + 1e-14


@given(st.floats(1e-5, 0.5), st.integers(1, 5), st.sampled_from([3, 5, 7, 9]))
def test_range_of_each_step_is_centred_on_one(lower, steps, degree):
    design = optimal_composition(lower, steps, degree=degree)
    for (low, high), error in zip(design.intervals()[1:], design.errors, strict=True):
        assert low == pytest.approx(1 - error, abs=1e-11)
        assert high == pytest.approx(1 + error, abs=1e-11)


def test_a_design_is_made_once_and_kept():
    assert optimal_composition(1e-3, 6) is optimal_composition(1e-3, 6)


def test_a_longer_design_only_appends_steps():
    longer = optimal_composition(2e-3, 6, degree=7)
    for steps in range(1, 6):
        assert optimal_composition(2e-3, steps, degree=7).coefficients == longer.coefficients[:steps]


@pytest.mark.parametrize(("lower", "error"), [(0.05, 0.53517290), (0.2, 0.11140692)])
def test_no_pair_of_cubics_beats_the_greedy_pair(lower, error):
    greedy = optimal_composition(lower, 2, degree=3)
    assert greedy.error == pytest.approx(error, abs=1e-8)
    rng = np.random.default_rng(0)
    best = math.inf
    for spread in (0.3, 0.03, 3e-3, 3e-4):
        for _ in range(100):
            rows = tuple(tuple(c * (1 + spread * rng.standard_normal()) for c in row) for row in greedy.coefficients)
            best = min(best, type(greedy)(rows, lower, 1.0, (0.0,), "perturbed").on(lower).error)
    assert best >= greedy.error


def test_error_contracts_at_the_asymptotic_rates():
    quintic = optimal_composition(0.2, 3).errors
    assert quintic[2] / quintic[1] ** 3 == pytest.approx(5 / 8, rel=1e-3)
    cubic = optimal_composition(0.2, 5, degree=3).errors
    assert cubic[4] / cubic[3] ** 2 == pytest.approx(3 / 4, rel=1e-3)


def test_first_quintic_has_a_limit_as_lower_vanishes():
    design = optimal_composition(1e-12, 1)
    np.testing.assert_allclose(design.coefficients[0], (8.514306, -25.281765, 18.767460), rtol=2e-6)
    assert design.intervals()[1][0] == pytest.approx(8.5143e-12, rel=1e-4)


def test_paper_cushion_is_the_interval_that_leaves_a_tenth():
    low, high = optimal_composition(PAPER_CUSHION, 1).intervals()[1]
    assert low / high == pytest.approx(0.1, abs=1e-12)


@given(st.floats(1e-4, 0.3), st.integers(2, 6), st.floats(0, 0.1), st.floats(1, 1.05), st.booleans())
def test_reported_error_bounds_a_dense_sample(lower, steps, cushion, safety, recentre):
    design = optimal_composition(lower, steps, cushion=cushion, safety=safety, recentre=recentre)
    x = np.geomspace(lower, 1, 20011)
    sampled = float(np.max(np.abs(design(x) - 1)))
    assert sampled <= design.error + 1e-12
    assert design.error == pytest.approx(sampled, rel=0.02, abs=1e-6)


def test_an_input_one_per_cent_too_large_survives_only_with_safety():
    bare = published("polar_express_unscaled", 10)
    with np.errstate(over="ignore"):
        assert math.isinf(bare(1.001))
    assert np.max(np.abs(bare.with_safety(1.01)(np.linspace(1e-3, 1.01, 5003)) - 1)) < 1e-2


@pytest.mark.parametrize(
    ("name", "steps", "top50", "mean", "low", "high", "at_thousandth", "slope", "worst"),
    [
        ("jordan", 5, 0.4104, 0.1680, 0.682, 1.134, 0.4705, 484.9, 0.5295),
        ("su_shared", 5, 0.3339, 0.1069, 0.821, 1.183, 0.4267, 437.8, 0.5733),
        ("jordan", 6, 0.3405, 0.1930, 0.682, 1.134, 1.1702, 1670, 0.3182),
        ("you", 6, 0.1001, 0.0032, 0.9956, 0.9993, 0.8663, 1137.5, 0.1337),
        ("su_x50", 6, 0.0789, 0.0073, 0.9905, 1.0104, 0.9748, 1476, 0.0252),
        ("su_x200", 6, 0.1090, 0.0036, 0.9953, 1.0048, 0.8297, 1050, 0.1703),
        ("su_x5", 5, 0.1930, 0.0320, 0.9505, 1.0495, 0.6116, 661.9, 0.3884),
        ("polar_express_unscaled", 5, 0.1952, 0.0809, 0.8764, 1.1236, 0.8764, 1026, 0.1236),
        ("polar_express_unscaled", 6, 0.0540, 0.0010, 0.9988, 1.0012, 0.9988, 1941, 0.0012),
        ("classical", 10, 0.2280, 0.0011, 1.0, 1.0, 0.4987, 537, 0.5013),
    ],
)
def test_reference_table_of_the_published_sets(name, steps, top50, mean, low, high, at_thousandth, slope, worst):
    f = published(name, steps)
    x = np.arange(1, 10001) / 10000
    y = f(x)
    errors = np.sort(np.abs(y - 1))
    assert errors[-50:].mean() == pytest.approx(top50, abs=6e-5)
    assert errors.mean() == pytest.approx(mean, abs=6e-5)
    tail = y[x >= 0.01]
    digits = 6e-4 if len(str(low)) == 5 else 6e-5
    assert tail.min() == pytest.approx(low, abs=digits)
    assert tail.max() == pytest.approx(high, abs=digits)
    assert f(1e-3) == pytest.approx(at_thousandth, abs=6e-5)
    assert f.slope == pytest.approx(slope, rel=2e-3)
    assert f.error == pytest.approx(worst, abs=6e-5)


def test_top_fifty_losses_rank_the_fitted_sets():
    x = np.arange(1, 10001) / 10000
    loss = {n: np.sort(np.abs(published(n, 6)(x) - 1))[-50:].mean() for n in ("su_x50", "you", "su_x200", "jordan")}
    assert list(loss) == sorted(loss, key=loss.__getitem__)


def test_jordan_never_converges_but_stays_in_its_limit_set():
    low, high = published("jordan", 40).on(0.1).intervals()[-1]
    assert low == pytest.approx(0.6819, abs=1e-4)
    assert high == pytest.approx(1.1343, abs=1e-4)


def test_published_polar_express_carries_its_safety_on_all_but_the_last_row_of_the_list():
    short, long = published("polar_express", 5), published("polar_express", 9)
    assert short.coefficients[0][0] == pytest.approx(8.287212018145622 / 1.01)
    assert short.coefficients[4][2] == pytest.approx(0.4188073119525673 / 1.01**5)
    assert long.coefficients[7] == long.coefficients[8] == (1.875, -1.25, 0.375)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": 0.0}, "lower must be in"),
        ({"lower": -1.0}, "lower must be in"),
        ({"lower": math.nan}, "lower must be in"),
        ({"lower": 2.0}, "lower must be below upper"),
        ({"upper": math.inf}, "upper must be in"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"degree": 4}, "degree must be odd"),
        ({"degree": 1}, "degree must be an integer from 3 to 15"),
        ({"cushion": 1.0}, "cushion must be in"),
        ({"safety": 0.99}, "safety must be in"),
    ],
)
def test_bad_design_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_composition(**arguments)


def test_bad_names_and_lengths_of_published_sets_are_named():
    with pytest.raises(ValueError, match="did you mean 'polar_express'"):
        published("polar_expres")
    with pytest.raises(ValueError, match="steps must be 6 for 'you'"):
        published("you", 5)
    with pytest.raises(TypeError, match="lower must be a number"):
        optimal_composition("small")


# kexue.fm 10592: rows, columns, steps, coefficients fitted to these sizes, mean (sigma - 1)^2 with them and Jordan's.
FITTED = [
    (1024, 1024, 3, (4.328, -9.666, 7.020), 0.10257, 0.18278),
    (1024, 1024, 5, (3.297, -4.136, 1.724), 0.02733, 0.04431),
    (2048, 1024, 3, (4.095, -9.327, 7.028), 0.01628, 0.06171),
    (2048, 1024, 5, (2.644, -3.128, 1.476), 0.00038, 0.02954),
    (4096, 1024, 3, (3.886, -8.956, 6.948), 0.00371, 0.02574),
    (4096, 1024, 5, (2.461, -2.663, 1.214), 0.00008, 0.02563),
    (2048, 2048, 3, (4.857, -13.103, 11.130), 0.10739, 0.24410),
    (2048, 2048, 5, (3.333, -4.259, 1.779), 0.03516, 0.04991),
    (4096, 4096, 3, (5.460, -17.929, 18.017), 0.11303, 0.33404),
    (4096, 4096, 5, (3.373, -4.613, 2.057), 0.04700, 0.06372),
    (8192, 8192, 3, (6.139, -24.893, 30.147), 0.11944, 0.44843),
    (8192, 8192, 5, (3.389, -4.902, 2.310), 0.05869, 0.07606),
]


@pytest.mark.parametrize(("rows", "columns", "steps", "row", "fitted", "jordan"), FITTED)
def test_every_row_of_the_source_s_table_is_the_error_on_the_law_of_large_gaussian_matrices(
    rows, columns, steps, row, fitted, jordan
):
    # Squared singular values over the Frobenius norm are x / columns with x of Marchenko and Pastur's law.
    ratio = columns / rows
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi
    x = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle)
    weight = np.sin(angle) ** 2 / x
    steps_of = published("jordan", steps)
    for f, printed in [(replace(steps_of, coefficients=(row,) * steps), fitted), (steps_of, jordan)]:
        found = np.average((f(np.sqrt(x / columns)) - 1) ** 2, weights=weight)
        # Three per cent or half of the last digit printed where that is all there is.
        assert found == pytest.approx(printed, rel=0.01 if printed > 1e-3 else 0.03, abs=5e-6)


@pytest.mark.parametrize("z", [0.71, 0.8, 0.9, 0.97])
def test_the_step_for_a_large_gap_takes_the_largest_and_the_largest_other_to_one(z):
    a, b = large_gap_step(z)
    k = math.sqrt(1 - z * z)
    rest = np.linspace(0, k, 1001)
    assert a * z + b * z**3 == pytest.approx(1, rel=1e-12)
    assert a * k + b * k**3 == pytest.approx(1, rel=1e-12)
    # What is below the gap grows, nothing above 1: the polynomial is increasing up to k.
    assert (np.diff(a * rest + b * rest**3) > 0).all()
    assert a > 1.5 * math.sqrt(2) - 1e-12


def test_the_step_for_a_large_gap_is_held_where_it_is_steep_but_safe():
    assert large_gap_step(0.0) == large_gap_step(math.sqrt(0.5))
    assert large_gap_step(1.0) == large_gap_step(0.97)
    with pytest.raises(ValueError, match="largest"):
        large_gap_step(1.1)
    # A matrix with a gap: the largest value is there after one step, and the small ones have grown.
    S = np.array([0.9, *(0.4 / math.sqrt(40) * np.ones(40))])
    S /= np.linalg.norm(S)
    a, b = large_gap_step(S[0])
    assert np.abs(a * S + b * S**3 - 1)[0] < 1e-12
    assert (a * S + b * S**3)[1] > 2.5 * S[1]


def test_published_sets_have_the_lengths_that_their_sources_take():
    lengths = {"classical": 10, "jordan": 5, "su_shared": 5, "you": 6, "su_x50": 6, "su_x200": 6, "su_x5": 5}
    lengths |= {"polar_express": 5, "polar_express_unscaled": 5, "modded_nanogpt": 5, "gram_newton_schulz": 5}
    assert {name: published(name).steps for name in lengths} == lengths
