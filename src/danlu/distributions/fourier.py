r"""Fourier basis density (De la Fuente, Singh and Balle, arXiv 2402.15345; kexue.fm 10007).

Every density of period 2 whose Fourier series ends at degree N, and no function with negative values, has the form

.. math:: p(x) = \frac{|A(x)|^2}{2 c_0} = \frac12 + \mathrm{Re} \sum_{n=1}^N \frac{c_n}{c_0} e^{i\pi n x}, \qquad
    A(x) = \sum_{k=0}^N a_k e^{-i\pi k x}, \qquad c_n = \sum_{k=0}^{N-n} a_k \bar a_{k+n},

with free complex numbers :math:`a_k` (the theorem of Fejer and Riesz). Densities are computed from the square, which
cannot be negative in any precision; integrals from the series, which is exact. The mass of an interval is

.. math:: P(y) - P(x) = h \Big( \tfrac12 + \sum_{n=1}^N \mathrm{Re}\,\tfrac{c_n}{c_0} e^{i\pi n m}\,
    \mathrm{sinc}\,\tfrac{n h}{2} \Big), \qquad m = \tfrac{x + y}{2}, \quad h = y - x,

without cancellation however narrow the interval is (the distribution function printed in the post is wrong). The
density does not change when all :math:`a_k` are multiplied by one complex number, nor when they are reversed and
conjugated.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from danlu._validate import integer, number

__all__ = ["FourierDensity"]

_CELLS = 4096
"""Least number of histogram cells in a fit; the cost of a fit does not depend on the number of samples."""


class _NonzeroVector(constraints.Constraint):
    """Finite complex vectors that are not zero."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(value).all(-1) & (value != 0).any(-1)

    def __repr__(self) -> str:
        return "FiniteNonzeroVector()"


