r"""Fourier basis density of a variable on the whole real line, by the map artanh.

The density of :math:`y = \mathrm{loc} + \mathrm{scale}\,\mathrm{artanh}\,x`, where x has the density of
`danlu.distributions.fourier` (De la Fuente, Singh and Balle, arXiv 2402.15345; kexue.fm 10007).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, TanhTransform, TransformedDistribution

from danlu._validate import number
from danlu.distributions.fourier import FourierDensity, _maximum_likelihood, _ordered, _vector

__all__ = ["MappedFourierDensity"]


class MappedFourierDensity(TransformedDistribution):
    r"""Density on the whole real line: ``(y - loc) / scale`` is artanh of a `FourierDensity`'s variable.

    Both tails fall as ``4 p(1) / scale * exp(-2 |y - loc| / scale)``: they are equal, and cannot be heavier.

    Args:
        coefficients: as for `FourierDensity`, ``(..., N + 1)``.
        loc: the point that is mapped to 0.
        scale: positive; about twice the data's standard deviation is a good start.
        validate_args: as everywhere in ``torch.distributions``.

    Raises:
        TypeError, ValueError: as `FourierDensity`.

    >>> q = MappedFourierDensity(torch.tensor([1.0]), loc=3.0, scale=2.0)  # the logistic density of scale 1
    >>> q.log_prob(torch.tensor(3.0)).exp(), q.mean, q.variance
    (tensor(0.2500), tensor(3.), tensor(3.2899))
    """

    arg_constraints = FourierDensity.arg_constraints
    base_dist: FourierDensity

    def __init__(
        self,
        coefficients: Tensor,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        base = FourierDensity(coefficients, validate_args=validate_args)
        self.loc, self.scale = (torch.as_tensor(x, dtype=base.loc.dtype, device=base.loc.device) for x in (loc, scale))
        batch = torch.broadcast_shapes(base.batch_shape, self.loc.shape, self.scale.shape)
        self.loc, self.scale = self.loc.expand(batch), self.scale.expand(batch)
        maps = [TanhTransform(cache_size=1).inv, AffineTransform(self.loc, self.scale)]
        super().__init__(base.expand(batch), maps, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MappedFourierDensity":
        """Return the same density expanded to a larger batch shape, without copying."""
        new: MappedFourierDensity = self._get_checked_instance(MappedFourierDensity, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super().expand(batch_shape, _instance=new)
        return new

    @property
    def coefficients(self) -> Tensor:
        """The coefficients of the density before the map, ``(..., N + 1)``."""
        return self.base_dist.coefficients

    @property
    def mean(self) -> Tensor:
        """E[y] by the trapezoidal rule in y, which converges exponentially."""
        return self.loc + self.scale * self._expected(lambda z: z)

    @property
    def variance(self) -> Tensor:
        """Var[y] by the trapezoidal rule in y, which converges exponentially."""
        return self.scale**2 * (self._expected(torch.square) - self._expected(lambda z: z) ** 2)

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats, as `FourierDensity.entropy`."""
        return self.base_dist.entropy() + self.scale.log() + self._expected(lambda z: 2 * _log_cosh(z))

    def cdf(self, value: Tensor) -> Tensor:
        """Return the mass to the left of ``value``, with full relative accuracy in the left tail."""
        if self._validate_args:
            self._validate_sample(value)
        return self._between(torch.full_like(value, -torch.inf), value)

    def mass(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the mass between ``lower`` and ``upper``, accurate for narrow intervals and in both tails.

        Raises:
            ValueError: (validated) ``upper`` below ``lower``, or a bound that is not a number.
        """
        if self._validate_args:
            _ordered(lower, upper)
        return self._between(lower, upper)

    @classmethod
    def fit(
        cls, samples: Tensor, degree: int, *, loc: float | None = None, scale: float | None = None, penalty: float = 0.0
    ) -> "MappedFourierDensity":
        """Return the maximum-likelihood density for a given map, as `FourierDensity.fit`.

        Args:
            samples: ``(n,)``; the result has their precision and device.
            degree: N.
            loc: the mean of the samples unless given.
            scale: twice their standard deviation unless given.
            penalty: weight of the roughness before the map.

        Raises:
            TypeError, ValueError: as `FourierDensity.fit`; samples that are all equal need a scale.
        """
        y = _vector(samples).double()
        loc = y.mean().item() if loc is None else loc
        scale = 2 * y.std(correction=0).item() if scale is None else scale
        number("loc", loc)
        number("scale", scale, low=0, low_open=True)
        unit = torch.tanh((y - loc) / scale)
        return cls(_maximum_likelihood(unit, degree, penalty).to(samples.dtype.to_complex()), loc, scale)

    def _between(self, lower: Tensor, upper: Tensor) -> Tensor:
        # Infinite bounds would make the gradient with respect to the scale undefined: make them finite first.
        large = torch.finfo(self.loc.dtype).max ** 0.5
        # Beyond 300 the density is zero in double precision.
        low, high = (((x.clamp(-large, large) - self.loc) / self.scale).clamp(-300, 300) for x in (lower, upper))
        # tanh(high) - tanh(low) without cancellation, which is sinh(high - low) / (cosh(high) cosh(low)).
        gap = high - low
        width = -torch.expm1(-2 * gap) / 2 * torch.exp(gap - _log_cosh(low) - _log_cosh(high))
        return self.base_dist._mass((torch.tanh(low) + torch.tanh(high)) / 2, width)

    def _expected(self, function: Any) -> Tensor:
        """Return the expectation of a function of ``(y - loc) / scale`` that grows slower than the tails fall."""
        # The integrand is analytic and its fastest wave has the density's degree: the rule's error is below rounding.
        points = 1024 + 128 * self.base_dist.degree
        z = torch.linspace(-24, 24, points + 1, dtype=self.loc.dtype, device=self.loc.device)
        weight = 48 / points * torch.exp(-2 * _log_cosh(z)) * function(z)
        z = z.view(-1, *[1] * len(self.batch_shape))
        expectation: Tensor = torch.tensordot(weight, self.base_dist._density(torch.tanh(z)), dims=1)
        return expectation


def _log_cosh(z: Tensor) -> Tensor:
    return z.abs() + torch.log1p(torch.exp(-2 * z.abs())) - math.log(2)
