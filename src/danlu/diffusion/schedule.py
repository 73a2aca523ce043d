r"""Noise schedules: how much signal and how much noise there is at each time.

A noisy sample is ``x_t = a(t) x_0 + b(t) eps`` with ``eps ~ N(0, I)``: ``t = 0`` is data, ``t = 1`` is noise. What a
model sees of the data depends on the signal-to-noise ratio ``a^2 / b^2`` alone; how a and b share a given ratio is the
schedule's scale:

=========  =================  ==========================================================
scale      a and b            schedules
=========  =================  ==========================================================
``vp``     ``a^2 + b^2 = 1``  :class:`Cosine`, :class:`Betas` (DDPM, Stable Diffusion)
``ve``     ``a = 1``          :class:`EDM`
``flow``   ``a + b = 1``      :class:`Flow`
=========  =================  ==========================================================

:class:`Shifted` lowers the ratio of any of them for images of higher resolution. Every schedule is its own frozen
configuration; its functions compute in the dtype of ``t`` and are differentiable.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from danlu._autograd import kept
from danlu._validate import integer, number, positive

__all__ = ["EDM", "Betas", "Cosine", "Flow", "Schedule", "ScheduleConfig", "Shifted", "aligned_time", "broadcast"]


class Schedule(ABC):
    """Base of all schedules. Times are tensors in [0, 1] of any shape, or numbers, which count as float64."""

    scale: ClassVar[Literal["vp", "ve", "flow"]]

    @abstractmethod
    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``a(t)`` and ``b(t)``."""

    @abstractmethod
    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``da/dt`` and ``db/dt``."""

    @abstractmethod
    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time at which the logarithm of the signal-to-noise ratio is ``logsnr``, clamped to [0, 1]."""

    def logsnr(self, t: Tensor | float) -> Tensor:
        """Return ``ln a^2 / b^2``, strictly falling in t; infinite where there is no noise or no signal."""
        a, b = self.coefficients(t)
        return 2 * (a.log() - b.log())

    def snr(self, t: Tensor | float) -> Tensor:
        """Return ``a^2 / b^2``."""
        a, b = self.coefficients(t)
        return (a / b) ** 2

    def logsnr_slope(self, t: Tensor | float) -> Tensor:
        """Return the time derivative of :meth:`logsnr`."""
        (a, b), (da, db) = self.coefficients(t), self.derivatives(t)
        return 2 * (da / a - db / b)

    def condition(self, t: Tensor | float) -> Tensor:
        """Return the value on which the network is conditioned at time t: the time itself."""
        return _tensor(t)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """Return ``a(t) x0 + b(t) eps``; ``t`` is one time or one for each row of ``x0`` ``(b, ...)``."""
        a, b = (broadcast(c, x0) for c in self.coefficients(t))
        return a * x0 + b * eps


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """``a = cos(pi t / 2)``, ``b = sin(pi t / 2)``: log SNR ``-2 ln tan(pi t / 2)``.

    Attributes:
        limit: largest absolute log SNR, reached at the ends by shortening the arc that t runs through. None is the full
            arc: then no signal is left at ``t = 1``, and a prediction of the noise says nothing about the data there.

    >>> round(Cosine().time(Cosine().logsnr(0.3)).item(), 12)
    0.3
    """

    scale: ClassVar[Literal["vp", "ve", "flow"]] = "vp"
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            positive("limit", self.limit)

    @property
    def _arc(self) -> tuple[float, float]:
        """The angle at t = 0 and its increase from t = 0 to t = 1."""
        first = 0.0 if self.limit is None else math.atan(math.exp(-self.limit / 2))
        return first, math.pi / 2 - 2 * first

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``a(t)`` and ``b(t)``."""
        t, (first, arc) = _tensor(t), self._arc
        # Both as sines, so that each is exactly zero where it should be.
        return torch.sin(first + arc * (1 - t)), torch.sin(first + arc * t)

    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``da/dt`` and ``db/dt``."""
        a, b = self.coefficients(t)
        return -self._arc[1] * b, self._arc[1] * a

    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time of a log SNR: ``(2 / pi) atan(exp(-logsnr / 2))`` without a limit."""
        first, arc = self._arc
        return ((torch.atan(torch.exp(-_tensor(logsnr) / 2)) - first) / arc).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Betas(Schedule):
    """The discrete processes of DDPM: step i of n replaces a share ``beta_i`` of the variance by noise.

    ``a^2`` after i steps is the product of ``1 - beta``, at time ``t = i / n``. Between two steps the rate of
    replacement is constant, so that ``-ln a^2`` is piecewise linear in t and t = 0 is clean data. The betas grow
    linearly from ``start`` to ``end`` in their power ``1 / power``.

    ========================================  ====================================
    Ho et al., DDPM (arXiv:2006.11239)        ``Betas()``
    kexue.fm 10055: ``1 - .02 i/n``            ``Betas(start=2e-5)``
    Stable Diffusion                          ``Betas(start=.00085, end=.012, power=2)``
    ========================================  ====================================

    Attributes:
        start: the first beta.
        end: the last beta.
        steps: their number n.
        power: 1 or 2.

    >>> a, b = Betas().coefficients(1 / 1000)
    >>> round(b.item() ** 2, 12)
    0.0001
    """

    scale: ClassVar[Literal["vp", "ve", "flow"]] = "vp"
    start: float = 1e-4
    end: float = 0.02
    steps: int = 1000
    power: int = 1

    def __post_init__(self) -> None:
        number("start", self.start, low=0, high=1, low_open=True, high_open=True)
        number("end", self.end, low=0, high=1, low_open=True, high_open=True)
        integer("steps", self.steps)
        integer("power", self.power, high=2)

    def levels(self) -> Tensor:
        """Return the log SNR after each of the ``steps`` steps, float64: the noise levels of a discrete model."""
        return _logsnr_of(_decay(self, torch.device("cpu"), torch.float64)[1:])

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``-ln a^2`` at t and its slope."""
        table = _decay(self, t.device, t.dtype)
        index = (t * self.steps).floor().clamp(0, self.steps - 1)
        below = table[index.long()]
        rise = table[index.long() + 1] - below
        return below + (t * self.steps - index) * rise, rise * self.steps

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``a(t)`` and ``b(t)``."""
        decay, _ = self._segment(_tensor(t))
        return torch.exp(-decay / 2), torch.sqrt(-torch.expm1(-decay))

    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``da/dt`` and ``db/dt``; the latter is infinite at t = 0, where b grows like a square root."""
        (a, b), (_, slope) = self.coefficients(t), self._segment(_tensor(t))
        return -slope / 2 * a, slope / 2 * a * a / b

    def logsnr(self, t: Tensor | float) -> Tensor:
        """Return ``ln a^2 / b^2``."""
        return _logsnr_of(self._segment(_tensor(t))[0])

    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time of a log SNR, clamped to [0, 1]."""
        logsnr = _tensor(logsnr)
        table = _decay(self, logsnr.device, logsnr.dtype)
        decay = torch.logaddexp(torch.zeros_like(logsnr), -logsnr)
        above = torch.searchsorted(table, decay.contiguous(), right=True).clamp(1, self.steps)
        below = table[above - 1]
        return ((above - 1 + (decay - below) / (table[above] - below)) / self.steps).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class EDM(Schedule):
    """``a = 1`` and ``b = sigma(t) = (sigma_min^(1/rho) (1-t) + sigma_max^(1/rho) t)^rho``.

    The network is conditioned on ``ln(sigma) / 4``. Even at t = 0 there is noise of standard deviation ``sigma_min``;
    samplers remove it in a last step. Source: Karras et al., arXiv:2206.00364, equation 5.

    Attributes:
        sigma_min: noise at t = 0.
        sigma_max: noise at t = 1.
        rho: the larger, the more of the time is spent at small noise.

    >>> round(EDM().coefficients(0.8)[1].item(), 6)
    24.408342
    """

    scale: ClassVar[Literal["vp", "ve", "flow"]] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        positive("sigma_min", self.sigma_min)
        positive("rho", self.rho)
        number("sigma_max", self.sigma_max, low=self.sigma_min, low_open=True)

    @property
    def _roots(self) -> tuple[float, float]:
        first = self.sigma_min ** (1 / self.rho)
        return first, self.sigma_max ** (1 / self.rho) - first

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return 1 and ``sigma(t)``."""
        t, (first, rise) = _tensor(t), self._roots
        return torch.ones_like(t), (first + rise * t) ** self.rho

    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return 0 and ``dsigma/dt``."""
        t, (first, rise) = _tensor(t), self._roots
        return torch.zeros_like(t), self.rho * rise * (first + rise * t) ** (self.rho - 1)

    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time of a log SNR, clamped to [0, 1]."""
        first, rise = self._roots
        return ((torch.exp(-_tensor(logsnr) / (2 * self.rho)) - first) / rise).clamp(0, 1)

    def condition(self, t: Tensor | float) -> Tensor:
        """Return ``ln(sigma) / 4``."""
        return self.coefficients(t)[1].log() / 4