class FourierDensity(Distribution):
    r"""Density on ``[loc - scale, loc + scale]``, periodic, whose Fourier series has ``degree`` harmonics.

    Sampling inverts the distribution function; samples and quantiles are differentiable in all parameters (by the
    implicit function theorem), so `rsample` exists. With ``validate_args=False`` values outside the interval are
    continued periodically.

    Args:
        coefficients: a_0 to a_N of the formula above, ``(..., N + 1)``, complex64 or complex128; real ones (float32,
            float64) give a density that is symmetric about ``loc``. Only their ratios matter.
        loc: middle of the interval, broadcast against the batch.
        scale: half the period, positive, broadcast against the batch.
        validate_args: as everywhere in ``torch.distributions``.

    Raises:
        TypeError: coefficients that are not a float32, float64, complex64 or complex128 tensor.
        ValueError: no coefficients, or (validated) all of them zero, one not finite, a scale that is not positive.

    >>> p = FourierDensity(torch.tensor([1.0, 1.0], dtype=torch.float64))
    >>> p.log_prob(torch.tensor([-0.5, 0.0, 0.5])).exp()  # (1 + cos(pi x)) / 2
    tensor([0.5000, 1.0000, 0.5000], dtype=torch.float64)
    >>> p.cdf(p.icdf(torch.tensor(0.3, dtype=torch.float64)))
    tensor(0.3000, dtype=torch.float64)
    >>> p.sample((3,)).shape, p.mean, p.variance  # 1/3 - 2/pi^2
    (torch.Size([3]), tensor(0., dtype=torch.float64), tensor(0.1307, dtype=torch.float64))
    """

    arg_constraints = {  # noqa: RUF012 - torch's own convention
        "coefficients": _NonzeroVector(),
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(
        self,
        coefficients: Tensor,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        coefficients = _as_complex(coefficients)
        real = coefficients.real
        loc, scale = (torch.as_tensor(x, dtype=real.dtype, device=real.device) for x in (loc, scale))
        batch = torch.broadcast_shapes(coefficients.shape[:-1], loc.shape, scale.shape)
        self.coefficients = coefficients.expand(*batch, coefficients.shape[-1])
        self.loc, self.scale = loc.expand(batch), scale.expand(batch)
        super().__init__(batch, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FourierDensity":
        """Return the same density expanded to a larger batch shape, without copying."""
        new: FourierDensity = self._get_checked_instance(FourierDensity, _instance)
        batch = torch.Size(batch_shape)
        new.coefficients = self.coefficients.expand(*batch, self.degree + 1)
        new.loc, new.scale = self.loc.expand(batch), self.scale.expand(batch)
        super(FourierDensity, new).__init__(batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The closed interval from ``loc - scale`` to ``loc + scale``."""
        return constraints.interval(self.loc - self.scale, self.loc + self.scale)

    @property
    def degree(self) -> int:
        """N, the highest harmonic."""
        return self.coefficients.shape[-1] - 1

    @property
    def autocorrelation(self) -> Tensor:
        """``c_n / c_0`` for n = 0 to N, ``(..., N + 1)``, complex: the conjugate of ``E[exp(i pi n z)]``."""
        # On 2N + 1 points or more the transform of |A|^2 has no aliases.
        points = 2 * self.degree + 1
        spectrum: Tensor = torch.fft.fft(_power(self._unit, points), norm="forward")
        return spectrum[..., : self.degree + 1]

    @property
    def mean(self) -> Tensor:
        """E[x], ``batch_shape``, in closed form (of the interval, not of the circle)."""
        return self.loc + self.scale * self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Var[x], ``batch_shape``, in closed form (of the interval, not of the circle)."""
        first, second = self._moments()
        return self.scale**2 * (second - first**2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``log p(value)``. At a zero of p it is the log of the smallest normal number, with gradient 0."""
        if self._validate_args:
            self._validate_sample(value)
        return _log(self._density((value - self.loc) / self.scale)) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        """Return the mass to the left of ``value``."""
        if self._validate_args:
            self._validate_sample(value)
        return self._below((value - self.loc) / self.scale)

    def mass(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the mass between ``lower`` and ``upper``, accurate for intervals of any width.

        Raises:
            ValueError: (validated) a bound outside the support, or ``upper`` below ``lower``.
        """
        if self._validate_args:
            self._validate_sample(lower)
            self._validate_sample(upper)
            _ordered(lower, upper)
        return self._mass(((lower + upper) / 2 - self.loc) / self.scale, (upper - lower) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile of ``value`` in [0, 1], whose mass is exact up to rounding; differentiable.

        Raises:
            ValueError: (validated) a value outside [0, 1].
        """
        if self._validate_args and not bool(constraints.unit_interval.check(value).all()):
            raise ValueError("value must be in [0, 1], got a tensor with elements outside")
        return self.loc + self.scale * self._quantile(value)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draw ``sample_shape + batch_shape`` samples by inversion, differentiable in the parameters."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        # Strictly inside, so that a map onto the whole line stays finite.
        edge = 1 - torch.finfo(u.dtype).eps
        return self.loc + self.scale * self._quantile(u).clamp(-edge, edge)

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats by the trapezoidal rule on ``64 (N + 1)`` points.

        The error falls exponentially with the distance of A's zeros from the real line; with zeros on it, it is 1e-6.
        """
        power = _power(self._unit, 64 * (self.degree + 1))
        return self.scale.log() - (power * _log(power / 2)).mean(-1)

    def roughness(self) -> Tensor:
        r"""Return the integral of ``p'(x)^2``, ``batch_shape``: the penalty for a fit to few samples.

        It is computed for p. The paper's penalty is for ``2 c_0 p`` and has no effect, because an optimizer can make it
        vanish by making all coefficients smaller.
        """
        n = self._harmonics()
        spectrum = self.autocorrelation[..., 1:]
        return math.pi**2 * (n**2 * (spectrum.real**2 + spectrum.imag**2)).sum(-1) / self.scale**3

    def modes(self) -> Tensor:
        """Return the places of all local maxima, ripples included, ascending, from ``64 (N + 1)`` points.

        Raises:
            ValueError: a batch of densities: their numbers of modes may differ.
        """
        if self.batch_shape:
            raise ValueError(f"modes needs one density, got a batch of shape {tuple(self.batch_shape)}")
        points = 64 * (self.degree + 1)
        middle = _power(self._unit, points)
        left, right = middle.roll(1), middle.roll(-1)
        peaks = ((middle > left) & (middle >= right)).nonzero()[:, 0]
        left, middle, right = left[peaks], middle[peaks], right[peaks]
        x = 2 * (peaks + (left - right) / (2 * (left - 2 * middle + right))) / points
        return (self.loc + self.scale * (torch.remainder(x + 1, 2) - 1)).sort().values

    @classmethod
    def fit(
        cls, samples: Tensor, degree: int, *, loc: float = 0.0, scale: float = 1.0, penalty: float = 0.0
    ) -> "FourierDensity":
        """Return the maximum-likelihood density, found by L-BFGS from the factor of a smoothed histogram.

        The likelihood is that of a histogram of 4096 cells or more, so the cost does not grow with the number of
        samples. The problem is convex in the c_n, so there are no bad local optima.

        Args:
            samples: ``(n,)``, inside the interval; the result has their precision and device.
            degree: N; a bump of standard deviation sigma needs about ``3 scale / (pi sigma)``.
            loc: middle of the interval.
            scale: half its length.
            penalty: weight of `roughness` (on ``[-1, 1]``), added to the mean negative log-likelihood.

        Raises:
            TypeError: samples that are not a floating-point tensor, a degree that is not an integer.
            ValueError: samples that are not a vector, empty, outside the interval or not finite; options out of range.

        >>> x = FourierDensity(torch.tensor([2.0, 1.0])).icdf((torch.arange(1000) + 0.5) / 1000)
        >>> FourierDensity.fit(x, degree=1).autocorrelation.real  # c_1 / c_0 = 2 / 5
        tensor([1.0000, 0.4000])
        """
        number("loc", loc)
        number("scale", scale, low=0, low_open=True)
        unit = (_vector(samples).double() - loc) / scale
        if bool((unit.abs() > 1 + 1e-6).any()):
            came = f"values from {samples.min():g} to {samples.max():g}"
            raise ValueError(f"samples must be in [{loc - scale:g}, {loc + scale:g}], got {came}")
        return cls(_maximum_likelihood(unit, degree, penalty).to(samples.dtype.to_complex()), loc, scale)

    @property
    def _unit(self) -> Tensor:
        """Return the coefficients at norm 1. The first division keeps their squares from under- and overflowing."""
        largest = self.coefficients.detach().abs().amax(-1, keepdim=True)
        a = self.coefficients / largest
        norm: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        return a / norm

    def _harmonics(self) -> Tensor:
        return torch.arange(1, self.degree + 1, dtype=self.loc.dtype, device=self.loc.device)

    def _density(self, x: Tensor) -> Tensor:
        """The density at ``x`` of the interval [-1, 1]."""
        k = torch.arange(self.degree + 1, dtype=self.loc.dtype, device=self.loc.device)
        amplitude = (self._unit * _wave(-x.unsqueeze(-1) * k)).sum(-1)
        return (amplitude.real**2 + amplitude.imag**2) / 2

    def _mass(self, middle: Tensor, width: Tensor) -> Tensor:
        """The mass of an interval of [-1, 1] given by its middle and width."""
        n = self._harmonics()
        waves = (self.autocorrelation[..., 1:] * _wave(middle.unsqueeze(-1) * n)).real
        return (width * (0.5 + (waves * torch.sinc(width.unsqueeze(-1) * n / 2)).sum(-1))).clamp(0, 1)

    def _below(self, x: Tensor) -> Tensor:
        return self._mass((x - 1) / 2, x + 1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The first two moments on [-1, 1]."""
        n = self._harmonics()
        signed = (1 - 2 * (n % 2)) / (math.pi * n)
        spectrum = self.autocorrelation[..., 1:]
        first = 2 * (signed * spectrum.imag).sum(-1)
        return first, 1 / 3 + 4 * (signed / (math.pi * n) * spectrum.real).sum(-1)

    def _quantile(self, u: Tensor) -> Tensor:
        """The quantile on [-1, 1], with the derivative of the implicit function."""
        u = u.to(self.loc.dtype).expand(torch.broadcast_shapes(u.shape, self.batch_shape))
        with torch.no_grad():
            x = self._solve(u)
        if not torch.is_grad_enabled():
            return x
        # The value of the difference is 0, its gradient the implicit function theorem's.
        mass = self._below(x) - u
        slope = self._density(x).detach().clamp_min(torch.finfo(x.dtype).eps)
        return x - (mass - mass.detach()) / slope

    def _solve(self, u: Tensor) -> Tensor:
        """Run Newton's iteration inside a bracket that is read from a table and narrowed in every step."""
        count, cells = math.prod(self.batch_shape), 8 * (self.degree + 1)
        edges = torch.linspace(-1, 1, cells + 1, dtype=u.dtype, device=u.device)
        table = self._below(edges.view(-1, *[1] * len(self.batch_shape))).reshape(cells + 1, count)
        columns = u.reshape(u.numel() // max(count, 1), count).mT.contiguous()
        cell = torch.searchsorted(table.mT.contiguous().cummax(-1).values, columns, right=True) - 1
        cell = cell.clamp(0, cells - 1).mT.reshape(u.shape)
        low, high = edges[cell], edges[cell + 1]
        # Mass and density share their waves; both come from the series, whose accuracy is absolute, not relative.
        n, c = self._harmonics(), self.autocorrelation[..., 1:]
        integral = c / (1j * math.pi * n)
        at_left = (integral.real * (1 - 2 * (n % 2))).sum(-1)
        x = (low + high) / 2
        eps = torch.finfo(u.dtype).eps
        for _ in range(64):  # bisection alone would reach rounding after 64 steps; Newton needs about five
            wave = _wave(x.unsqueeze(-1) * n)
            excess = (x + 1) / 2 + (wave * integral).real.sum(-1) - at_left - u
            low, high = torch.where(excess < 0, x, low), torch.where(excess < 0, high, x)
            newton = x - excess / (0.5 + (wave * c).real.sum(-1))
            step = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
            moved, x = (step - x).abs(), step
            if bool(((moved <= 4 * eps) | (excess.abs() <= 8 * eps)).all()):
                break
        return torch.where(u <= 0, -1.0, torch.where(u >= 1, 1.0, x))


def _as_complex(coefficients: Any) -> Tensor:
    accepted = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if not isinstance(coefficients, Tensor) or coefficients.dtype not in accepted:
        came = coefficients.dtype if isinstance(coefficients, Tensor) else type(coefficients).__name__
        raise TypeError(f"coefficients must be a tensor of single or double precision, real or complex, got {came}")
    if coefficients.ndim == 0 or not coefficients.shape[-1]:
        raise ValueError(f"coefficients must have shape (..., N + 1), got {tuple(coefficients.shape)}")
    return coefficients if coefficients.is_complex() else coefficients.to(coefficients.dtype.to_complex())


def _vector(samples: Any) -> Tensor:
    if not isinstance(samples, Tensor) or samples.dtype not in (torch.float32, torch.float64):
        came = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"samples must be a float32 or float64 tensor, got {came}")
    if samples.ndim != 1 or not len(samples) or not bool(torch.isfinite(samples).all()):
        raise ValueError(f"samples must be a vector of finite numbers, got shape {tuple(samples.shape)}")
    return samples.detach()


def _ordered(lower: Tensor, upper: Tensor) -> None:
    if not bool((lower <= upper).all()):
        raise ValueError("lower must not be above upper, got bounds in the wrong order")


def _wave(turns: Tensor) -> Tensor:
    """``exp(i pi turns)``."""
    return torch.polar(torch.ones_like(turns), math.pi * turns)


def _log(density: Tensor) -> Tensor:
    return density.clamp_min(torch.finfo(density.dtype).tiny).log()


def _power(a: Tensor, points: int) -> Tensor:
    """``|A|^2`` at ``x_j = 2 j / points``."""
    amplitude: Tensor = torch.fft.fft(a, n=points)
    return amplitude.real**2 + amplitude.imag**2


def _maximum_likelihood(unit: Tensor, degree: int, penalty: float) -> Tensor:
    """Coefficients, complex128, for float64 samples in [-1, 1]."""
    integer("degree", degree, low=0)
    number("penalty", penalty, low=0)
    cells = max(_CELLS, 2 ** math.ceil(math.log2(64 * (degree + 1))))
    cell = ((unit + 1) / 2 * cells).long().clamp(0, cells - 1)
    return _fit_histogram(torch.bincount(cell, minlength=cells).double() / len(unit), degree, penalty)


def _fit_histogram(weights: Tensor, degree: int, penalty: float) -> Tensor:
    """Coefficients for the masses of equal cells of [-1, 1], whose middles stand for them."""
    cells = len(weights)
    k = torch.arange(degree + 1, dtype=weights.dtype, device=weights.device)
    # The start: the factor of the smoothed histogram whose logarithm has waves of one sign only, truncated to N + 1
    # terms. The real square root would be simpler but fails: it equals its own reversed conjugate, and gradients keep
    # that symmetry.
    frequency = torch.arange(cells // 2 + 1, dtype=weights.dtype, device=weights.device)
    smooth = torch.fft.rfft(weights) * torch.exp(-((math.pi * frequency / (degree + 1)) ** 2) / 2)
    logarithm = torch.fft.ifft(torch.fft.irfft(smooth, n=cells).clamp_min(1e-3 / cells).log() / 2)
    logarithm[1 : cells // 2] *= 2
    logarithm[cells // 2 + 1 :] = 0
    start = torch.fft.ifft(torch.fft.fft(logarithm).exp())[: degree + 1]
    parameters = torch.view_as_real(start / torch.linalg.vector_norm(start)).contiguous().requires_grad_()
    seen = weights > 0
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=200,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The j-th value of the transform is A at the middle of cell j, up to phases that are restored below.
        density = FourierDensity(torch.view_as_complex(parameters), validate_args=False)
        loss = -(weights[seen] * _log(_power(density._unit, cells)[seen])).sum()
        if penalty:
            loss = loss + penalty * density.roughness()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return torch.view_as_complex(parameters.detach()) * _wave(-k * (1 - 1 / cells))
