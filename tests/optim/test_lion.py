"""Lion: the identities of a sign update."""

from functools import partial

import pytest
import tensors
import torch
from torch import nn

from danlu.optim import Lion, Tiger

gaussian = partial(tensors.gaussian, dtype=torch.float32)


def run(make, gradients, start=None):
    weight = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_the_first_step_is_the_sign_of_the_gradient():
    gradient = gaussian(7, 11)
    assert torch.equal(run(lambda p: Lion(p, lr=0.25), [gradient]), -0.25 * gradient.sign())


@pytest.mark.parametrize("shape", [(7, 11), (300, 251)])
def test_it_is_the_published_program_whatever_the_size(shape):
    weight, momentum = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    gradients = [gaussian(*shape, seed=seed, dtype=torch.float64) for seed in range(5)]
    for gradient in gradients:
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        weight = weight - 0.01 * (update + 0.5 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    ours = run(lambda p: Lion(p, lr=0.01, weight_decay=0.5), gradients)
    torch.testing.assert_close(ours, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [-60, 3, 60])
def test_a_power_of_two_on_the_loss_changes_no_bit(power):
    gradients = [gaussian(7, 11, seed=seed) for seed in range(4)]
    scaled = [gradient * 2.0**power for gradient in gradients]
    assert torch.equal(run(lambda p: Lion(p, lr=0.1), gradients), run(lambda p: Lion(p, lr=0.1), scaled))


def test_with_equal_betas_it_is_tiger_bit_for_bit():
    gradients = [gaussian(7, 11, seed=seed) for seed in range(50)]
    lion = run(lambda p: Lion(p, lr=0.01, betas=(0.9, 0.9), weight_decay=0.1), gradients, gaussian(7, 11, seed=99))
    tiger = run(
        lambda p: Tiger(p, lr=0.01, beta=0.9, weight_decay=0.1, scale="none"), gradients, gaussian(7, 11, seed=99)
    )
    assert torch.equal(lion, tiger)


def test_foreach_and_loop_agree():
    gradients = [gaussian(7, 11, seed=seed) for seed in range(5)]
    for lr in (0.1, torch.tensor(0.1)):
        results = [run(lambda p, f=f, lr=lr: Lion(p, lr=lr, weight_decay=0.1, foreach=f), gradients) for f in (0, 1)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(("steps", "expected"), [(100, 46.1917), (1000, 24.7078)])
def test_a_constant_gradient_ends_in_the_box_of_the_decay(steps, expected):
    ones = torch.ones(1, dtype=torch.float64)
    weight = run(lambda p: Lion(p, lr=0.01, weight_decay=0.1), [-ones] * steps, 50 * ones)
    assert weight.item() == pytest.approx(10 + 40 * (1 - 0.001) ** steps, rel=1e-12)
    assert weight.item() == pytest.approx(expected, abs=5e-5)


def test_the_present_gradient_counts_eleven_times_the_one_before():
    # Opposite gradients of sizes 1 then x: the sign flips at x = b1 (1 - b2) / (1 - b1) = 0.09.
    for x, moves in ((0.0901, 1.0), (0.0899, -1.0)):
        first, second = torch.tensor([1.0]).double(), torch.tensor([-x]).double()
        end = run(lambda p: Lion(p, lr=1.0), [first, second])
        assert end.item() == -1.0 + moves


def test_momentum_in_bfloat16_halves_the_state():
    weight = nn.Parameter(gaussian(7, 11))
    optimizer = Lion([weight], momentum_dtype=torch.bfloat16)
    weight.grad = gaussian(7, 11)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].nbytes * 2 == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_momentum_in_float32_of_weights_in_16_bits_is_the_mean_of_their_gradients(dtype):
    weight = nn.Parameter(torch.ones(50, dtype=dtype))
    optimizer = Lion([weight], betas=(0.9, 0.75), momentum_dtype=torch.float32)
    expected = torch.zeros(50)
    for _ in range(4):
        weight.grad = torch.randn(50).to(dtype)
        optimizer.step()
        expected = 0.75 * expected + 0.25 * weight.grad.float()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected)


def test_betas_out_of_range_are_named():
    weight = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0"):
        Lion(weight, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="betas must be two numbers"):
        Lion(weight, betas=0.9)
    with pytest.raises(ValueError, match="momentum_dtype must be one of"):
        Lion(weight, momentum_dtype=torch.float16)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_entry_that_is_not_finite_counts_as_zero_and_its_weight_moves_again(bad, foreach):
    gradients = [gaussian(7, 11, seed=seed) for seed in range(4)]
    spoiled, zeroed = [[gradient.clone() for gradient in gradients] for _ in range(2)]
    spoiled[1][2, 3], zeroed[1][2, 3] = bad, 0.0
    got = run(lambda p: Lion(p, lr=0.1, foreach=foreach), spoiled)
    assert torch.equal(got, run(lambda p: Lion(p, lr=0.1, foreach=foreach), zeroed))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_every_dtype_of_the_momentum_the_past_weighs_what_the_betas_say(dtype, foreach):
    # Gradients 1, 0, -x: the sign flips at x = b1 b2 (1 - b2) / (1 - b1) = 0.75 * 0.5 * 0.5 / 0.25.
    first = torch.ones(2)
    last = -torch.tensor([0.74, 0.76])
    end = run(
        lambda p: Lion(p, lr=1.0, betas=(0.75, 0.5), momentum_dtype=dtype, foreach=foreach),
        [first, torch.zeros(2), last],
    )
    assert end.tolist() == [-3.0, -1.0]
    # And with b2 = 0.875, whose parts are not equal: 0.75 * 0.875 * 0.125 / 0.25 = 0.328.
    last = -torch.tensor([0.32, 0.34])
    end = run(
        lambda p: Lion(p, lr=1.0, betas=(0.75, 0.875), momentum_dtype=dtype, foreach=foreach),
        [first, torch.zeros(2), last],
    )
    assert end.tolist() == [-3.0, -1.0]
