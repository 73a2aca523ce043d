"""Mixed-degree compositions: optimal among all sequences of their cost, and better than quintics alone."""

import itertools

import numpy as np
import pytest

from danlu.approx import budgeted_composition, matrix_products, optimal_composition
from danlu.approx.composition import _designed


def designed(degrees, lower):
    return _designed(lower, 1.0, degrees, 0.0, 1.0, True, "by hand")


@pytest.mark.parametrize(("lower", "products"), [(1e-3, 10), (1e-2, 9), (0.1, 8)])
def test_no_sequence_within_the_budget_is_better(lower, products):
    best = budgeted_composition(products, lower)
    assert matrix_products(best.degrees) <= products
    for length in range(1, products // 2 + 1):
        for degrees in itertools.product((3, 5, 9), repeat=length):
            if matrix_products(degrees) <= products:
                assert designed(degrees, lower).error >= best.error - 1e-12


def test_mixed_degrees_halve_the_error_of_five_quintics_at_their_cost():
    quintics, mixed = optimal_composition(1e-3, 5), budgeted_composition(15)
    assert matrix_products(mixed.degrees) == matrix_products(quintics.degrees) == 15
    assert mixed.error == pytest.approx(0.0578349, abs=1e-7)
    assert mixed.error < 0.51 * quintics.error


def test_stated_error_is_the_error_on_a_dense_sample():
    best = budgeted_composition(14, 1e-3)
    x = np.geomspace(1e-3, 1, 30011)
    assert np.max(np.abs(best(x) - 1)) == pytest.approx(best.error, rel=1e-4)


def test_one_degree_gives_the_greedy_composition():
    assert budgeted_composition(15, degrees=(5,)).coefficients == optimal_composition(1e-3, 5).coefficients


def test_wide_matrices_favour_higher_degrees():
    quintics = optimal_composition(1e-3, 5)
    wide = budgeted_composition(matrix_products(quintics.degrees, aspect=4), aspect=4)
    assert matrix_products(wide.degrees, aspect=4) == 40 < 45 == matrix_products(quintics.degrees, aspect=4)
    assert wide.error < 0.09 * quintics.error


def test_a_budget_beyond_rounding_is_not_spent():
    rich = budgeted_composition(40, 1e-2)
    assert rich.error < 1e-14
    assert matrix_products(rich.degrees) < 20


def test_product_counts_follow_paterson_and_stockmeyer():
    assert [matrix_products([d]) for d in (3, 5, 7, 9, 11, 13)] == [2, 3, 4, 4, 5, 5]
    assert matrix_products([3, 5], aspect=2.5) == 5 + 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"products": 1}, "products must be at least 2"),
        ({"products": 0}, "products must be in"),
        ({"products": 9, "degrees": (4,)}, "degrees must be odd"),
        ({"products": 9, "degrees": ()}, "degrees must be a tuple"),
        ({"products": 9, "aspect": 0.5}, "aspect must be in"),
        ({"products": 9, "lower": 0.0}, "lower must be in"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        budgeted_composition(**arguments)