@dataclass(frozen=True, kw_only=True)
class Flow(Schedule):
    """``a = 1 - t``, ``b = t``: the straight path of flow matching and MeanFlow, of velocity ``eps - x_0``.

    >>> round(Flow().time(Flow().logsnr(0.25)).item(), 12)
    0.25
    """

    scale: ClassVar[Literal["vp", "ve", "flow"]] = "flow"

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``1 - t`` and ``t``."""
        t = _tensor(t)
        return 1 - t, t

    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return -1 and 1."""
        ones = torch.ones_like(_tensor(t))
        return -ones, ones

    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time of a log SNR: ``sigmoid(-logsnr / 2)``."""
        return torch.sigmoid(-_tensor(logsnr) / 2)


@dataclass(frozen=True, kw_only=True)
class Shifted(Schedule):
    """A schedule for a higher resolution: the noise of ``base`` is ``factor`` times as large relative to the signal.

    Averaging s x s pixels divides the standard deviation of the noise by s and leaves that of smooth images unchanged.
    A model of d x d pixels therefore sees, on its coarse scales, what a model of ``d / s`` pixels sees when its SNR is
    ``s^2`` times lower: ``SNR(t) = SNR_base(t) / s^2``. The network is conditioned on the same times as with ``base``.

    Attributes:
        base: the schedule that is good at the lower resolution.
        factor: s, for example 256 / 64.
        final: s at t = 1, with ln s linear in between (an interpolated schedule: shifted for one resolution at low
            noise, for another at high noise); None for ``factor``.

    Source: Hoogeboom et al., simple diffusion, arXiv:2301.11093, section 3; kexue.fm 10047.

    >>> a, b = Shifted(base=Cosine(), factor=2.0).coefficients(0.5)
    >>> round(a.item(), 6), round(b.item(), 6)
    (0.447214, 0.894427)
    """

    base: Cosine | Betas | EDM | Flow
    factor: float
    final: float | None = None

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        if self.final is not None:
            positive("final", self.final)
            if not bool((self.logsnr_slope(torch.linspace(0, 1, 1003, dtype=torch.float64)[1:-1]) < 0).all()):
                raise ValueError(f"final must keep the ratio falling in t, got {self.final} with factor {self.factor}")

    @property
    def scale(self) -> Literal["vp", "ve", "flow"]:  # type: ignore[override]
        """The scale of ``base``."""
        return self.base.scale

    def _factor(self, t: Tensor) -> tuple[Tensor, float]:
        """Return s at t and the derivative of its logarithm."""
        slope = 0.0 if self.final is None else math.log(self.final / self.factor)
        return self.factor * torch.exp(slope * t), slope

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``a(t)`` and ``b(t)``, on the scale of ``base``."""
        t = _tensor(t)
        a, b = self.base.coefficients(t)
        b = self._factor(t)[0] * b
        total = self._total(a, b)
        return a / total, b / total

    def derivatives(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return ``da/dt`` and ``db/dt``."""
        t = _tensor(t)
        (a, b), (da, db) = self.base.coefficients(t), self.base.derivatives(t)
        factor, slope = self._factor(t)
        db, b = factor * (db + slope * b), factor * b
        total = self._total(a, b)
        change = {"vp": (a * da + b * db) / total, "flow": da + db, "ve": torch.zeros_like(t)}[self.scale]
        return (da - a * change / total) / total, (db - b * change / total) / total

    def logsnr(self, t: Tensor | float) -> Tensor:
        """Return the log SNR of ``base`` less ``2 ln s``."""
        t = _tensor(t)
        return self.base.logsnr(t) - 2 * self._factor(t)[0].log()

    def time(self, logsnr: Tensor | float) -> Tensor:
        """Return the time of a log SNR, clamped to [0, 1]; by bisection where s depends on t."""
        logsnr = _tensor(logsnr)
        if self.final is None:
            return self.base.time(logsnr + 2 * math.log(self.factor))
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        for _ in range(60):
            middle = (low + high) / 2
            earlier = self.logsnr(middle) > logsnr
            low, high = torch.where(earlier, middle, low), torch.where(earlier, high, middle)
        return (low + high) / 2

    def condition(self, t: Tensor | float) -> Tensor:
        """Return the condition of ``base`` at t."""
        return self.base.condition(t)

    def _total(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the divisor that brings a and b back to the scale."""
        return {"vp": torch.hypot(a, b), "flow": a + b, "ve": torch.ones_like(a)}[self.scale]


ScheduleConfig = Cosine | Betas | EDM | Flow | Shifted


def aligned_time(schedule: Schedule, t: Tensor | float, factor: float) -> Tensor:
    """Return the time tau whose signal-to-noise ratio is ``factor^2`` times that at ``t``.

    A noisy image averaged over factor x factor pixels is as noisy as a small image at tau. Where the schedule has no
    noise level as low as that, the result is 0. Source: kexue.fm 10055; Hwang et al., arXiv:2404.01709.

    Args:
        schedule: of the model.
        t: times in [0, 1].
        factor: pixels that are averaged in each direction.

    >>> round(aligned_time(Cosine(), 0.5, 2).item(), 10)
    0.2951672353
    """
    positive("factor", factor)
    return schedule.time(schedule.logsnr(t) + 2 * math.log(factor))


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` ``(b,)`` or ``()`` shaped to multiply ``like`` ``(b, ...)``, in its dtype."""
    return value.to(like.dtype).reshape(value.shape + (1,) * (like.ndim - value.ndim if value.ndim else 0))


def _tensor(t: Tensor | float) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)


def _logsnr_of(decay: Tensor) -> Tensor:
    return -torch.log(torch.expm1(decay))


@kept
def _decay(schedule: Betas, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``-ln a^2`` after 0, 1, ..., n steps."""
    root = 1 / schedule.power
    betas = torch.linspace(schedule.start**root, schedule.end**root, schedule.steps, dtype=torch.float64, device="cpu")
    decay = -torch.log1p(-(betas**schedule.power)).cumsum(0)
    return torch.cat([decay.new_zeros(1), decay]).to(device, dtype)
