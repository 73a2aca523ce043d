"""Learning-rate schedules as factors on every group's own rate, run by ``torch.optim.lr_scheduler.LambdaLR``.

Each schedule is a frozen config whose :meth:`factor` is a pure function of the step, so that it can be drawn, tested
and resumed without an optimizer. Factors multiply, so ratios between the learning rates of groups survive.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from danlu._validate import integer, literals, number, positive


def _check_span(name: str, value: float) -> None:
    """Raise unless ``value`` is a number of steps (int) or a fraction of the run (float)."""
    if isinstance(value, int) and not isinstance(value, bool):
        integer(name, value, low=0)
    else:
        number(name, value, low=0, high=1)


def _steps_of(span: float, total: int) -> int:
    """Return a span in steps: itself if it is an integer, else its fraction of ``total``, rounded."""
    return span if isinstance(span, int) else round(span * total)


def _warm(step: int, warmup: int) -> float:
    """Return the linear warm-up factor; the first step of a warm-up already moves."""
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The full learning rate after a linear warm-up.

    Attributes:
        warmup: steps (int) or fraction of the run (float) of linear warm-up.

    >>> [Constant(warmup=4).factor(step, 100) for step in (0, 1, 3, 50)]
    [0.25, 0.5, 1.0, 1.0]
    """

    warmup: int | float = 0

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup)

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the learning rate at ``step`` (from 0) of ``total`` steps."""
        return _warm(step, _steps_of(self.warmup, total))

    def settles_at(self, total: int) -> float:
        """Return 1: no factor depends on how long the run will be."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, and a decay over the last part of the run.

    The plateau does not depend on the length of the run, so a run can be prolonged from any checkpoint of it
    (Hu et al., MiniCPM, arXiv:2404.06395; the ``sqrt`` decay is 1 - sqrt(progress) of Hägele et al.,
    arXiv:2405.18392).

    Attributes:
        warmup: steps (int) or fraction of the run (float) of linear warm-up.
        decay: steps (int) or fraction of the run (float) of the final decay.
        floor: factor that the decay would reach at the step after the last.
        shape: ``linear`` or ``sqrt``.

    >>> schedule = WarmupStableDecay(warmup=2, decay=0.4, floor=0.0)
    >>> [round(schedule.factor(step, 10), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    warmup: int | float = 0.02
    decay: int | float = 0.3
    floor: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup)
        _check_span("decay", self.decay)
        number("floor", self.floor, low=0, high=1)
        literals(self)

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the learning rate at ``step`` (from 0) of ``total`` steps."""
        span = _steps_of(self.decay, total)
        progress = min(1.0, max(0.0, (step - (total - span)) / span)) if span else float(step >= total)
        fall = math.sqrt(progress) if self.shape == "sqrt" else progress
        return _warm(step, _steps_of(self.warmup, total)) * (1.0 - (1.0 - self.floor) * fall)

    def settles_at(self, total: int) -> float:
        """Return the share of a run of ``total`` steps after which the decay begins."""
        return 1.0 - min(1.0, _steps_of(self.decay, total) / total)

    def decaying_from(self, step: int, total: int, decay: int | None = None) -> "tuple[WarmupStableDecay | None, int]":
        """Return the schedule, and the length, of a run that decays from ``step`` of one of ``total`` steps.

        Args:
            step: steps that were taken.
            total: length of the run that took them.
            decay: steps of the decay; None for the share of the run that this schedule gives it.

        Returns:
            None for the schedule where ``step`` is not in the stable phase.

        >>> WarmupStableDecay(warmup=0.02, decay=0.2).decaying_from(400, 1000)
        (WarmupStableDecay(warmup=20, decay=100, floor=0.0, shape='linear'), 500)
        """
        warmup, span = _steps_of(self.warmup, total), _steps_of(self.decay, total)
        if decay is None:
            share = self.decay / (1 - self.decay) if isinstance(self.decay, float) and self.decay < 1 else None
            decay = span if share is None else max(1, round(step * share))
        integer("decay", decay)
        stable = warmup <= step <= total - span
        return (replace(self, warmup=warmup, decay=decay) if stable else None), step + decay


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 to ``floor`` over the rest (Loshchilov & Hutter, arXiv:1608.03983).

    Attributes:
        warmup: steps (int) or fraction of the run (float) of linear warm-up.
        floor: factor that the cosine would reach at the step after the last.

    >>> [round(Cosine(warmup=0, floor=0.1).factor(step, 4), 4) for step in range(5)]
    [1.0, 0.8682, 0.55, 0.2318, 0.1]
    """

    warmup: int | float = 0.02
    floor: float = 0.1

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup)
        number("floor", self.floor, low=0, high=1)

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the learning rate at ``step`` (from 0) of ``total`` steps."""
        warmup = _steps_of(self.warmup, total)
        progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
        return _warm(step, warmup) * (self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class InverseTime:
    """Decay with time alone: no length of the run is needed in advance.

    With t steps after the warm-up and half-life T the factor is 1 / (1 + t/T), or 1 / (1 + (sqrt(2) - 1) t/T)^2 with
    ``squared``. These are the two solutions of Amos' balance between weight decay and progress: the square belongs to
    updates that stay equally well aligned with the optimum, the plain form to an alignment that fades with the
    distance (Tian & Parikh, arXiv:2210.11693).

    Attributes:
        half_life: steps after the warm-up at which the factor is one half.
        warmup: steps (int) or fraction of the run (float) of linear warm-up.
        squared: the faster form.

    >>> [round(InverseTime(half_life=100).factor(step, 1), 4) for step in (0, 100, 300)]
    [1.0, 0.5, 0.25]
    """

    half_life: float = 1000.0
    warmup: int | float = 0
    squared: bool = False

    def __post_init__(self) -> None:
        positive("half_life", self.half_life)
        _check_span("warmup", self.warmup)

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the rate at ``step`` (from 0); ``total`` counts only for a fractional warm-up."""
        warmup = _steps_of(self.warmup, total)
        lives = max(0, step - warmup) / self.half_life
        decay = (1.0 + (math.sqrt(2.0) - 1.0) * lives) ** -2 if self.squared else 1.0 / (1.0 + lives)
        return _warm(step, warmup) * decay

    def settles_at(self, total: int) -> float:
        """Return 1: no factor depends on how long the run will be."""
        return 1.0


