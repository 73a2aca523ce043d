"""The best composition of odd polynomials, of possibly different degrees, for a budget of matrix products.

A step of degree d on an m x n matrix (m <= n) forms the Gram matrix, evaluates a polynomial in it by the scheme of
Paterson and Stockmeyer, and multiplies the result with the matrix. Each step's error depends only on the ratio of the
ends of the interval before it, and falls as that ratio rises. So the best composition of a given cost is the best one
of a smaller cost followed by one more minimax step: dynamic programming over costs finds the optimum over all orders of
all degrees, by the argument that proves the greedy choice optimal for one degree (arXiv 2505.16932, theorem 3.1).
"""

import functools
from collections.abc import Sequence

from danlu import _validate
from danlu.approx.composition import Composition, _check_degree, _check_interval, _designed, _minimax_step

__all__ = ["budgeted_composition", "matrix_products"]

_DEGREES = (3, 5, 7, 9)


def matrix_products(degrees: Sequence[int], aspect: float = 1.0) -> float:
    """Count the matrix products of a composition, in units of a square product on the small side (2 m^3 operations).

    Args:
        degrees: odd degree of each step.
        aspect: long side over short side, n / m, at least 1.

    Raises:
        ValueError: if a degree is not odd from 3 to 15 or aspect is below 1.

    >>> matrix_products([5, 5, 5, 5, 5]), matrix_products([3]), matrix_products([9]), matrix_products([5], aspect=4)
    (15.0, 2.0, 4.0, 9.0)
    """
    _validate.number("aspect", aspect, low=1)
    for degree in degrees:
        _check_degree("degrees", degree)
    return float(sum(2 * aspect + _inner_products((degree - 1) // 2) for degree in degrees))


def budgeted_composition(
    products: float,
    lower: float = 1e-3,
    upper: float = 1.0,
    *,
    degrees: tuple[int, ...] = _DEGREES,
    aspect: float = 1.0,
    cushion: float = 0.0,
    safety: float = 1.0,
) -> Composition:
    """Design the composition with the smallest error on ``[lower, upper]`` that costs at most ``products`` products.

    The sequence of degrees is optimal for exact arithmetic; cushion and safety are then applied to it as in
    ``optimal_composition``. High degrees have large coefficients of both signs (635 at degree 9 on [1e-3, 1]) and so
    amplify rounding: in bfloat16 keep to ``degrees=(3, 5)``.

    Args:
        products: the budget, in square products on the small side (``matrix_products`` counts them).
        lower: smallest value to be brought to 1, above 0.
        upper: largest value.
        degrees: the odd degrees to choose from.
        aspect: long side over short side of the matrices it is meant for.
        cushion: see ``optimal_composition``.
        safety: see ``optimal_composition``.

    Raises:
        ValueError: if the budget is below the cost of one step, or an argument is out of range.

    >>> best = budgeted_composition(15)
    >>> sorted(best.degrees), matrix_products(best.degrees) <= 15
    ([5, 9, 9, 9], True)
    """
    _check_interval(lower, upper)
    _validate.positive("products", products)
    if not isinstance(degrees, tuple) or not degrees:
        raise ValueError(f"degrees must be a tuple of odd degrees, got {degrees!r}")
    cheapest = min(matrix_products([degree], aspect) for degree in degrees)
    if products < cheapest:
        raise ValueError(f"products must be at least {cheapest:g}, the cost of one step, got {products}")
    _validate.number("cushion", cushion, low=0, high=1, high_open=True)
    _validate.number("safety", safety, low=1)
    sequence = _best_sequence(float(products), lower / upper, tuple(sorted(set(degrees))), float(aspect))
    name = "minimax degrees " + " ".join(map(str, sequence))
    return _designed(float(lower), float(upper), sequence, float(cushion), float(safety), True, name)


@functools.lru_cache(maxsize=256)
def _best_sequence(budget: float, ratio: float, degrees: tuple[int, ...], aspect: float) -> tuple[int, ...]:
    """Extend the best composition of every cost, cheapest first; keep one only if it beats all cheaper ones."""
    best: dict[float, tuple[float, tuple[int, ...]]] = {0.0: (ratio, ())}
    done: list[float] = []
    while open_costs := [cost for cost in best if cost not in done]:
        cost = min(open_costs)
        done.append(cost)
        reached, sequence = best[cost]
        if reached > 1 - 1e-15 or any(best[other][0] >= reached for other in done[:-1]):
            continue
        for degree in degrees:
            total = round(cost + matrix_products([degree], aspect), 9)
            if total > budget:
                continue
            _, low = _minimax_step(reached, 1.0, degree)
            # The range [low, 2 - low], by the ratio of its ends.
            new = low / (2 - low)
            if total not in best or new > best[total][0]:
                best[total] = (new, (*sequence, degree))
    # The cheapest of those that are equal to rounding.
    paid = [best[cost] for cost in sorted(best) if cost > 0]
    return max(paid, key=lambda found: min(found[0], 1 - 1e-15))[1]


def _inner_products(n: int) -> int:
    """Count the products for a polynomial of degree n in a matrix: ``k - 1`` powers, then Horner in blocks of k."""
    return min(k - 1 + n // k - (n % k == 0) for k in range(1, n + 1))
