"""The Fourier density against its series, SciPy's quadrature, closed forms and torch's own distributions."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Independent

from danlu.distributions import FourierDensity, MappedFourierDensity
from danlu.distributions.fourier import _fit_histogram

F64 = torch.float64


def coefficients(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def integral(function, low, high, parts=23):
    edges = torch.linspace(low, high, parts + 1, dtype=F64).tolist()
    pieces = [
        integrate.fixed_quad(lambda x: function(torch.as_tensor(x)).numpy(), *ends, n=37)[0] for ends in pairwise(edges)
    ]
    return sum(pieces)


def eight_bumps(points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses of equal cells of [-1, 1] under eight Gaussians, and the cells' middles."""
    means = torch.tensor([-0.80, -0.55, -0.35, -0.10, 0.05, 0.30, 0.50, 0.75], dtype=F64)
    sds = torch.tensor([0.04, 0.03, 0.05, 0.03, 0.04, 0.03, 0.05, 0.03], dtype=F64)
    x = -1 + (2 * torch.arange(points, dtype=F64) + 1) / points
    weights = (torch.exp(-(((x[:, None] - means) / sds) ** 2) / 2) / sds).sum(-1)
    return weights / weights.sum(), x


def divergence(weights, x, p):
    return float((weights * ((weights * len(x) / 2).log() - p.log_prob(x))).sum())


