"""Gradient norms: their measures, the first order of a step, the summary beside a threshold."""

import math

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.analysis import drop_ratio, gradient_size, norm_summary, rate_for_size
from danlu.optim import clip_grad_norm_


def parameters(*gradients):
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        made.append(parameter)
    return made


def test_the_measures_are_those_of_all_gradients_as_one_vector():
    made = parameters(gaussian(7, 5), gaussian(11, seed=1))
    g = torch.cat([p.grad.flatten() for p in made])
    size = gradient_size([*made, made[0], nn.Parameter(torch.ones(3))])
    assert size.norm == pytest.approx(g.norm().item(), rel=1e-14)
    assert size.norm == pytest.approx(clip_grad_norm_(made, 1e9).item(), rel=1e-12)
    assert size.sum == pytest.approx(g.abs().sum().item(), rel=1e-14)
    assert size.nonzero == 46
    assert size.cosine == pytest.approx(nn.functional.cosine_similarity(g, g.sign(), dim=0).item(), rel=1e-12)


def test_zeros_do_not_count_in_the_cosine_and_no_gradient_has_none():
    dense = gradient_size(parameters(gaussian(97)))
    sparse = gradient_size(parameters(torch.cat([gaussian(97), torch.zeros(1000)])))
    assert sparse.cosine == pytest.approx(dense.cosine, rel=1e-14)
    assert gradient_size([nn.Parameter(torch.ones(3))]) == (0.0, 0.0, 0, 0.0)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda g: torch.randn(10**6, generator=g), math.sqrt(2 / math.pi)),
        (lambda g: torch.empty(10**6).exponential_(generator=g), math.sqrt(1 / 2)),
        (lambda g: torch.rand(10**6, generator=g) - 0.5, math.sqrt(3 / 4)),
    ],
    ids=["normal", "laplace", "uniform"],
)
def test_the_cosine_is_the_ratio_of_the_first_to_the_second_moment(draw, expected):
    (parameter,) = parameters(draw(torch.Generator().manual_seed(0)))
    # Standard error of a mean of 10^6 draws: 1e-3 times a factor near 1.
    assert gradient_size([parameter]).cosine == pytest.approx(expected, abs=4e-3)


def quadratic(weight, curvature):
    return lambda: (curvature * weight.square()).sum() / 2


@pytest.mark.parametrize("lr", [1e-4, 0.01, 0.3])
def test_the_drop_on_a_quadratic_is_the_closed_form(lr):
    weight, curvature = nn.Parameter(gaussian(7)), gaussian(7, seed=1).square() + 0.1
    g = curvature * weight.detach()
    descent = 1 - lr / 2 * (curvature * g.square()).sum() / g.square().sum()
    assert drop_ratio(quadratic(weight, curvature), [weight], lr) == pytest.approx(descent.item(), rel=1e-8)
    sign = 1 - lr / 2 * curvature.sum() / g.abs().sum()
    assert drop_ratio(quadratic(weight, curvature), [weight], lr, "sign") == pytest.approx(sign.item(), rel=1e-8)


def test_measuring_a_drop_leaves_weights_and_gradients_as_they_were():
    model = nn.Linear(5, 3).double()
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    x = gaussian(7, 5)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    ratio = drop_ratio(
        lambda: model(x).square().mean(), [*model.parameters(), frozen, nn.Parameter(torch.ones(2))], 1e-6
    )
    assert ratio == pytest.approx(1, abs=1e-4)
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None


def test_weights_come_back_also_when_the_loss_fails_after_the_step():
    weight, calls = nn.Parameter(torch.ones(3)), []

    def loss():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return weight.square().sum()

    with pytest.raises(RuntimeError, match="out of memory"):
        drop_ratio(loss, [weight], 0.1)
    assert torch.equal(weight, torch.ones(3))


def test_the_summary_says_what_a_threshold_does():
    assert norm_summary([0.1, 0.2, 1.0]).verdict == "never"
    assert norm_summary([0.1, 0.2, 1.1]).verdict == "sometimes"
    assert norm_summary([0.1, 2.0, 3.0]).verdict == "mostly"
    found = norm_summary(torch.arange(1, 102) / 100, threshold=0.9)
    assert (found.median, found.p95) == (pytest.approx(0.51), pytest.approx(0.96))
    assert found.share_above == pytest.approx(11 / 101)


def test_four_times_the_parameters_halve_the_learning_rate():
    assert rate_for_size(3e-4, 10**6, 4 * 10**6) == pytest.approx(1.5e-4, rel=1e-14)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: norm_summary([]), "norms"),
        (lambda: norm_summary([math.nan]), "norms"),
        (lambda: norm_summary([1.0], threshold=0.0), "threshold"),
        (lambda: rate_for_size(1e-3, 0, 5), "parameters"),
        (lambda: drop_ratio(lambda: torch.zeros(()), [], 0.1), "parameters must hold"),
        (lambda: drop_ratio(lambda: torch.zeros(()), [nn.Parameter(torch.ones(2))], 0.0), "lr"),
        (lambda: drop_ratio(lambda: torch.zeros(()), [nn.Parameter(torch.ones(2))], 0.1, "sgn"), "rule"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_gradient_of_zero_raises():
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="gradient is zero"):
        drop_ratio(lambda: weight.square().sum(), [weight], 0.1)
