"""Which times a model is trained at: three distributions, each a frozen configuration with one function."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._validate import number, positive
from danlu.diffusion.schedule import Schedule

__all__ = ["LogNormalNoise", "LogitNormalTimes", "TimesConfig", "UniformTimes"]


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """Times uniform between ``low`` and ``high``.

    Attributes:
        low: smallest time.
        high: largest time.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        number("low", self.low, low=0, high=1, high_open=True)
        number("high", self.high, low=self.low, high=1, low_open=True)

    def draw(
        self, count: int, schedule: Schedule, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``count`` times, float32."""
        return self.low + (self.high - self.low) * torch.rand(count, device=device, generator=generator)


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes:
    """``t = sigmoid(n)`` with n normal: most of the training at medium noise, very little at the ends.

    A model that has to work at t = 1 in a single step sees it rarely: with the defaults t > 0.95 comes up eight times
    in ten thousand.

    Attributes:
        mean: of n.
        std: of n.
    """

    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self) -> None:
        number("mean", self.mean)
        positive("std", self.std)

    def draw(
        self, count: int, schedule: Schedule, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``count`` times, float32."""
        return torch.sigmoid(self.mean + self.std * torch.randn(count, device=device, generator=generator))


@dataclass(frozen=True, kw_only=True)
class LogNormalNoise:
    """``ln(b / a)`` normal, whatever the schedule's own clock: EDM's choice of noise levels (arXiv:2206.00364).

    Attributes:
        mean: of the logarithm of noise over signal.
        std: of the same.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        number("mean", self.mean)
        positive("std", self.std)

    def draw(
        self, count: int, schedule: Schedule, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``count`` times, float32; levels that the schedule does not reach become its nearest."""
        ratio = self.mean + self.std * torch.randn(count, device=device, generator=generator)
        return schedule.time(-2 * ratio)


TimesConfig = UniformTimes | LogitNormalTimes | LogNormalNoise
