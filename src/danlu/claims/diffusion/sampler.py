"""Samplers on normal data, where the flow is known: orders, narrowing, one exact step."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, relative
from danlu.diffusion import (
    EDM,
    Betas,
    Flow,
    Schedule,
    average_velocity,
    classifier_free,
    ddim,
    ddpm,
    euler,
    heun,
    time_grid,
)

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


def _posterior_of(a: Tensor, b: Tensor, a_next: Tensor, b_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_t and x_0 in the mean of the less noisy sample, and its standard deviation, by conditioning.

    Its noise is ``b_next`` times a normal number, x_t that of its signal and more noise: precisions add up.
    """
    alpha = a / a_next
    added = b**2 - alpha**2 * b_next**2
    precision = 1 / b_next**2 + alpha**2 / added
    return alpha / added / precision, a_next / b_next**2 / precision, precision**-0.5


def _written_out(kind: str, x: Tensor, schedule: Schedule, times: Tensor) -> Tensor:
    """Every state of a sampler by its formulas, from a generator with seed 0; a row a state."""
    generator, states, denoise = torch.Generator().manual_seed(0), [x], _denoiser(schedule)
    for t, after in zip(times, [*times[1:], None]):
        (a, b), x0 = schedule.coefficients(t), denoise(x, t)
        if after is None:
            states.append(x0)
            break
        a_next, b_next = schedule.coefficients(after)
        eps, (of_x, of_x0, std) = (x - a * x0) / b, _posterior_of(a, b, a_next, b_next)
        if kind == "heun":
            guess = a_next * x0 + b_next * eps
            late = denoise(guess, after)
            late_eps = (guess - a_next * late) / b_next
            x = x + (a_next - a) * (x0 + late) / 2 + (b_next - b) * (eps + late_eps) / 2
        elif kind == "ddim":
            x = a_next * x0 + (b_next**2 - (0.6 * std) ** 2).sqrt() * eps
            x = x + 0.6 * std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        else:
            wide = (b**2 - (a / a_next * b_next) ** 2).sqrt() if kind == "beta" else std
            x = of_x * x + of_x0 * x0 + wide * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        states.append(x)
    return torch.stack(states)


def _formula_error(*, swapped: bool = False) -> float:
    """Largest error of the states of four samplers on three schedules; the control swaps the ancestral variances."""
    x, worst = torch.linspace(-2, 2, 5, dtype=torch.float64), 0.0
    for schedule in (Flow(), Betas(), EDM(sigma_max=20.0)):
        times = time_grid(schedule, 6)
        for kind in ("posterior", "beta", "ddim", "heun"):
            generator = torch.Generator().manual_seed(0)
            here = (_denoiser(schedule), x, schedule, times)
            if kind == "heun":
                found = heun(*here, trajectory=True)
            elif kind == "ddim":
                found = ddim(*here, eta=0.6, generator=generator, trajectory=True)
            else:
                variance: Literal["posterior", "beta"] = "beta" if (kind == "beta") != swapped else "posterior"
                found = ddpm(*here, variance=variance, generator=generator, trajectory=True)
            worst = max(worst, float((found - _written_out(kind, x, schedule, times)).abs().max()))
    return worst


def _guidance_error(*, scale: float) -> float:
    """Largest distance from ``(1 + w) c - w u`` at w = 0.5, the guidance of its source."""
    x, classes = torch.linspace(-2, 2, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])

    def predict(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        return x * t + classes

    found = classifier_free(predict, classes, none=7, scale=scale)(x, 0 * x + 0.3)
    return float((found - (1.5 * (0.3 * x + classes) - 0.5 * (0.3 * x + 7))).abs().max())


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

    ends = [average_velocity(velocity, x, torch.tensor(grid, dtype=torch.float64)) for grid in ([1.0, 0], [1, 0.3, 0])]
    return max(float((end - (MEAN + STD * x)).abs().max()) for end in ends)


CLAIMS = (
    Claim(
        name="written-out",
        statement="error of the states of four samplers on three schedules; control: ancestral variances swapped",
        source="arXiv 2006.11239, equations 6 and 7; 2010.02502, equation 12; 2206.00364, algorithm 1",
        expected=4e-15,
        tolerance=at_most(),
        measure=_formula_error,
        control=lambda: _formula_error(swapped=True),
        seconds=0.1,
    ),
    Claim(
        name="classifier-free",
        statement="distance of guidance of scale 1.5 from (1 + w) c - w u at w = 0.5; control: scale 0.5",
        source="Ho and Salimans, arXiv 2207.12598, equation 6",
        expected=3e-15,
        tolerance=at_most(),
        measure=lambda: _guidance_error(scale=1.5),
        control=lambda: _guidance_error(scale=0.5),
        seconds=0.1,
    ),
    Claim(
        name="euler-narrows",
        statement="standard deviation after 4 steps of Euler, of data that have 0.7; control: Heun",
        source="simulation with noise of standard deviation 0.9986: 0.4965",
        expected=0.4965,
        tolerance=relative(1.2e-3),
        measure=lambda: _width(euler, 4),
        control=lambda: _width(heun, 4),
        seconds=0.1,
    ),
    Claim(
        name="second-order",
        statement="order of convergence of Heun's method on EDM's schedule; control: Euler",
        source="Karras et al., arXiv 2206.00364, algorithm 1",
        expected=2,
        tolerance=absolute(0.03),
        measure=lambda: _order(heun),
        control=lambda: _order(euler),
        seconds=0.5,
    ),
    Claim(
        name="one-exact-step",
        statement="error of one or two steps along the average velocity; control: along the velocity itself",
        source="Geng et al., arXiv 2505.13447: x_r = x_t - (t - r) u",
        expected=2e-15,
        tolerance=at_most(),
        measure=lambda: _one_step_error(average=True),
        control=lambda: _one_step_error(average=False),
        seconds=0.1,
    ),
)
