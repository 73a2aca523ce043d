"""Optimal compositions: the published figures of Polar Express, its misprints, and what mixed degrees gain."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from danlu.approx import (
    TABLES,
    budgeted_composition,
    fit_composition,
    matrix_products,
    optimal_composition,
    published,
)
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
    f = published("polar_express_unscaled", 8)
    rows = list(f.coefficients)
    a, b, c = rows[5]
    rows[5] = (a, sign * b, c)
    return abs(float(replace(f, coefficients=tuple(rows))(1.0)) - 1)


def _same_cubic_twice(lower: float) -> float:
    """Worst error of the best single cubic applied two times."""
    once = optimal_composition(lower, 1, degree=3)
    x = np.geomspace(lower, 1, 20001)
    return float(np.max(np.abs(once(once(x)) - 1)))


def _mixed_over_quintic(degrees: tuple[int, ...]) -> float:
    return budgeted_composition(15, degrees=degrees).error / optimal_composition(1e-3, 5).error


def _every_sequence(lower: float, upper: float, budget: float, costs: dict[int, float]) -> float:
    """Smallest error of all sequences of degrees within a budget, one step after the other."""
    best = 1 - 2 * lower / (lower + upper)
    for degree, cost in costs.items():
        if cost <= budget:
            error = optimal_composition(lower, 1, degree=degree, upper=upper).error
            left = _every_sequence(1 - error, 1 + error, budget - cost, costs) if cost < budget else error
            best = min(best, error, left)
    return best


def _distance_from_every_sequence(products_of_nine: int) -> float:
    """Largest distance from the best sequence on [0.02, 1.5], for square matrices and for four times as long ones."""
    inner = {3: 0, 5: 1, 7: 2, 9: products_of_nine}
    worst = 0.0
    for aspect, budget in ((1.0, 9.0), (1.0, 11.0), (4.0, 29.0)):
        costs = {degree: 2 * aspect + more for degree, more in inner.items()}
        found = budgeted_composition(budget, 0.02, 1.5, aspect=aspect)
        spent = abs(matrix_products(found.degrees, aspect) - sum(costs[degree] for degree in found.degrees))
        tried = _every_sequence(0.02, 1.5, budget, costs)
        worst = max(worst, spent, abs(found.error / tried - 1))
    return worst


def _fitted_loss(tolerance: float) -> float:
    """Mean of the 50 largest errors of six fitted steps on the grid j / 10000."""
    fit = fit_composition(6, tolerance=tolerance)
    return float(np.sort(np.abs(fit(np.arange(1, 10001) / 10000) - 1))[-50:].mean())


def _loss_by_torch(w: torch.Tensor, steps: int, x: torch.Tensor, largest: int) -> torch.Tensor:
    for a, b, c in w.expand(steps, 3):
        x = a * x + b * x**3 + c * x**5
    return (x - 1).abs().topk(largest).values.mean()


def _fit_by_torch(start: Sequence[float], rows: int, steps: int, *, corrected: bool) -> list[list[float]]:
    """The 12 updates of a fit by automatic differentiation; the one of lowest loss."""
    x = torch.arange(1, 501, dtype=torch.float64) / 500
    w = torch.tensor([start] * rows, dtype=torch.float64)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    best, least = w, torch.inf
    for count in range(12):
        total = torch.zeros_like(w)
        for share, offset in ((0.6, 0.0), (0.2, 0.05), (0.2, -0.05)):
            moved = (w + offset).requires_grad_()
            loss = _loss_by_torch(moved, steps, x, 50)
            (slope,) = torch.autograd.grad(loss, moved)
            total += share * slope / slope.norm().clamp(min=1)
            if offset == 0 and loss.item() < least:
                best, least = w, loss.item()
        mean, square = 0.9 * mean + 0.1 * total, 0.999 * square + 0.001 * total**2
        ahead, scale = (1 - 0.9 ** (count + 1), 1 - 0.999 ** (count + 1)) if corrected else (1, 1)
        rate = 1e-2 if count < 6 else 1e-3
        w = w - rate * (mean / ahead) / (square / scale + 1e-20).sqrt()
    return best.tolist()


def _distance_from_torch(*, corrected: bool) -> float:
    """Largest distance of fitted coefficients, a step's own and shared ones, from those of automatic derivatives."""
    worst = 0.0
    for kind, start, rows in (
        ("per_step", (3.5, -6.04444444444, 2.84444444444), 3),
        ("shared", (1.5, -0.5, 0.0), 1),
    ):
        fit = fit_composition(3, coefficients=kind, grid=500, iterations=12, learning_rate=1e-2)  # type: ignore[arg-type]
        other = np.broadcast_to(_fit_by_torch(start, rows, 3, corrected=corrected), (3, 3))
        worst = max(worst, float(np.max(np.abs(np.array(fit.coefficients) - other))))
    return worst


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
        statement="error of the best 15 matrix products on [1e-3, 1] over five quintics; control: degrees up to 7",
        source="derivation: dynamic programming over costs (0.5098)",
        expected=0.5098,
        tolerance=absolute(5e-5),
        measure=lambda: _mixed_over_quintic((3, 5, 7, 9)),
        control=lambda: _mixed_over_quintic((3, 5, 7)),
        seconds=0.2,
    ),
    Claim(
        name="every-sequence",
        statement="distance of budgeted compositions from the best of all sequences of degrees, three budgets; "
        "control: a ninth degree counted as three products inside, not two",
        source="derivation: dynamic programming over costs, against enumeration",
        expected=1e-10,
        tolerance=at_most(),
        measure=lambda: _distance_from_every_sequence(2),
        control=lambda: _distance_from_every_sequence(3),
        seconds=1.0,
    ),
    Claim(
        name="fitted-loss",
        statement="mean of the 50 largest errors of six fitted steps; control: gradients at one place, not at three",
        source="kexue.fm 10922 (its table has 0.0789)",
        expected=0.0788,
        tolerance=absolute(5e-4),
        measure=lambda: _fitted_loss(0.1),
        control=lambda: _fitted_loss(0.0),
        seconds=60.0,
    ),
    Claim(
        name="fit-by-hand",
        statement="distance of the coefficients after 12 updates, own and shared, from the same by automatic "
        "derivatives; control: Adam with bias correction",
        source="kexue.fm 10922: the three places, the clipped gradients, the rate that falls half way",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _distance_from_torch(corrected=False),
        control=lambda: _distance_from_torch(corrected=True),
        seconds=0.3,
    ),
)