ScheduleConfig = Constant | WarmupStableDecay | Cosine | InverseTime


def schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """Return a scheduler that multiplies every group's learning rate by ``config.factor(step, steps)``.

    Args:
        optimizer: any torch optimizer; each group keeps its own ``initial_lr``.
        config: one of the schedules of this module.
        steps: length of the run. Beyond it the factor stays at its last value.

    Returns:
        A ``LambdaLR``: call ``.step()`` after every optimizer step. Its ``state_dict`` resumes bit-exactly. A group
        that is added to the optimizer later has the learning rate it came with until the next ``.step()``, and that
        times the factor from then on.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8)
    >>> schedule(optimizer, WarmupStableDecay(warmup=4), steps=100).get_last_lr()
    [0.2]
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not callable(getattr(config, "factor", None)):
        accepted = "Constant, WarmupStableDecay, Cosine or InverseTime"
        raise TypeError(f"config must be {accepted}, got {type(config).__name__}")
    integer("steps", steps)
    return _Schedule(optimizer, lambda step: config.factor(step, steps))


class _Schedule(LambdaLR):
    """One factor for all the groups of an optimizer, those that come later included."""

    def get_lr(self) -> list[float | Tensor]:
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            lr = group["lr"]
            self.base_lrs.append(group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr))
            self.lr_lambdas.append(self.lr_lambdas[0])
        return super().get_lr()
