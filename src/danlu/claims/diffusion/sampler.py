"""Samplers on normal data, where the flow is known: orders, narrowing, one exact step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, relative
from danlu.diffusion import EDM, Flow, Schedule, average_velocity, euler, heun, time_grid

MEAN, STD = 0.3, 0.7

_Method = Callable[..., Tensor]


def _denoiser(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, b = schedule.coefficients(t)
        return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)

    return denoise


def _width(method: _Method, steps: int) -> float:
    """Standard deviation of the samples that a method draws along the straight path: where 1 ends less where 0 does."""
    ends = method(_denoiser(Flow()), torch.tensor([0.0, 1.0], dtype=torch.float64), Flow(), time_grid(Flow(), steps))
    return float(ends[1] - ends[0])


def _order(method: _Method) -> float:
    """Order of convergence at t = 0.5 of EDM's schedule, from 128 and 256 steps."""
    schedule, x = EDM(), torch.tensor([-90.0, 50.0], dtype=torch.float64)
    spreads = [torch.hypot(torch.tensor(STD), schedule.coefficients(t)[1]) for t in (0.5, 1.0)]
    exact = MEAN + spreads[0] / spreads[1] * (x - MEAN)
    errors = []
    for half in (64, 128):
        states = method(_denoiser(schedule), x, schedule, time_grid(schedule, 2 * half + 1), trajectory=True)
        errors.append(float((states[half] - exact).abs().max()))
    return math.log2(errors[0] / errors[1])


def _one_step_error(*, average: bool) -> float:
    """Distance from the flow's end after one step along the average (or the momentary) velocity."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        spread_t, spread_r = (torch.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (t, r))
        if average:
            slope = (spread_t - spread_r) / (t - r) / spread_t
        else:
            slope = (t - (1 - t) * STD**2) / spread_t**2
        return -MEAN + slope * (x - (1 - t) * MEAN)

    end = average_velocity(velocity, x, torch.tensor([1.0, 0.0], dtype=torch.float64))
    return float((end - (MEAN + STD * x)).abs().max())


CLAIMS = (
    Claim(
        name="euler-narrows",
        statement="standard deviation after 4 steps of Euler, of data that have 0.7; control: Heun",
        source="simulation with noise of standard deviation 0.9986: 0.4965",
        expected=0.4965,
        tolerance=relative(2.5e-3),
        measure=lambda: _width(euler, 4),
        control=lambda: _width(heun, 4),
        seconds=0.1,
    ),
    Claim(
        name="second-order",
        statement="order of convergence of Heun's method on EDM's schedule; control: Euler",
        source="Karras et al., arXiv 2206.00364, algorithm 1",
        expected=2,
        tolerance=absolute(0.05),
        measure=lambda: _order(heun),
        control=lambda: _order(euler),
        seconds=0.5,
    ),
    Claim(
        name="one-exact-step",
        statement="error of one step along the true average velocity; control: along the velocity itself",
        source="Geng et al., arXiv 2505.13447: x_r = x_t - (t - r) u",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _one_step_error(average=True),
        control=lambda: _one_step_error(average=False),
        seconds=0.1,
    ),
)
