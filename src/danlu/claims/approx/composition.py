"""Optimal compositions: the published figures of Polar Express, its misprints, and what mixed degrees gain."""

import math

import numpy as np

from danlu.approx import TABLES, budgeted_composition, fit_composition, optimal_composition, published
from danlu.approx.composition import Coefficients
from danlu.claims.frame import Claim, absolute, at_most

PAPER_CUSHION = 0.02407327424182761


def _distance(found: Coefficients, name: str) -> float:
    """Largest relative distance of any coefficient from a published table."""
    return float(np.max(np.abs(np.array(found) / np.array(TABLES[name].rows) - 1)))


def _outside(lower: float, steps: int, safety: float) -> Coefficients:
    return optimal_composition(lower, steps, cushion=0.02).with_safety(safety).coefficients


def _error_after_eight(sign: float) -> float:
    """Error at x = 1 of the published list, its sixth cubic coefficient multiplied by ``sign``."""
    x = 1.0
    for t, (a, b, c) in enumerate(TABLES["polar_express_unscaled"].rows):
        x = a * x + (sign if t == 5 else 1) * b * x**3 + c * x**5
    return abs(x - 1) if math.isfinite(x) else math.inf


def _same_cubic_twice(lower: float) -> float:
    """Worst error of the best single cubic applied two times."""
    once = optimal_composition(lower, 1, degree=3)
    x = np.geomspace(lower, 1, 20001)
    return float(np.max(np.abs(once(once(x)) - 1)))


def _mixed_over_quintic(degrees: tuple[int, ...]) -> float:
    return budgeted_composition(15, degrees=degrees).error / optimal_composition(1e-3, 5).error


def _fitted_loss(iterations: int) -> float:
    """Mean of the 50 largest errors of six fitted steps on the grid j / 10000."""
    fit = fit_composition(6, iterations=iterations)
    return float(np.sort(np.abs(fit(np.arange(1, 10001) / 10000) - 1))[-50:].mean())


CLAIMS = (
    Claim(
        name="five-quintics",
        statement="worst error of five optimal quintics on [1e-3, 1]; control: Jordan's five shared steps",
        source="arXiv 2505.16932, theorem 3.1 (recursion)",
        expected=0.1134485,
        tolerance=absolute(1e-7),
        measure=lambda: optimal_composition(1e-3, 5).error,
        control=lambda: published("jordan", 5).error,
        seconds=0.1,
    ),
    Claim(
        name="published-list",
        statement="relative distance of the design from the paper's printed coefficients; control: cushion 0.1, "
        "the text's figure taken as the interval ratio",
        source="arXiv 2505.16932, NoahAmsel/PolarExpress",
        expected=1e-10,
        tolerance=at_most(),
        measure=lambda: _distance(
            optimal_composition(1e-3, 8, cushion=PAPER_CUSHION).coefficients, "polar_express_unscaled"
        ),
        control=lambda: _distance(optimal_composition(1e-3, 8, cushion=0.1).coefficients, "polar_express_unscaled"),
        seconds=0.1,
    ),
    Claim(
        name="safety-inside",
        statement="distance from the table of modded-nanogpt with cushion 0.02 and safety 1.02 inside the recursion; "
        "control: the safety factor applied after the design",
        source="KellerJordan/modded-nanogpt (its comment prints cushion 2)",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _distance(
            optimal_composition(1e-3, 5, cushion=0.02, safety=1.02).coefficients, "modded_nanogpt"
        ),
        control=lambda: _distance(_outside(1e-3, 5, 1.02), "modded_nanogpt"),
        seconds=0.1,
    ),
    Claim(
        name="sixth-row",
        statement="error at 1 after the eight printed steps; control: the positive cubic coefficient that the post "
        "prints in row six",
        source="kexue.fm 10996 (table), corrected",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _error_after_eight(1.0),
        control=lambda: _error_after_eight(-1.0),
        seconds=0.01,
    ),
    Claim(
        name="greedy-pair",
        statement="worst error of two greedy cubics on [0.05, 1], which no search beat; control: the best cubic twice",
        source="arXiv 2505.16932, theorem 3.1; global search",
        expected=0.53517290,
        tolerance=absolute(2e-8),
        measure=lambda: optimal_composition(0.05, 2, degree=3).error,
        control=lambda: _same_cubic_twice(0.05),
        seconds=0.1,
    ),
    Claim(
        name="mixed-degrees",
        statement="error of the best 15 matrix products on [1e-3, 1] over five quintics; control: quintics only",
        source="derivation: dynamic programming over costs",
        expected=0.51,
        tolerance=at_most(),
        measure=lambda: _mixed_over_quintic((3, 5, 7, 9)),
        control=lambda: _mixed_over_quintic((5,)),
        seconds=0.5,
    ),
    Claim(
        name="fitted-loss",
        statement="mean of the 50 largest errors of six fitted steps; control: 500 updates instead of 20000",
        source="kexue.fm 10922 (its table has 0.0789)",
        expected=0.0790,
        tolerance=at_most(),
        measure=lambda: _fitted_loss(20_000),
        control=lambda: _fitted_loss(500),
        seconds=60.0,
    ),
)
