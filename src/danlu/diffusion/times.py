"""The times at which a model is trained: three distributions, each a frozen configuration with one function."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._draws import fresh, normal, uniform
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
        self,
        count: int,
        schedule: Schedule,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Return ``count`` times, float32: functions of ``keys`` ``(count,)``, or else drawn by ``generator``."""
        keys = fresh(count, device=device, generator=generator) if keys is None else keys
        return self.low + (self.high - self.low) * uniform(keys, "times")


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes:
    """``t = sigmoid(n)`` with n normal: most of the training at medium noise, very little at the ends.

    A model that has to work at t = 1 in a single step is rarely trained there: with the defaults the larger of two
    times exceeds 0.95 eight times in ten thousand.

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
        self,
        count: int,
        schedule: Schedule,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Return ``count`` times, float32; arguments as :meth:`UniformTimes.draw`."""
        keys = fresh(count, device=device, generator=generator) if keys is None else keys
        return torch.sigmoid(self.mean + self.std * normal(keys, "times"))


@dataclass(frozen=True, kw_only=True)
class LogNormalNoise:
    """``ln(b / a)`` normal, independent of the schedule's time: the noise levels of EDM (arXiv:2206.00364).

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
        self,
        count: int,
        schedule: Schedule,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Return ``count`` times, float32; arguments as :meth:`UniformTimes.draw`.

        Noise levels outside the schedule's range are clamped to it.
        """
        keys = fresh(count, device=device, generator=generator) if keys is None else keys
        ratio = self.mean + self.std * normal(keys, "times")
        return schedule.time(-2 * ratio)


TimesConfig = UniformTimes | LogitNormalTimes | LogNormalNoise
