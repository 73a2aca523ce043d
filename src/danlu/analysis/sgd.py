r"""The average loss of projected stochastic gradient descent, and the bound on it.

For convex losses, a convex set of diameter D, subgradients of norm at most G and learning rates that never increase,
every comparator :math:`\theta^*` in the set satisfies (Zinkevich, ICML 2003, theorem 1)

.. math:: \frac1T \sum_t L(x_t, \theta_t) - \frac1T \sum_t L(x_t, \theta^*)
          \le \frac{D^2}{2 T \eta_T} + \frac{G^2}{2 T} \sum_t \eta_t .

The loss is taken at :math:`\theta_t`, before the step, on the sample that the step uses. The bound is on average loss
values: it says nothing about the last iterate or about the distance to a minimiser.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu._validate import integer, number, positive

__all__ = [
    "RegretReport",
    "Trajectory",
    "average_loss_report",
    "best_fixed",
    "constant_rates",
    "descend",
    "increasing_rates_example",
    "inverse_root_rates",
    "project_to_ball",
    "regret_bound",
    "step_terms",
]

Loss = Callable[[Any, Tensor], Tensor]
Projection = Callable[[Tensor], Tensor]


def regret_bound(learning_rates: Tensor, diameter: float, gradient_norm: float, *, ordered: bool = True) -> float:
    """Return ``D^2 / (2 T eta_T) + G^2 / (2 T) sum_t eta_t``, the right-hand side of the theorem.

    Args:
        learning_rates: the learning rates eta_t, ``(T,)``, positive.
        diameter: D, the largest distance between two points of the set (not the distance from the start).
        gradient_norm: G, the largest norm of a subgradient over the set.
        ordered: raise if the learning rates increase, a case that the theorem does not cover.

    Raises:
        ValueError: learning rates that are empty, not positive or (``ordered``) increasing; a negative constant.

    >>> round(regret_bound(inverse_root_rates(4, alpha=1.0), 2.0, 1.0), 10)
    1.3480571313
    """
    learning_rates = torch.as_tensor(learning_rates, dtype=torch.float64)
    valid = torch.isfinite(learning_rates) & (learning_rates > 0)
    if learning_rates.ndim != 1 or not len(learning_rates) or not bool(valid.all()):
        got = f"shape {tuple(learning_rates.shape)}: {learning_rates}"
        raise ValueError(f"learning_rates must be a vector of positive numbers, got {got}")
    number("diameter", diameter, low=0)
    number("gradient_norm", gradient_norm, low=0)
    rising = (learning_rates[1:] > learning_rates[:-1]).nonzero()
    if ordered and len(rising):
        step = int(rising[0, 0]) + 1
        before, after = learning_rates[step - 1], learning_rates[step]
        raise ValueError(f"learning_rates must not increase, got {after:g} after {before:g} at step {step}")
    steps = len(learning_rates)
    return float(diameter**2 / (2 * steps * learning_rates[-1]) + gradient_norm**2 / (2 * steps) * learning_rates.sum())


def constant_rates(steps: int, diameter: float, gradient_norm: float) -> Tensor:
    """Return ``D / (G sqrt(T))`` T times: the best constant learning rate. It gives the bound ``D G / sqrt(T)``.

    The number of steps T has to be known in advance.

    >>> round(regret_bound(constant_rates(100, 2.0, 1.0), 2.0, 1.0), 12)
    0.2
    """
    integer("steps", steps)
    positive("diameter", diameter)
    positive("gradient_norm", gradient_norm)
    return torch.full((steps,), diameter / (gradient_norm * math.sqrt(steps)), dtype=torch.float64)


def inverse_root_rates(steps: int, alpha: float) -> Tensor:
    """Return ``alpha / sqrt(t)`` for t = 1 … T, with the bound ``D^2 / (2 alpha sqrt T) + alpha G^2 / sqrt T``.

    The best alpha is ``D / (sqrt(2) G)``. Its bound is sqrt(2) times that of the best constant; T need not be known.

    >>> inverse_root_rates(4, alpha=1.0)[3]
    tensor(0.5000, dtype=torch.float64)
    """
    integer("steps", steps)
    positive("alpha", alpha)
    learning_rates: Tensor = alpha / torch.arange(1, steps + 1, dtype=torch.float64).sqrt()
    return learning_rates


def project_to_ball(radius: float, center: Tensor | None = None) -> Projection:
    """Return the projection on the Euclidean ball, whose diameter is ``2 * radius``.

    >>> project_to_ball(1.0)(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    positive("radius", radius)

    def project(point: Tensor) -> Tensor:
        offset = point if center is None else point - center
        inside: Tensor = offset * (radius / torch.linalg.vector_norm(offset)).clamp(max=1.0)
        return inside if center is None else center + inside

    return project


class Trajectory(NamedTuple):
    """The iterates, losses and gradients of one run of `descend`.

    Attributes:
        points: ``(T + 1, d)``, theta_1 to theta_{T+1}.
        losses: ``(T,)``, each before its step.
        gradients: ``(T, d)``.
        learning_rates: ``(T,)``.
    """

    points: Tensor
    losses: Tensor
    gradients: Tensor
    learning_rates: Tensor


def descend(
    loss: Loss,
    samples: Sequence[Any] | Tensor,
    start: Tensor,
    learning_rates: Tensor,
    project: Projection | None = None,
) -> Trajectory:
    """Run ``theta <- project(theta - eta_t g_t)`` over the samples, one per step.

    Args:
        loss: ``loss(sample, theta)``, a scalar, differentiable or with a subgradient that autograd takes.
        samples: T of them, in the order of their use.
        start: theta_1, ``(d,)``, inside the set.
        learning_rates: ``(T,)``.
        project: onto the convex set; None for an unconstrained problem.

    Raises:
        ValueError: the numbers of learning rates and samples differ.

    >>> path = descend(lambda x, theta: (theta - x).abs().sum(), [1.0, -1.0], torch.zeros(1), torch.ones(2))
    >>> path.points.flatten().tolist(), path.losses.tolist()
    ([0.0, 1.0, 0.0], [1.0, 2.0])
    """
    if len(samples) != len(learning_rates):
        raise ValueError(f"learning_rates must be as many as samples, got {len(learning_rates)} and {len(samples)}")
    if start.ndim != 1 or not start.is_floating_point():
        raise ValueError(f"start must be a floating vector, got {start.dtype} of shape {tuple(start.shape)}")
    points, losses, gradients = [start.detach()], [], []
    for sample, lr in zip(samples, learning_rates.to(start)):
        theta = points[-1].clone().requires_grad_()
        value = loss(sample, theta)
        (gradient,) = torch.autograd.grad(value, theta)
        after = points[-1] - lr * gradient
        points.append(after if project is None else project(after))
        losses.append(value.detach())
        gradients.append(gradient)
    return Trajectory(torch.stack(points), torch.stack(losses), torch.stack(gradients), learning_rates.to(start))


def step_terms(path: Trajectory, comparator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the three terms of the proof, ``(T,)`` each: linear regret, progress towards the comparator, step cost.

    .. math:: (\theta_t - \theta^*) \cdot g_t \;\le\;
              \frac{\lVert\theta_t - \theta^*\rVert^2 - \lVert\theta_{t+1} - \theta^*\rVert^2}{2 \eta_t}
              + \frac{\eta_t \lVert g_t \rVert^2}{2}

    with equality where nothing was projected. They show at which steps a bound is loose.
    """
    offset = path.points - comparator
    squared = offset.square().sum(-1)
    linear = (offset[:-1] * path.gradients).sum(-1)
    progress = (squared[:-1] - squared[1:]) / (2 * path.learning_rates)
    return linear, progress, path.learning_rates * path.gradients.square().sum(-1) / 2


def best_fixed(
    loss: Loss, samples: Sequence[Any] | Tensor, start: Tensor, project: Projection | None = None, steps: int = 500
) -> Tensor:
    """Return the best of ``steps`` projected subgradient steps on the mean loss: a comparator in hindsight.

    Step t has length ``max(1, |start|) / sqrt(t)``. The result is never better than the true minimiser, so a regret
    against it may be too small but not too large. Samples in one tensor, along its first dimension, are evaluated
    together (``torch.func.vmap``); others one after another.
    """
    integer("steps", steps)
    theta, best, least = start.detach().clone(), start.detach().clone(), math.inf
    size = max(1.0, float(torch.linalg.vector_norm(start)))
    for step in range(steps):
        theta.requires_grad_()
        value = _mean_loss(loss, samples, theta)
        (gradient,) = torch.autograd.grad(value, theta)
        theta = theta.detach()
        if value.item() < least:
            best, least = theta.clone(), value.item()
        norm = torch.linalg.vector_norm(gradient)
        if not float(norm):
            break
        theta = theta - size / math.sqrt(step + 1) * gradient / norm
        theta = theta if project is None else project(theta)
    return best


def _mean_loss(loss: Loss, samples: Sequence[Any] | Tensor, theta: Tensor) -> Tensor:
    if isinstance(samples, Tensor):
        losses: Tensor = torch.func.vmap(loss, (0, None))(samples, theta)
        return losses.mean()
    return torch.stack([loss(sample, theta) for sample in samples]).mean()


class RegretReport(NamedTuple):
    """A regret and two bounds on it.

    Attributes:
        regret: mean loss along the path minus the mean loss of the comparator.
        bound: computed from the diameter of the set and the largest gradient norm over the set.
        bound_along_path: computed from the largest distance from the comparator and the largest gradient norm that
            occurred. It is at most ``bound`` and known only after the run.
    """

    regret: float
    bound: float
    bound_along_path: float


def average_loss_report(
    loss: Loss,
    samples: Sequence[Any] | Tensor,
    start: Tensor,
    learning_rates: Tensor,
    *,
    diameter: float,
    gradient_norm: float,
    project: Projection | None = None,
    comparator: Tensor | None = None,
) -> RegretReport:
    """Run projected gradient descent on a convex loss of your own and compare its regret with the bound.

    Args:
        loss, samples, start, learning_rates, project: as in `descend`.
        diameter: D of the set. Without ``project`` the bound holds only if the path stays in a set of this diameter.
        gradient_norm: G over the set: R + b for ``(a . theta - y)^2 / 2`` with ``|a| = 1``, ``|y| <= b``, ball R.
        comparator: any fixed point of the set; None for `best_fixed`.

    >>> samples = torch.tensor([1.0, -1.0]).repeat(500)
    >>> report = average_loss_report(
    ...     lambda x, theta: (theta - x).abs().sum(), samples, torch.zeros(1, dtype=torch.float64),
    ...     inverse_root_rates(1000, alpha=1.0), diameter=2.0, gradient_norm=1.0,
    ...     project=lambda theta: theta.clamp(-1, 1), comparator=torch.zeros(1),
    ... )
    >>> round(report.regret, 8), round(report.bound, 8)
    (0.03119505, 0.09414606)
    """
    bound = regret_bound(learning_rates, diameter, gradient_norm)
    path = descend(loss, samples, start, learning_rates, project)
    fixed = best_fixed(loss, samples, start, project) if comparator is None else comparator.to(start)
    with torch.no_grad():
        rival = _mean_loss(loss, samples, fixed)
    distance = float(torch.linalg.vector_norm(path.points[:-1] - fixed, dim=-1).max())
    steepest = float(torch.linalg.vector_norm(path.gradients, dim=-1).max())
    return RegretReport(float(path.losses.mean() - rival), bound, regret_bound(learning_rates, distance, steepest))


def increasing_rates_example(steps: int = 1000) -> tuple[float, float]:
    """Return the regret of a run whose learning rate increases at the end, and the value of the bound's formula.

    The loss is theta itself on [-1, 1]; the learning rates are 1e-4 and, in the last step, 1. The formula takes the
    distance term from the last learning rate alone and gives a small number, although the path has hardly moved.

    >>> [round(value, 5) for value in increasing_rates_example()]
    [1.95005, 0.00255]
    """
    integer("steps", steps, low=2)
    learning_rates = torch.full((steps,), 1e-4, dtype=torch.float64)
    learning_rates[-1] = 1.0
    start = torch.ones(1, dtype=torch.float64)
    path = descend(lambda _, theta: theta.sum(), range(steps), start, learning_rates, lambda theta: theta.clamp(-1, 1))
    return float(path.losses.mean() + 1), regret_bound(learning_rates, 2.0, 1.0, ordered=False)
