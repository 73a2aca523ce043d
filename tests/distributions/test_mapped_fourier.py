"""The Fourier density on the line against quadrature, the logistic distribution and its own samples."""

import math

import pytest
import torch
from scipy import integrate
from torch.nn.functional import logsigmoid

from danlu.distributions import MappedFourierDensity

F64 = torch.float64


def coefficients(count: int) -> torch.Tensor:
    return torch.randn(count, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))


def test_without_harmonics_it_is_logistic():
    q = MappedFourierDensity(torch.tensor([2.5], dtype=F64), loc=1.0, scale=2.0)
    y = torch.tensor([-60.0, -7.0, 0.3, 1.0, 5.0, 40.0], dtype=F64)
    torch.testing.assert_close(q.log_prob(y), logsigmoid(y - 1) + logsigmoid(1 - y))
    torch.testing.assert_close(q.cdf(y), torch.sigmoid(y - 1), rtol=1e-12, atol=0)  # the left tail too
    torch.testing.assert_close(q.mass(y + 1, y + 2), torch.sigmoid(-y) - torch.sigmoid(-y - 1), rtol=1e-5, atol=1e-15)
    assert q.entropy().item() == pytest.approx(2, abs=1e-12)
    assert q.variance.item() == pytest.approx(math.pi**2 / 3, abs=1e-12)


def test_mass_moments_and_entropy_are_those_of_quadrature():
    q = MappedFourierDensity(coefficients(11), loc=-1.0, scale=0.5)
    # Twenty scales to each side; 250 points in the shortest wave, of length scale / 5.
    y = torch.linspace(-11, 9, 50001, dtype=F64)
    density = q.log_prob(y).exp()

    def expected(values):
        return float(integrate.simpson((values * density).numpy(), x=y.numpy()))

    mean = expected(y)
    assert expected(torch.ones_like(y)) == pytest.approx(1, abs=1e-9)
    assert q.mean.item() == pytest.approx(mean, abs=1e-9)
    assert q.variance.item() == pytest.approx(expected((y - mean) ** 2), abs=1e-9)
    assert q.entropy().item() == pytest.approx(-expected(q.log_prob(y)), abs=1e-6)


def test_the_quantile_inverts_the_distribution_function():
    q = MappedFourierDensity(coefficients(11), loc=-1.0, scale=0.5)
    u = torch.rand(31, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(q.cdf(q.icdf(u)), u, rtol=0, atol=1e-10)


def test_a_fit_recovers_a_density_of_its_own_family():
    torch.manual_seed(0)
    true = MappedFourierDensity(coefficients(4), loc=10.0, scale=3.0)
    y = true.sample((20000,))
    q = MappedFourierDensity.fit(y, 3, loc=10.0, scale=3.0)
    # Twice the gain in log-likelihood is chi-squared with 6 degrees of freedom: above 35 once in 200 000 draws.
    assert -1 < 2 * (q.log_prob(y) - true.log_prob(y)).sum() < 35
    free = MappedFourierDensity.fit(y, 8)
    assert free.loc.item() == pytest.approx(y.mean().item())


def test_single_samples_are_averaged_in_double_precision():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.01 + 3
    assert MappedFourierDensity.fit(x, 3).loc.item() == torch.tensor(x.double().mean().item()).item()
