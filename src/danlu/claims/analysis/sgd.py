"""The bound on the average loss of SGD: a path by hand, three losses, the best constant, its order, where it fails."""

import math

import torch
from torch import Tensor

from danlu.analysis import (
    average_loss_report,
    constant_rates,
    descend,
    increasing_rates_example,
    inverse_root_rates,
    project_to_ball,
    regret_bound,
)
from danlu.claims.frame import Claim, absolute, at_most, relative


def _absolute(x: Tensor, theta: Tensor) -> Tensor:
    return (theta - x).abs().sum()


def _alternating(*, before: bool) -> float:
    """Regret of 1000 steps on |theta - x|, x = 1, -1, 1, …; the loss taken before or after the step."""
    samples = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(500)
    rates = inverse_root_rates(1000, alpha=1.0)
    path = descend(_absolute, samples, torch.zeros(1, dtype=torch.float64), rates, lambda theta: theta.clamp(-1, 1))
    points = path.points[:-1] if before else path.points[1:]
    return float((points[:, 0] - samples).abs().mean()) - 1


def _logistic(x: Tensor, theta: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-(x @ theta))


def _squared(x: Tensor, theta: Tensor) -> Tensor:
    return (x[:-1] @ theta - x[-1]).square() / 2


def _worst_excess() -> float:
    """Largest regret minus bound over two losses and three schedules, 300 steps in the unit ball."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(300, 10, generator=generator, dtype=torch.float64), dim=-1)
    target = (1.5 * torch.rand(300, 1, generator=generator, dtype=torch.float64)).clamp(max=1.5)
    worst = -math.inf
    for loss, samples, steepest in (
        (_logistic, unit, 1 / (1 + math.exp(-1))),
        (_squared, torch.cat([unit, target], -1), 2.5),
    ):
        for rates in (
            constant_rates(300, 2.0, steepest),
            inverse_root_rates(300, alpha=1.0),
            inverse_root_rates(300, alpha=math.sqrt(2) / steepest),
        ):
            report = average_loss_report(
                loss,
                samples,
                torch.zeros(10, dtype=torch.float64),
                rates,
                diameter=2.0,
                gradient_norm=steepest,
                project=project_to_ball(1.0),
            )
            worst = max(worst, report.regret - report.bound)
    return worst


def _rising_excess() -> float:
    regret, formula = increasing_rates_example()
    return regret - formula


def _bound_at(multiple: float) -> float:
    """Bound at a multiple of the best constant rate over D G / sqrt(T)."""
    rates = multiple * constant_rates(777, 3.0, 5.0)
    return regret_bound(rates, 3.0, 5.0) / (15 / math.sqrt(777))


def _order(*, known: bool) -> float:
    """Log-log slope of the bound in T, from 10^3 to 10^5, at the best constant for T or at that for 10^3."""
    few, many = 1000, 100_000
    late = constant_rates(many, 2.0, 1.0) if known else constant_rates(few, 2.0, 1.0)[:1].expand(many)
    bounds = regret_bound(constant_rates(few, 2.0, 1.0), 2.0, 1.0), regret_bound(late, 2.0, 1.0)
    return math.log(bounds[1] / bounds[0]) / math.log(many / few)


def _share_of_the_bound(steps: int) -> float:
    """Regret over bound of the loss theta on [-1, 1] from 1 at the best constant."""
    path = descend(
        lambda _, theta: theta.sum(),
        range(steps),
        torch.ones(1, dtype=torch.float64),
        constant_rates(steps, 2.0, 1.0),
        lambda theta: theta.clamp(-1, 1),
    )
    return float(path.losses.mean() + 1) / (2 / math.sqrt(steps))


CLAIMS = (
    Claim(
        name="path-by-hand",
        statement="regret of 1000 steps on |theta - x| for alternating x; control: the loss taken after the step",
        source="derivation: projected steps of 1 / sqrt(t) on [-1, 1]",
        expected=0.0311950500,
        tolerance=absolute(1e-9),
        measure=lambda: _alternating(before=True),
        control=lambda: _alternating(before=False),
        seconds=0.4,
    ),
    Claim(
        name="regret-below-the-bound",
        statement="largest regret minus bound, two losses, three schedules; control: rates that rise",
        source="Zinkevich, ICML 2003, theorem 1; kexue.fm 9902",
        expected=1e-9,
        tolerance=at_most(),
        measure=_worst_excess,
        control=_rising_excess,
        seconds=2.0,
    ),
    Claim(
        name="rising-rates-break-it",
        statement="regret of theta on [-1, 1] with the rates 1e-4, …, 1e-4, 1; control: what the formula gives",
        source="derivation: 1 - 999 * 1e-4 / 2 + 1",
        expected=1.95005,
        tolerance=relative(1e-9),
        measure=lambda: increasing_rates_example()[0],
        control=lambda: increasing_rates_example()[1],
        seconds=0.4,
    ),
    Claim(
        name="best-constant",
        statement="bound at the rate D / (G sqrt T) over D G / sqrt T; control: twice the rate",
        source="kexue.fm 9902: the minimum over constant rates",
        expected=1.0,
        tolerance=absolute(1e-12),
        measure=lambda: _bound_at(1.0),
        control=lambda: _bound_at(2.0),
        seconds=0.1,
    ),
    Claim(
        name="order",
        statement="slope of the bound in the number of steps; control: a rate that does not fall with it",
        source="kexue.fm 9902: O(1 / sqrt T)",
        expected=-0.5,
        tolerance=absolute(0.01),
        measure=lambda: _order(known=True),
        control=lambda: _order(known=False),
        seconds=0.1,
    ),
    Claim(
        name="half-of-it-is-reached",
        statement="regret over bound of a linear loss, 10^4 steps; control: 100 steps",
        source="derivation: (1 + 1 / sqrt T) / 2",
        expected=0.505,
        tolerance=relative(1e-6),
        measure=lambda: _share_of_the_bound(10_000),
        control=lambda: _share_of_the_bound(100),
        seconds=1.5,
    ),
)
