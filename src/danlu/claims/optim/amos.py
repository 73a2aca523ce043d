"""Amos: its authors' own tests, the size of its steps, half of AdamW's memory, and schedules with their half-life."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.claims.frame import Claim, at_most, relative
from danlu.optim import Amos, InverseTime, amos_hyperparameters, param_groups

_Make = Callable[[list[nn.Parameter]], Optimizer]


def _end(make: _Make, start: Tensor, loss_of: Callable[[Tensor], Tensor], steps: int) -> tuple[Tensor, Optimizer]:
    weight = nn.Parameter(start.clone())
    optimizer = make([weight])
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weight).backward()
        optimizer.step()
    return weight.detach(), optimizer


def _parabola(d_coef: float) -> float:
    """Where the number b settles on the authors' parabola."""
    target = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    start = torch.tensor([-1.0, 10.0, 1.0], dtype=torch.float64)
    _, optimizer = _end(
        lambda params: Amos(params, lr=1.0, d_coef=d_coef), start, lambda w: (w - target).square().sum(), 700
    )
    (state,) = optimizer.state.values()
    return float(state["decay"])


def _valley(make: _Make) -> float:
    """Largest distance from the optimum of Rosenbrock's function after 3000 steps from 0."""

    def loss_of(weight: Tensor) -> Tensor:
        return (1 - weight[0]) ** 2 + 100 * (weight[1] - weight[0] ** 2) ** 2

    end, _ = _end(make, torch.zeros(2, dtype=torch.float64), loss_of, 3000)
    return float((end - 1).abs().max())


def _first_step(eta: float) -> float:
    """Size of the first step for an expected scale over that for 0.1."""
    sizes = []
    for scale in (0.1, eta):
        weight = nn.Parameter(torch.zeros(7, 11, dtype=torch.float64))
        optimizer = Amos([{"params": [weight], "eta": scale}], lr=0.01)
        weight.grad = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        optimizer.step()
        sizes.append(float(weight.detach().norm()))
    return sizes[1] / sizes[0]


def _memory(make: Callable[[list[dict[str, Any]]], Optimizer]) -> float:
    """Elements of state over AdamW's two a weight, for the layers of a small Transformer without biases."""
    width = 256
    layers = [nn.Embedding(1009, width), *(nn.Linear(width, width, bias=False) for _ in range(4))]
    layers += [nn.Linear(width, 640, bias=False), nn.Linear(640, width, bias=False), nn.RMSNorm(width)]
    model = nn.Sequential(*layers)
    optimizer = make(param_groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held: int = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values())
    return held / (2 * sum(parameter.numel() for parameter in model.parameters()))


def _balance(*, squared: bool) -> float:
    """Largest relative distance of a schedule from the balance of decay and progress that it solves."""
    step, cosine = 0.01, 0.1
    life = amos_hyperparameters(64, step=step, alignment=cosine).half_life
    form, error, worst = InverseTime(half_life=life, squared=squared), 1.0, 0.0
    for t in range(20_000):
        worst = max(worst, abs(form.factor(t, 1) / error**2 - 1))
        error *= 1 - step * cosine * error**2
    return worst


CLAIMS = (
    Claim(
        name="parabola",
        statement="where the number that slows Amos down settles on its authors' parabola; control: steps not slowed",
        source="the authors' unit test (jestimator), re-implemented from the formulas",
        expected=3.92502,
        tolerance=relative(1e-4),
        measure=lambda: _parabola(0.25),
        control=lambda: _parabola(0.0),
        seconds=1.5,
    ),
    Claim(
        name="rosenbrock",
        statement="distance from the optimum of Rosenbrock's function after 3000 steps; control: AdamW at its rate",
        source="the authors' unit test (jestimator)",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _valley(lambda params: Amos(params, lr=0.5, beta=0.5, clip=1.0, momentum=0.9)),
        control=lambda: _valley(lambda params: torch.optim.AdamW(params, lr=0.5, weight_decay=0.0)),
        seconds=3.0,
    ),
    Claim(
        name="step-follows-scale",
        statement="first step for twice the expected scale over that for once; control: the same scale",
        source="Tian & Parikh, arXiv 2210.11693, algorithm 1",
        expected=2,
        tolerance=relative(1e-12),
        measure=lambda: _first_step(0.2),
        control=lambda: _first_step(0.1),
        seconds=0.1,
    ),
    Claim(
        name="half-the-memory",
        statement="state with momentum over AdamW's, on the layers of a Transformer; control: AdamW itself",
        source="Tian & Parikh, arXiv 2210.11693, abstract: at most 51 %",
        expected=0.51,
        tolerance=at_most(),
        measure=lambda: _memory(lambda groups: Amos(groups, momentum=0.9)),
        control=lambda: _memory(torch.optim.AdamW),
        seconds=0.2,
    ),
    Claim(
        name="rule",
        statement="learning rate for width 768 at a relative step of 1.11e-3, in units of 1e-5; control: a bias",
        source="kexue.fm 9344: 4.005e-5",
        expected=1.11e-3 / math.sqrt(768) * 1e5,
        tolerance=relative(1e-12),
        measure=lambda: amos_hyperparameters(768, step=1.11e-3).lr * 1e5,
        control=lambda: amos_hyperparameters(768, step=1.11e-3, role="bias").lr * 1e5,
        seconds=0.1,
    ),
    Claim(
        name="inverse-time",
        statement="largest distance of inverse time from the balance it solves, 20000 steps; control: its square",
        source="kexue.fm 9344, schedule with fading alignment",
        expected=1e-3,
        tolerance=at_most(),
        measure=lambda: _balance(squared=False),
        control=lambda: _balance(squared=True),
        seconds=0.2,
    ),
)
