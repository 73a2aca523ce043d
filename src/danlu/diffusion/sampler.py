r"""From noise to samples, with any denoiser.

A denoiser is a function ``denoise(x, t) -> x0`` of noisy samples ``(b, ...)`` and their times ``(b,)``; it may use any
network, prediction or guidance. Every sampler goes down a grid of times and ends on clean data.

The samplers take steps along ``dx = x_0 da + eps db``, the probability flow written without derivatives of the
schedule, with the x_0 and eps that the denoiser predicts. Euler's rule for it is DDIM. For EDM (a = 1) it is Euler in
sigma, for the straight path Euler in t, and the trapezoid rule is Heun's method in the same variables.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danlu._validate import choice, integer, number
from danlu.diffusion.schedule import Schedule

__all__ = [
    "Denoiser",
    "Posterior",
    "Progress",
    "average_velocity",
    "classifier_free",
    "ddim",
    "ddpm",
    "euler",
    "heun",
    "posterior",
    "prior",
    "time_grid",
]

Denoiser = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]


class _Level(NamedTuple):
    """A time with its a and b: float64 scalars on the CPU, so that multiplying by them waits for no device."""

    t: Tensor | None  # None: clean data, where the denoiser is not evaluated
    a: Tensor
    b: Tensor


class Posterior(NamedTuple):
    """``x_s`` given ``x_t`` and ``x_0`` is normal with mean ``x * x_t + x0 * x_0`` and standard deviation ``std``."""

    x: Tensor
    x0: Tensor
    std: Tensor


def time_grid(schedule: Schedule, steps: int) -> Tensor:
    """Return the falling times ``(steps,)``, float64, at which a sampler evaluates its denoiser.

    They are evenly spaced in the schedule's own time, starting at 1; the step after the last one goes to clean data.
    If t = 0 is clean data, it is left out (1, ..., 1/steps); if the schedule ends with some noise, as EDM does, t = 0
    is the last time (``sigma_max``, ..., ``sigma_min``; then 0).

    Raises:
        ValueError: ``steps`` is below 1.

    >>> from danlu.diffusion import EDM, Flow
    >>> time_grid(Flow(), 4).tolist(), time_grid(EDM(), 3).tolist()
    ([1.0, 0.75, 0.5, 0.25], [1.0, 0.5, 0.0])
    """
    integer("steps", steps)
    if bool(schedule.coefficients(0.0)[1] == 0):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return torch.linspace(1, 0, steps, dtype=torch.float64)


def prior(
    shape: Sequence[int],
    schedule: Schedule,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return samples of the schedule's noise at t = 1: normal with standard deviation ``b(1)``."""
    noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    return schedule.coefficients(1.0)[1] * noise


