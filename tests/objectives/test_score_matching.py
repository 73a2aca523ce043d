"""The identities of score matching, by quadrature, in closed form and by simulation with stated errors."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from danlu.diffusion import Cosine, UniformTimes
from danlu.objectives import (
    ScoreMatching,
    ScoreMatchingConfig,
    conditional_loss,
    explicit_loss,
    implicit_loss,
    ratio_score,
    sliced_loss,
)

A, B = 0.8, 0.6  # x = A x0 + B eps with x0 = +-1


def two_point_score(x):
    return (A * torch.tanh(A * x / B**2) - x) / B**2


def quadrature(score, nodes=151):
    """SM and CSM of a score for x0 = +-1, by Gauss-Hermite quadrature over the noise."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    eps, weight = torch.tensor(points)[:, None], torch.tensor(weights) / math.sqrt(2 * math.pi)
    sm = csm = 0.0
    for x0 in (-1.0, 1.0):
        x = A * x0 + B * eps
        sm += 0.5 * (weight * explicit_loss(score(x), two_point_score(x))).sum().item()
        csm += 0.5 * (weight * conditional_loss(score(x), eps, torch.tensor(B, dtype=torch.float64))).sum().item()
    return sm, csm


@pytest.mark.parametrize(
    ("score", "sm", "csm"),
    [
        (torch.zeros_like, 1.46188, 2.77778),
        (lambda x: -x, 0.46188, 1.77778),
        (two_point_score, 0, 1.31590),
        (lambda x: torch.tanh(3 * x) - 2 * x, 0.13706, 1.45296),
        (lambda x: torch.sin(x) - x**3 / 10, None, None),
    ],
    ids=["zero", "linear", "exact", "tanh", "odd"],
)
def test_conditional_and_explicit_losses_differ_by_a_constant(score, sm, csm):
    found = quadrature(score)
    assert found[1] - found[0] == pytest.approx(1.31589686, abs=1e-6)
    if sm is not None:
        assert found == pytest.approx((sm, csm), abs=1e-5)


def test_the_constant_is_the_variance_that_is_left_and_what_the_score_does_not_know():
    points, weights = np.polynomial.hermite_e.hermegauss(151)
    x, weight = A + B * torch.tensor(points), torch.tensor(weights) / math.sqrt(2 * math.pi)
    size = (weight * two_point_score(x) ** 2).sum().item()
    left = (weight * (1 - torch.tanh(A * x / B**2) ** 2)).sum().item()
    assert size == pytest.approx(1.46188092, abs=1e-7)
    assert 1 / B**2 - size == pytest.approx(1.31589686, abs=1e-7)
    assert A**2 * left / B**4 == pytest.approx(1.31589686, abs=1e-7)


@pytest.mark.parametrize(("sigma", "constant"), [(1.0, 0.5), (0.5, 3.2)])
def test_conditional_loss_of_normal_data_has_the_true_slope_and_the_known_minimum(sigma, constant):
    # Of all linear scores s = c x the best is c = -1 / (1 + sigma^2), and its loss is not zero.
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    x = x0 + sigma * eps
    slope = (x * -eps / sigma).sum() / (x * x).sum()
    assert slope.item() == pytest.approx(-1 / (1 + sigma**2), rel=0.01)
    losses = conditional_loss((slope * x)[:, None], eps[:, None], torch.tensor(sigma, dtype=torch.float64))
    assert losses.mean().item() == pytest.approx(constant, abs=4 * losses.std().item() / 400_000**0.5)