@pytest.mark.parametrize("degree", [0, 1, 7, 64])
def test_the_density_is_the_fourier_series_of_its_autocorrelation(degree):
    a, x = coefficients(degree + 1), 2 * uniform(101) - 1
    c = [sum(a[k] * a[k + n].conj() for k in range(degree + 1 - n)) for n in range(degree + 1)]
    series = 0.5 + sum((c[n] / c[0] * torch.exp(1j * math.pi * n * x)).real for n in range(1, degree + 1))
    p = FourierDensity(a)
    torch.testing.assert_close(p.log_prob(x).exp(), series + torch.zeros_like(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(p.autocorrelation, torch.stack(c) / c[0], rtol=0, atol=1e-13)


def test_the_mass_is_one_on_any_uniform_grid_of_more_than_twice_the_degree():
    p = FourierDensity(coefficients(5, 14))
    x = torch.linspace(-1, 1, 30, dtype=F64)[:-1, None]
    torch.testing.assert_close(p.log_prob(x).exp().mean(0) * 2, torch.ones(5, dtype=F64), rtol=0, atol=1e-12)


def test_moments_entropy_roughness_and_masses_are_those_of_quadrature():
    p = FourierDensity(coefficients(12), loc=0.7, scale=1.9)
    low, high = 0.7 - 1.9, 0.7 + 1.9

    def density(x):
        return p.log_prob(x.clamp(low, high)).exp()

    def slope_squared(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(density(x).sum(), x)[0] ** 2

    mean = integral(lambda x: x * density(x), low, high)
    assert integral(density, low, high) == pytest.approx(1, abs=1e-12)
    assert p.mean.item() == pytest.approx(mean, abs=1e-12)
    assert p.variance.item() == pytest.approx(integral(lambda x: (x - mean) ** 2 * density(x), low, high), abs=1e-12)
    assert p.stddev.item() ** 2 == pytest.approx(p.variance.item())
    assert p.entropy().item() == pytest.approx(-integral(lambda x: density(x) * p.log_prob(x), low, high), abs=1e-6)
    assert p.roughness().item() == pytest.approx(integral(slope_squared, low, high), rel=1e-10)
    assert p.cdf(torch.tensor(1.3, dtype=F64)).item() == pytest.approx(integral(density, low, 1.3), abs=1e-12)
    bounds = torch.tensor([0.1, 1.3], dtype=F64)
    assert p.mass(*bounds).item() == pytest.approx(integral(density, 0.1, 1.3), abs=1e-12)


def test_the_distribution_function_rises_from_zero_to_one_with_the_density_as_its_slope():
    p = FourierDensity(coefficients(20))
    x = torch.linspace(-1, 1, 997, dtype=F64).requires_grad_()
    cdf = p.cdf(x)
    (slope,) = torch.autograd.grad(cdf.sum(), x)
    assert cdf[0] == 0
    assert cdf[-1].item() == pytest.approx(1, abs=1e-14)
    assert (cdf.diff() > 0).all()
    torch.testing.assert_close(slope[1:-1], p.log_prob(x).exp()[1:-1], rtol=0, atol=1e-10)


def test_a_narrow_interval_has_its_density_times_its_width_for_mass():
    p, x = FourierDensity(coefficients(9).to(torch.complex64)), torch.tensor([-0.4, 0.0, 0.8])
    width = 2.0**-20
    torch.testing.assert_close(p.mass(x, x + width), p.log_prob(x + width / 2).exp() * width, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 4e-6), (torch.complex128, 1e-14)])
def test_the_quantile_inverts_the_distribution_function_in_a_batch_and_at_zeros_of_the_density(dtype, tolerance):
    a = coefficients(3, 17).to(dtype)
    a[0] = torch.tensor([1.0] * 2 + [0.0] * 15)  # zero at both ends
    a[1] = torch.tensor([1.0] * 17)  # 16 double zeros
    p = FourierDensity(a, loc=2.0, scale=3.0)
    u = uniform(41, 3).to(p.loc.dtype)
    u[0], u[1] = 0, 1
    x = p.icdf(u)
    assert x.dtype == u.dtype
    assert (x[0] == -1).all()
    assert (x[1] == 5).all()
    torch.testing.assert_close(p.cdf(x), u, rtol=0, atol=tolerance)


def test_samples_pass_the_test_of_kolmogorov_and_smirnov():
    torch.manual_seed(0)
    p = FourierDensity(coefficients(9))
    x = p.sample((20000,))
    assert p.support.check(x).all()
    assert stats.kstest(x.numpy(), lambda x: p.cdf(torch.as_tensor(x)).numpy()).statistic < 0.0096


def test_gradients_of_log_density_mass_quantile_and_entropy_are_those_of_finite_differences():
    a, x, u = coefficients(2, 3), 2 * uniform(2) - 1, 0.1 + 0.8 * uniform(2)
    loc, scale = torch.tensor([0.0, 0.2], dtype=F64), torch.tensor([1.5, 2.0], dtype=F64)

    def everything(a, loc, scale, x, u):
        p = FourierDensity(a, loc, scale)
        q = MappedFourierDensity(a, loc, scale)
        return p.log_prob(x), p.cdf(x), p.icdf(u), p.entropy(), p.mean, q.log_prob(x), q.icdf(u), q.cdf(x), q.variance

    inputs = [t.clone().requires_grad_() for t in (a, loc, scale, x, u)]
    assert torch.autograd.gradcheck(everything, inputs, fast_mode=True)


def test_the_density_has_two_real_parameters_per_harmonic():
    a, x = coefficients(6), 2 * uniform(50) - 1
    log_p = FourierDensity(a).log_prob(x)
    for same in (a * (0.3 - 2j), a * 1e-200, a.flip(0).conj()):
        torch.testing.assert_close(FourierDensity(same).log_prob(x), log_p, rtol=0, atol=1e-11)
    free = torch.view_as_real(a).clone().requires_grad_()
    FourierDensity(torch.view_as_complex(free)).log_prob(x).sum().backward()
    assert abs((free.grad * free.detach()).sum()) < 1e-11


def test_a_zero_of_the_density_has_a_finite_log_and_no_gradient():
    a = torch.tensor([1.0, -1.0]).requires_grad_()
    log_p = FourierDensity(a).log_prob(torch.tensor([0.0]))
    log_p.sum().backward()
    assert torch.isfinite(log_p).all()
    assert (a.grad == 0).all()


def test_without_harmonics_it_is_uniform():
    p = FourierDensity(torch.tensor([2.5], dtype=F64), loc=1.0, scale=2.0)
    assert p.entropy().item() == pytest.approx(math.log(4))
    assert (p.mean.item(), p.variance.item()) == (1, pytest.approx(4 / 3))


def test_shapes_follow_torch_distributions():
    for family in (FourierDensity, MappedFourierDensity):
        p = family(coefficients(3, 1, 5), loc=0.0, scale=torch.ones(2))
        assert (p.batch_shape, p.event_shape) == ((3, 2), ())
        assert p.rsample((7,)).shape == (7, 3, 2)
        for value in (p.icdf(torch.tensor(0.5, dtype=F64)), p.mean, p.variance, p.entropy()):
            assert value.shape == (3, 2)
        wide = p.expand((4, 3, 2))
        assert type(wide) is family
        assert wide.log_prob(torch.tensor(0.1, dtype=F64)).shape == (4, 3, 2)
        assert Independent(wide, 2).log_prob(wide.sample()).shape == (4,)
    low = MappedFourierDensity(torch.tensor([1.0, -1.0]))
    assert low.sample((1000,)).isfinite().all()
    assert low.sample().dtype == torch.float32


@pytest.mark.parametrize(
    ("degree", "nats", "modes"),
    [(4, 0.42328, 3), (8, 0.25438, 7), (12, 0.08750, 8), (16, 0.03346, 8), (20, 0.00630, 8), (24, 0.00123, 8)],
)
def test_maximum_likelihood_reaches_the_specified_divergence_and_modes(degree, nats, modes):
    weights, x = eight_bumps(1024)
    p = FourierDensity(_fit_histogram(weights, degree, 0.0))
    assert divergence(weights, x, p) == pytest.approx(nats, rel=0.02)
    # A mode is a maximum above the uniform density, 1/2: what lies below are ripples where the target is almost zero.
    assert (p.log_prob(p.modes()).exp() > 0.5).sum() == modes


def test_a_few_lines_of_descent_reach_the_same_from_any_start():
    weights, x = eight_bumps(256)
    reached = []
    for seed in range(2):
        a = torch.view_as_real(coefficients(7, seed=seed)).clone().requires_grad_()
        optimizer = torch.optim.LBFGS([a], max_iter=150, line_search_fn="strong_wolfe")

        def loss(a=a):
            a.grad = None
            loss = -(weights * FourierDensity(torch.view_as_complex(a), validate_args=False).log_prob(x)).sum()
            loss.backward()
            return loss

        optimizer.step(loss)
        reached.append(loss().item())
    best = FourierDensity(_fit_histogram(weights, 6, 0.0))
    assert reached == pytest.approx([-(weights * best.log_prob(x)).sum().item()] * 2, abs=1e-4)


def test_a_fit_finds_the_modes_of_samples_and_its_penalty_helps_where_they_are_few():
    weights, x = eight_bumps(1024)
    drawn = torch.multinomial(weights, 200, replacement=True, generator=torch.Generator().manual_seed(0))
    samples = 3 * x[drawn].float() + 1
    rough, smooth = (FourierDensity.fit(samples, 40, loc=1.0, scale=3.0, penalty=g) for g in (0.0, 1e-3))
    assert rough.coefficients.dtype == torch.complex64
    kl = [divergence(weights, x, FourierDensity(p.coefficients.to(torch.complex128))) for p in (rough, smooth)]
    assert kl[1] < 0.6 * kl[0]
    assert smooth.roughness() < rough.roughness()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FourierDensity([1.0]), TypeError, "coefficients must be a tensor"),
        (lambda: FourierDensity(torch.ones(2, dtype=torch.int64)), TypeError, "coefficients must be"),
        (lambda: FourierDensity(torch.tensor(1.0)), ValueError, r"shape \(..., N \+ 1\)"),
        (lambda: FourierDensity(torch.zeros(3)), ValueError, "coefficients"),
        (lambda: FourierDensity(torch.tensor([1.0, math.nan])), ValueError, "coefficients"),
        (lambda: FourierDensity(torch.ones(3), scale=-1.0), ValueError, "scale"),
        (lambda: MappedFourierDensity(torch.ones(3), scale=0.0), ValueError, "scale"),
        (lambda: FourierDensity(torch.ones(3)).log_prob(torch.tensor(1.5)), ValueError, "support"),
        (lambda: FourierDensity(torch.ones(3)).icdf(torch.tensor(1.5)), ValueError, "value must be in"),
        (lambda: FourierDensity(torch.ones(3)).mass(torch.tensor(0.5), torch.tensor(0.1)), ValueError, "lower"),
        (lambda: FourierDensity(torch.ones(2, 3)).modes(), ValueError, "one density"),
        (lambda: FourierDensity.fit(torch.tensor([0.0, 2.0]), 3), ValueError, r"\[-1, 1\], got values from 0 to 2"),
        (lambda: FourierDensity.fit(torch.zeros(0), 3), ValueError, "samples"),
        (lambda: FourierDensity.fit([0.0], 3), TypeError, "samples"),
        (lambda: FourierDensity.fit(torch.zeros(2), -1), ValueError, "degree"),
        (lambda: FourierDensity.fit(torch.zeros(2), 3, penalty=-1.0), ValueError, "penalty"),
        (lambda: MappedFourierDensity.fit(torch.zeros(2), 3), ValueError, "scale"),
    ],
)
def test_bad_arguments_raise_an_error_that_names_them(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_validation_values_outside_are_taken_by_periodicity():
    p, x = FourierDensity(coefficients(4), scale=2.0, validate_args=False), torch.tensor([0.3], dtype=F64)
    torch.testing.assert_close(p.log_prob(x + 4), p.log_prob(x))