def posterior(now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Posterior:
    """Return the distribution of the less noisy sample, given the noisier one and the data.

    Args:
        now: ``(a, b)`` of the noisier sample.
        then: of the less noisy.

    >>> from danlu.diffusion import Betas
    >>> reverse = posterior(Betas().coefficients(1.0), Betas().coefficients(0.999))
    >>> [round(c.item(), 5) for c in reverse]
    [0.98995, 0.00013, 0.14142]
    """
    (a, b), (a_then, b_then) = now, then
    ratio = a * b_then / (a_then * b)  # root of SNR now over SNR then
    x = b_then / b * ratio
    return Posterior(x, a_then - a * x, b_then * (1 - ratio * ratio).clamp_min(0).sqrt())


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    *,
    variance: Literal["posterior", "beta"] = "posterior",
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling of Ho et al. (arXiv:2006.11239, algorithm 2), on any grid of any schedule.

    Args:
        denoise: see the module.
        x: noise ``(b, ...)`` at ``times[0]``, for example from :func:`prior`.
        schedule: of the model.
        times: falling, as from :func:`time_grid`.
        variance: of the noise added in each step: ``posterior``, exact for data at a single point, or ``beta``, exact
            for standard normal data. The last step adds no noise.
        generator: source of the added noise; the same seed gives the same samples.
        trajectory: return every state.
        progress: called with the number of steps done and their total.

    Returns:
        Samples like ``x``; with ``trajectory`` ``(len(times) + 1, b, ...)``, from x to the samples.
    """
    choice("variance", variance, ("posterior", "beta"))

    def step(x: Tensor, x0: Tensor, now: _Level, then: _Level) -> Tensor:
        reverse = posterior((now.a, now.b), (then.a, then.b))
        std = reverse.std
        if variance == "beta" and then.t is not None:
            std = (now.b**2 - (now.a / then.a * then.b) ** 2).clamp_min(0).sqrt()
        return _noisy(reverse.x * x + reverse.x0 * x0, std, generator)

    return _walk(denoise, x, schedule, times, step, trajectory, progress)


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Sampling of Song et al. (arXiv:2010.02502, equation 12).

    Each step adds noise of ``eta`` times the ancestral standard deviation: with ``eta = 0`` sampling is deterministic,
    with 1 it is :func:`ddpm`. Other arguments and the result are as in :func:`ddpm`.
    """
    number("eta", eta, low=0, high=1)

    def step(x: Tensor, x0: Tensor, now: _Level, then: _Level) -> Tensor:
        eps = (x - now.a * x0) / now.b
        std = eta * posterior((now.a, now.b), (then.a, then.b)).std
        return _noisy(then.a * x0 + (then.b**2 - std**2).clamp_min(0).sqrt() * eps, std, generator)

    return _walk(denoise, x, schedule, times, step, trajectory, progress)


def euler(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    *,
    trajectory: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Euler's method for the probability flow: :func:`ddim` with eta = 0."""
    return ddim(denoise, x, schedule, times, trajectory=trajectory, progress=progress)


def heun(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    *,
    trajectory: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Heun's method of second order for the probability flow (EDM, arXiv:2206.00364, algorithm 1).

    The denoiser is evaluated twice per step, and once in the last step, which ends on clean data: ``2 len(times) - 1``
    evaluations. Arguments and result as in :func:`ddpm`.
    """

    def step(x: Tensor, x0: Tensor, now: _Level, then: _Level) -> Tensor:
        eps = (x - now.a * x0) / now.b
        guess = then.a * x0 + then.b * eps
        if then.t is None:
            return guess
        late_x0 = denoise(guess, _rows(then.t, x))
        late_eps = (guess - then.a * late_x0) / then.b
        return x + (then.a - now.a) / 2 * (x0 + late_x0) + (then.b - now.b) / 2 * (eps + late_eps)

    return _walk(denoise, x, schedule, times, step, trajectory, progress)


def average_velocity(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    *,
    trajectory: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Follow an average velocity: ``x_r = x_t - (t - r) u(x_t, t, r)``, exact for the true u on any grid.

    Args:
        velocity: ``u(x, t, r)`` of samples ``(b, ...)`` and times ``(b,)``, MeanFlow's (arXiv:2505.13447).
        x: noise at ``times[0]``.
        times: falling, ``(steps + 1,)``: two times for one step, usually 1 and 0.
        trajectory, progress: as in :func:`ddpm`.

    >>> average_velocity(lambda x, t, r: x, torch.tensor([4.0]), torch.tensor([1.0, 0.5, 0.0]))
    tensor([1.])
    """
    times = _check_times(times, low_count=2)
    states = [x]
    for index in range(len(times) - 1):
        now, then = times[index], times[index + 1]
        x = x - (now - then) * velocity(x, _rows(now, x), _rows(then, x))
        if trajectory:
            states.append(x)
        if progress is not None:
            progress(index + 1, len(times) - 1)
    return torch.stack(states) if trajectory else x


def classifier_free(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], classes: Tensor, *, none: int, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``predict`` guided towards ``classes``: ``u + scale (c - u)`` with c given the class and u without.

    Scale 1 is the conditional model and 0 the unconditional one, each at the cost of one evaluation; any other scale
    evaluates both in one batch of twice the size. Source: Ho and Salimans, arXiv:2207.12598, whose w is ``scale - 1``.

    Args:
        predict: a function of x ``(b, ...)``, t ``(b,)`` and class labels ``(b,)`` that returns any prediction (all are
            linear).
        classes: class labels, int64 ``(b,)``.
        none: the label that stands for "no class".
        scale: of the guidance.
    """
    number("scale", scale)
    nothing = torch.full_like(classes, none)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if scale in (0, 1):
            return predict(x, t, classes if scale else nothing)
        both = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([classes, nothing]))
        with_class, without = both.chunk(2)
        return without + scale * (with_class - without)

    return guided


def _walk(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    step: Callable[[Tensor, Tensor, _Level, _Level], Tensor],
    trajectory: bool,
    progress: Progress | None,
) -> Tensor:
    """Go down the grid: evaluate the denoiser, step to the next noise level, and in the last step to clean data."""
    times = _check_times(times, low_count=1)
    a, b = schedule.coefficients(times)
    if bool((b <= 0).any()):
        raise ValueError("times must all have some noise: the step from the last of them to clean data is implied")
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    levels = [*map(_Level, times.unbind(), a.unbind(), b.unbind()), _Level(None, one, zero)]
    states = [x]
    for index, (now, then) in enumerate(pairwise(levels)):
        x = step(x, denoise(x, _rows(times[index], x)), now, then)
        if trajectory:
            states.append(x)
        if progress is not None:
            progress(index + 1, len(times))
    return torch.stack(states) if trajectory else x


def _check_times(times: Tensor, *, low_count: int) -> Tensor:
    """Return the times as float64 on the CPU."""
    times = times.detach().to("cpu", torch.float64)
    falling = times.ndim == 1 and len(times) >= low_count and bool((times.diff() < 0).all())
    if not falling or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must be at least {low_count} falling numbers in [0, 1], got {times.tolist()}")
    return times


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """Return the time once for each row of x, in its dtype and on its device."""
    return t.to(x.device, x.dtype).expand(len(x))


def _noisy(mean: Tensor, std: Tensor, generator: torch.Generator | None) -> Tensor:
    if std == 0:
        return mean
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