def gaussian_mixture(seed=0, size=5):
    """A two-component normal mixture in three dimensions: its score, and samples."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, -0.5]], dtype=torch.float64)

    def score(x):
        weight = torch.softmax(-((x[:, None] - means) ** 2).sum(-1) / 2, dim=1)
        return (weight[..., None] * (means - x[:, None])).sum(1)

    picks = torch.randint(2, (size,), generator=generator)
    return score, means[picks] + torch.randn(size, 3, generator=generator, dtype=torch.float64)


def wrong(x):
    return -0.7 * x + 0.2 * torch.sin(x)


def test_the_implicit_loss_is_the_explicit_one_less_a_constant():
    true, x = gaussian_mixture(size=30_000)
    for score in (wrong, lambda x: -x, lambda x: true(x) + 0.1):
        difference = explicit_loss(score(x), true(x)) - implicit_loss(score, x, probes=None)
        rest = difference - true(x).square().sum(1)  # of mean zero: integration by parts
        assert rest.mean().item() == pytest.approx(0, abs=4 * rest.std().item() / 30_000**0.5)
    # The factor 2 matters: with 1 the difference depends on s.
    once = explicit_loss(-x, true(x)) - (x.square().sum(1) - 3) - true(x).square().sum(1)
    assert abs(once.mean().item()) > 2


def test_random_probes_estimate_the_trace_without_bias():
    _, x = gaussian_mixture(size=1)
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]

    def mixed(x):
        return wrong(x @ rotation) @ rotation.mT + 0.3 * x.roll(1, dims=1) ** 2

    exact = implicit_loss(mixed, x, probes=None).item()
    many = x.repeat(5_000, 1)
    for loss in (implicit_loss(mixed, many, generator=generator), sliced_loss(mixed, many, generator=generator)):
        assert loss.std() > 0
        assert loss.mean().item() == pytest.approx(exact, abs=4 * loss.std().item() / 5_000**0.5)
    few = implicit_loss(mixed, x, probes=400, generator=generator).item()
    spread = implicit_loss(mixed, many, generator=generator).std().item()
    assert few == pytest.approx(exact, abs=4 * spread / 20)


def test_signs_give_the_exact_trace_of_a_diagonal_derivative():
    _, x = gaussian_mixture(size=7)
    assert torch.allclose(implicit_loss(wrong, x), implicit_loss(wrong, x, probes=None), rtol=1e-12)


def test_the_ratio_estimator_is_biased_by_one_over_its_samples_and_the_conditional_score_is_not():
    # x0 ~ N(0, 1), sigma = 0.5: the true slope is -0.8. The slope of a regression of each estimate on x.
    generator = torch.Generator().manual_seed(0)
    sigma, size = 0.5, 40_000
    published = {1: (-4.0, 28.7), 4: (-1.86, 4.77), 16: (-1.10, 0.84), 64: (-0.883, 0.18)}
    x0 = torch.randn(size, generator=generator, dtype=torch.float64)
    eps = torch.randn(size, generator=generator, dtype=torch.float64)
    x = x0 + sigma * eps
    bias = {}
    for count, (slope, error) in published.items():
        fresh = torch.randn(size, count, 1, generator=generator, dtype=torch.float64)
        estimate = ratio_score(x[:, None], fresh, 1.0, sigma)[:, 0]
        found = ((x * estimate).sum() / (x * x).sum()).item()
        bias[count] = found + 0.8
        assert found == pytest.approx(slope, rel=0.03)
        assert (estimate + 0.8 * x).square().mean().item() == pytest.approx(error, rel=0.08)
    assert 16 * bias[16] == pytest.approx(-5, abs=0.7)
    assert bias[16] / bias[64] == pytest.approx(4, abs=0.7)
    conditional = -eps / sigma
    residual = conditional + 0.8 * x
    unbiased = ((x * conditional).sum() / (x * x).sum()).item()
    assert unbiased == pytest.approx(-0.8, abs=4 * residual.std().item() / (size * 1.25) ** 0.5)


def test_the_ratio_estimator_goes_through_logarithms():
    x, x0 = torch.tensor([[60.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = ratio_score(x, x0, 1.0, 0.1).item()
    offsets = np.array([60.0, 59.0])
    logs = -(offsets**2) / 0.02
    assert found == pytest.approx(-float((np.exp(logs - logsumexp(logs)) * offsets).sum()) / 0.01)


class Linear(nn.Module):
    """eps = scale x."""

    num_classes = 0

    def __init__(self, scale=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x, t, classes=None, r=None):
        return self.scale * x


@pytest.mark.parametrize("loss", ["conditional", "implicit", "sliced"])
def test_every_loss_has_the_same_minimiser_on_images(loss):
    # Standard normal images at one noise level of a variance-preserving process: the noise is b x.
    level = UniformTimes(low=0.4999, high=0.5001)
    objective = ScoreMatching(
        Linear(), ScoreMatchingConfig(loss=loss, schedule=Cosine(), times=level, probes=2 if loss == "sliced" else 1)
    )
    torch.manual_seed(0)
    images = {"images": torch.randn(3000, 1, 4, 4)}
    gradients = {}
    for scale in (0.0, 1.0):
        with torch.no_grad():
            objective.model.scale.fill_(scale)
        torch.manual_seed(1)
        objective.zero_grad()
        objective(images).backward()
        gradients[scale] = objective.model.scale.grad.item()
    # The loss is quadratic in the scale: its minimum by the two slopes.
    best = gradients[0.0] / (gradients[0.0] - gradients[1.0])
    assert best == pytest.approx(math.sin(math.pi / 4), rel=0.02)


def test_a_network_that_returns_nothing_has_a_conditional_loss_of_one_per_component():
    objective = ScoreMatching(Linear(), ScoreMatchingConfig(schedule=Cosine()))
    torch.manual_seed(0)
    images = {"images": torch.randn(3000, 1, 4, 4)}
    # The mean of 48,000 squares of standard normal numbers.
    assert objective(images).item() / 3000 == pytest.approx(1, abs=4 * (2 / 48_000) ** 0.5)


def test_sampling_with_the_exact_noise_draws_normal_images():
    class Exact(Linear):
        def forward(self, x, t, classes=None, r=None):
            # Standard deviation 0.3, so that clipping changes one image in a thousand.
            a, b = (c.view(-1, 1, 1, 1) for c in Cosine(limit=15.0).coefficients(t))
            return b / (a**2 * 0.09 + b**2) * x

    draws = ScoreMatching(Exact()).sample((4000, 1, 1, 1), steps=60, generator=torch.Generator().manual_seed(0))
    assert draws.std().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ScoreMatchingConfig(loss="explicit"), "loss must be one of"),
        (lambda: ScoreMatchingConfig(probes=0), "probes must be"),
        (lambda: implicit_loss(wrong, torch.zeros(1, 2), probes=0), "probes must be"),
    ],
)
def test_invalid_arguments_raise(make, said):
    with pytest.raises(ValueError, match=said):
        make()
