"""Tiger: accumulation in its one state buffer, relative steps, and the rule for NaN."""

import math

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.optim import Tiger
from danlu.optim.tiger import _MicroStep, _Subject, _update, _update_on_cpu


def run(gradients, start, **options):
    weight = nn.Parameter(start.clone())
    optimizer = Tiger([{"params": [weight], "role": options.pop("role", None)}], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["exp_avg"]


def test_accumulating_k_micro_batches_is_a_step_by_their_mean():
    gradients = [gaussian(5, 7, seed=seed) for seed in range(12)]
    means = [torch.stack(gradients[i : i + 4]).mean(0) for i in range(0, 12, 4)]
    start = gaussian(5, 7, seed=50)
    weight, momentum = run(gradients, start, lr=0.01, accumulate=4)
    expected, expected_momentum = run(means, start, lr=0.01)
    torch.testing.assert_close(momentum, expected_momentum, rtol=0, atol=1e-15)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-15)


def test_weights_rest_between_the_micro_steps_and_the_place_survives_saving():
    weight = nn.Parameter(gaussian(5, 7))
    optimizer = Tiger([weight], accumulate=3)
    for _ in range(2):
        weight.grad = gaussian(5, 7, seed=1)
        optimizer.step()
    assert torch.equal(weight, gaussian(5, 7))
    resumed = Tiger([weight], accumulate=3)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    assert not torch.equal(weight, gaussian(5, 7))


def test_a_matrix_moves_by_its_root_mean_square_and_an_embedding_row_by_its_own():
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).double()
    ones = torch.ones_like(start)
    matrix, _ = run([ones], start, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(start - matrix, 0.1 * start.square().mean().sqrt() * ones)
    table, _ = run([ones], start, lr=0.1, weight_decay=0.0, role="embedding")
    torch.testing.assert_close(start - table, 0.1 * math.sqrt(12.5) * torch.tensor([[1.0, 1.0], [0.1, 0.1]]).double())


@pytest.mark.parametrize("role", ["gain", "bias", None])
def test_gains_and_biases_move_by_half_the_rate_and_do_not_decay(role):
    start = torch.tensor([2.0, -3.0]).double()
    weight, _ = run([torch.ones(2).double()], start, lr=0.1, weight_decay=0.5, role=role)
    torch.testing.assert_close(weight, start - 0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("role", "neutral"), [("matrix", 0.0), ("gain", 1.0)])
def test_a_gradient_that_is_not_finite_keeps_the_momentum_and_shrinks_the_weight(bad, role, neutral):
    start = gaussian(5, 7) if role == "matrix" else gaussian(5)
    poisoned = start.clone()
    poisoned.view(-1)[2] = bad
    clean, momentum = run([start], start, role=role)
    weight, kept = run([start, poisoned], start, role=role)
    assert torch.equal(kept, momentum)
    torch.testing.assert_close(weight, (clean - neutral) * 0.99 + neutral)


def test_one_bad_parameter_does_not_touch_another():
    good, bad = nn.Parameter(gaussian(3, 5)), nn.Parameter(gaussian(3, 5))
    optimizer = Tiger([good, bad])
    good.grad, bad.grad = gaussian(3, 5, seed=1), torch.full((3, 5), math.nan).double()
    optimizer.step()
    alone, _ = run([gaussian(3, 5, seed=1)], gaussian(3, 5))
    assert torch.equal(good, alone)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 1.0}, "beta must be in"),
        ({"accumulate": 0}, "accumulate must be an integer"),
        ({"scale": "rsm"}, "did you mean 'rms'"),
        ({"shrink": 0.0}, "shrink must be in"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        Tiger([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("micro_step", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("size", [0.5, torch.tensor(0.3).double(), gaussian(11, 1, seed=9).abs()])
def test_the_update_in_fewer_passes_is_the_plain_one(size, accumulate, micro_step, finite):
    group = {"lr": 0.1, "beta": 0.9, "accumulate": accumulate, "micro_step": micro_step % accumulate, "shrink": 0.9}
    step = _MicroStep.of(group)
    if isinstance(size, torch.Tensor) and size.ndim and not step.last:
        return  # sizes of rows are only asked for where the weights move
    ends = []
    for rule in (_update, _update_on_cpu):
        tensors = [gaussian(11, 5, seed=seed) for seed in range(3)]
        rule(_Subject(*tensors, finite=torch.tensor(finite), size=size, decay=0.2, neutral=1.0), step)
        ends.append(tensors)
    for plain, quick in zip(*ends):
        torch.testing.assert_close(quick, plain, rtol=0, atol=1e-15)


def test_a_row_of_an_embedding_decays_by_its_own_rate():
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    table, _ = run([torch.zeros_like(start)], start, lr=0.1, weight_decay=0.5, role="embedding")
    rates = 0.1 * math.sqrt(12.5) * torch.tensor([[1.0], [0.1], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(table, start * (1 - 0.5 * rates), rtol=0, atol=1e-15)
    matrix, _ = run([torch.zeros_like(start)], start, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(matrix, start * (1 - 0.05 * start.square().mean().sqrt()), rtol=0, atol=1e-15)


def test_rows_longer_than_a_piece_are_stepped_like_short_ones():
    start, gradient = gaussian(2, 200_000, dtype=torch.float32), gaussian(2, 200_000, seed=1, dtype=torch.float32)
    table, _ = run([gradient], start, lr=0.1, weight_decay=0.5, role="embedding")
    rates = 0.1 * start.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(table, start * (1 - 0.5 * rates) - rates * gradient.sign())
