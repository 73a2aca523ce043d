"""Fourier basis density: positive and normalised by construction, integrated right, and fitted without bad optima."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_least, at_most, relative
from danlu.distributions import FourierDensity
from danlu.distributions.fourier import _fit_histogram

_F64 = torch.float64


def _gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))


def _series(spectrum: Tensor, x: Tensor) -> Tensor:
    """``1/2 + Re sum_n c_n / c_0 exp(i pi n x)`` for ``spectrum`` ``(..., N + 1)`` and a vector x."""
    n = torch.arange(1, spectrum.shape[-1], dtype=_F64)
    return 0.5 + (spectrum[..., None, 1:] * torch.exp(1j * math.pi * x[:, None] * n)).real.sum(-1)


def _least(*, constructed: bool) -> float:
    """Least value of the series over 200 random densities of degree 20."""
    a = _gaussian(200, 21)
    spectrum = FourierDensity(a).autocorrelation if constructed else a / a[..., :1].abs()
    return float(_series(spectrum, torch.linspace(-1, 1, 501, dtype=_F64)).min())


def _cdf_error(*, printed: bool) -> float:
    """Largest difference of the distribution function from sums of the density over 20000 cells."""
    p = FourierDensity(_gaussian(9))
    edges = torch.linspace(-1, 1, 20001, dtype=_F64)
    reference = p.log_prob((edges[1:] + edges[:-1]) / 2).exp().cumsum(0) / 10000
    if not printed:
        return float((p.cdf(edges[1:]) - reference).abs().max())
    n, x = torch.arange(1, 9, dtype=_F64), edges[1:, None]
    wave = (torch.exp(1j * math.pi * n * x) - (-1) ** n) / (1j * math.pi * n)
    misprint = (edges[1:] ** 2 - 1) / 2 + (p.autocorrelation[1:] * wave).real.sum(-1) / 2
    return float((misprint - reference).abs().max())


def _eight_bumps() -> tuple[Tensor, Tensor]:
    means = torch.tensor([-0.80, -0.55, -0.35, -0.10, 0.05, 0.30, 0.50, 0.75], dtype=_F64)
    sds = torch.tensor([0.04, 0.03, 0.05, 0.03, 0.04, 0.03, 0.05, 0.03], dtype=_F64)
    x = -1 + (2 * torch.arange(1024, dtype=_F64) + 1) / 1024
    weights = (torch.exp(-(((x[:, None] - means) / sds) ** 2) / 2) / sds).sum(-1)
    return weights / weights.sum(), x


def _divergence(degree: int) -> float:
    """Divergence in nats of the best density of a degree from eight Gaussians."""
    weights, x = _eight_bumps()
    p = FourierDensity(_fit_histogram(weights, degree, 0.0))
    return float((weights * ((weights * 512).log() - p.log_prob(x))).sum())


def _gain(penalty: float) -> float:
    """Divergence without a penalty over that with one, at 200 samples and degree 40."""
    weights, x = _eight_bumps()
    drawn = torch.multinomial(weights, 200, replacement=True, generator=torch.Generator().manual_seed(0))
    reached = []
    for amount in (0.0, penalty):
        p = FourierDensity.fit(x[drawn], 40, penalty=amount)
        reached.append(float((weights * ((weights * 512).log() - p.log_prob(x))).sum()))
    return reached[0] / reached[1]


CLAIMS = (
    Claim(
        name="positive",
        statement="least value of 200 random densities of degree 20; control: Gaussian c_n",
        source="Fejer and Riesz; arXiv 2402.15345, section 2",
        expected=0,
        tolerance=at_least(1e-12),
        measure=lambda: _least(constructed=True),
        control=lambda: _least(constructed=False),
        seconds=0.5,
    ),
    Claim(
        name="distribution-function",
        statement="largest error of the distribution function, degree 8; control: the one printed in the post",
        source="kexue.fm 10007, its integral corrected",
        expected=1e-5,
        tolerance=at_most(),
        measure=lambda: _cdf_error(printed=False),
        control=lambda: _cdf_error(printed=True),
        seconds=0.2,
    ),
    Claim(
        name="divergence",
        statement="divergence in nats of degree 12 from eight Gaussians; control: degree 11",
        source="population maximum likelihood in NumPy and SciPy, every start",
        expected=0.0875,
        tolerance=relative(0.02),
        measure=lambda: _divergence(12),
        control=lambda: _divergence(11),
        seconds=0.5,
    ),
    Claim(
        name="penalty",
        statement="gain in divergence by a penalty of 1e-3 on p'^2, degree 40, 200 samples; control: 1e-9",
        source="SciPy, one draw of samples: 0.287 nats without, 0.096 with",
        expected=1.7,
        tolerance=at_least(),
        measure=lambda: _gain(1e-3),
        control=lambda: _gain(1e-9),
        seconds=3,
    ),
)
