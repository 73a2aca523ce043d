"""Amos: the values of its authors' unit tests, its slots, its decays, and the rules derived from it."""

import math

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.optim import Amos, InverseTime, amos_hyperparameters, amos_scale, param_groups
from danlu.optim._common import PIECE


def run(gradients, start, **options):
    weight = nn.Parameter(start.clone())
    group = {"params": [weight], "role": options.pop("role", None), "eta": options.pop("eta", None)}
    optimizer = Amos([group], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def written_out(gradients, start, axes, eta, *, lr, beta=0.999, momentum=0.0, extra_l2=0.0, clip=math.inf):
    """The update as the source writes it, one line a formula."""
    weight, v, b, average = start.clone(), 0.0, 0.0, 0.0
    for count, gradient in enumerate(gradients, 1):
        g = gradient.clamp(-clip, clip)
        q = g.square().mean(axes, keepdim=True)
        v = beta * v + (1 - beta) * q
        r = (1 - beta**count) / v.clamp_min(2.0**-125)
        c = (1 + 0.25 * lr**0.5 * b) ** -0.5
        d = 1 / (1 + 0.25 * (lr * eta) ** 0.5 * b)
        gamma = c * lr**2 * r * q
        update = -d * ((gamma / 2 + extra_l2) * weight + lr * eta * r**0.5 * g)
        b = b + gamma * (1 + b)
        average = momentum * average + (1 - momentum) * update
        weight = weight + average
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_authors_parabola(dtype):
    weight, target = nn.Parameter(torch.tensor([-1.0, 10.0, 1.0]).to(dtype)), torch.tensor([1.0, -1.0, 1.0])
    optimizer = Amos([{"params": [weight], "eta": 1.0}], lr=1.0)
    for _ in range(1500):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), target.to(dtype), rtol=0, atol=1e-6)
    b = optimizer.state[weight]["decay"].item()
    assert b == pytest.approx(3.92502, abs=1e-5)
    assert 1 / (1 + 0.25 * b) == pytest.approx(0.50473, abs=1e-5)


def test_the_authors_rosenbrock():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Amos([{"params": [weight], "eta": 1.0}], lr=0.5, beta=0.5, clip=1.0, momentum=0.9)
    for _ in range(3000):
        optimizer.zero_grad()
        ((1 - weight[0]) ** 2 + 100 * (weight[1] - weight[0] ** 2) ** 2).backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.ones(2).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize(
    ("role", "shape", "axes", "slots"),
    [
        ("matrix", (11, 7), (1,), (11, 1)),
        ("matrix", (831, 251), (1,), (831, 1)),
        ("head", (13, 5), (1,), (13, 1)),
        ("embedding", (13, 5), (1,), (13, 1)),
        ("experts", (3, 11, 7), (2,), (3, 11, 1)),
        ("conv", (5, 3, 2, 7), (1, 2, 3), (5, 1, 1, 1)),
        ("gain", (7,), (0,), (1,)),
        ("bias", (7,), (0,), (1,)),
    ],
)
def test_it_is_the_published_update_for_every_role(role, shape, axes, slots, momentum):
    if shape == (831, 251):
        assert PIECE < 831 * 251  # cut into pieces
    gradients, start = [gaussian(*shape, seed=seed) for seed in range(4)], gaussian(*shape, seed=9)
    options = {"lr": 0.3, "beta": 0.9, "extra_l2": 0.01, "clip": 1.5}
    weight, state = run(gradients, start, role=role, momentum=momentum, **options)
    expected = written_out(gradients, start, axes, amos_scale(role, shape), momentum=momentum or 0.0, **options)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    assert state["exp_avg_sq"].shape == state["decay"].shape == slots
    assert ("exp_avg" in state) == (momentum is not None)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize(
    ("role", "shape", "slots"),
    [
        ("matrix", (11, 7), (1, 7)),
        ("matrix", (251, 831), (1, 831)),
        ("head", (5, 13), (1, 13)),
        ("experts", (3, 11, 7), (3, 1, 7)),
        ("experts", (3, 251, 831), (3, 1, 831)),
        ("conv", (5, 3, 2, 7), (1, 3, 2, 7)),
    ],
)
def test_a_weight_kept_transposed_steps_as_its_transpose_with_a_slot_for_each_output(role, shape, slots, momentum):
    def turned(tensor):
        return (tensor.flatten(1) if role == "conv" else tensor).mT.contiguous()

    gradients, start = [gaussian(*shape, seed=seed) for seed in range(3)], gaussian(*shape, seed=9)
    weight = nn.Parameter(start.clone())
    weight.danlu_transposed = True
    optimizer = Amos([{"params": [weight], "role": role}], lr=0.3, beta=0.9, momentum=momentum)
    for weight.grad in gradients:
        optimizer.step()
    upright = "matrix" if role == "conv" else role
    expected, _ = run([turned(g) for g in gradients], turned(start), role=upright, lr=0.3, beta=0.9, momentum=momentum)
    torch.testing.assert_close(turned(weight.detach()), expected, rtol=0, atol=1e-12)
    assert optimizer.state[weight]["exp_avg_sq"].shape == optimizer.state[weight]["decay"].shape == slots


def test_doubling_the_expected_scale_doubles_the_first_step():
    gradient, zero = gaussian(5, 7), torch.zeros(5, 7).double()
    once, _ = run([gradient], zero, eta=0.1)
    twice, _ = run([gradient], zero, eta=0.2)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-14, atol=0)
    size = once.square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, 0.01 * 0.1))


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_the_extra_l2_shrinks_the_weights(momentum):
    start = gaussian(5, 7)
    weight, _ = run([torch.zeros_like(start)] * 3, start, extra_l2=0.1, momentum=momentum)
    assert (weight.abs() < start.abs()).all()
    if momentum is None:
        torch.testing.assert_close(weight, 0.9**3 * start, rtol=1e-14, atol=0)


def test_rows_without_gradient_stay_where_they_are():
    gradients = [torch.cat([torch.zeros(2, 7), torch.ones(3, 7)]).double()] * 3
    weight, _ = run(gradients, gaussian(5, 7), role="embedding")
    assert torch.equal(weight[:2], gaussian(5, 7)[:2])
    assert not torch.equal(weight[2:], gaussian(5, 7)[2:])


def test_the_scale_of_the_loss_does_not_matter():
    gradients = [gaussian(5, 7, seed=seed) for seed in range(3)]
    plain, _ = run(gradients, gaussian(5, 7, seed=9))
    for factor in (1e-10, 1e10):
        scaled, _ = run([factor * g for g in gradients], gaussian(5, 7, seed=9))
        torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=0)


def test_the_decay_grows_exponentially_while_small_and_then_quadratically():
    # With q r = 1: b = exp(lr^2 t) - 1 as long as b is small, and b ~ t^2 when it is large.
    lr, ones = 0.05, torch.ones(1, 1).double()
    _, early = run([ones] * 40, ones, lr=lr)
    assert early["decay"].item() == pytest.approx(math.exp(lr**2 * 40) - 1, rel=0.02)
    b, seen = 0.0, {}
    for t in range(1, 400_001):
        b += (1 + 0.25 * lr**0.5 * b) ** -0.5 * lr**2 * (1 + b)
        seen[t] = b
    assert math.log(seen[400_000] / seen[200_000]) / math.log(2) == pytest.approx(2, abs=0.01)


def test_memory_is_half_of_adamws_with_momentum_and_nearly_none_without():
    model = nn.Sequential(nn.Embedding(1009, 256), nn.Linear(256, 1024), nn.Linear(1024, 256), nn.LayerNorm(256))
    weights = sum(p.numel() for p in model.parameters())
    for momentum, most in ((0.9, 0.51), (None, 0.01)):
        optimizer = Amos(param_groups(model), momentum=momentum)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(t.numel() for state in optimizer.state.values() for t in state.values())
        assert held / (2 * weights) < most


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("matrix", (4, 9), 1 / 3),
        ("experts", (2, 4, 9), 1 / 3),
        ("conv", (4, 1, 3, 3), 1 / 3),
        ("head", (50, 16), 0.25),
        ("embedding", (50, 8), 0.5),
        ("gain", (9,), 1.0),
        ("bias", (9,), 0.5),
        ("gain", (), 1.0),
    ],
)
def test_the_expected_scale_follows_the_role(role, shape, expected):
    assert amos_scale(role, shape) == expected


def test_groups_sorted_by_role_take_their_scale_from_it():
    model = nn.Sequential(nn.Linear(16, 4), nn.LayerNorm(4))
    optimizer = Amos(param_groups(model), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().mean().item() for name, p in model.named_parameters()}
    assert moved["0.bias"] == pytest.approx(0.05, rel=0.02)
    assert moved["1.weight"] == pytest.approx(0.1, rel=0.06)  # and half a per cent of decay
    assert moved["0.weight"] == pytest.approx(0.025, rel=0.05)


class TestRules:
    def test_the_figures_of_the_source(self):
        found = amos_hyperparameters(768, step=1.11e-3)
        assert found.lr == pytest.approx(4.005e-5, rel=2e-4)
        assert found.weight_decay == pytest.approx(0.01538, rel=2e-4)
        assert found.lr * found.weight_decay == pytest.approx(1.11e-3**2 / 2, rel=1e-12)

    def test_gains_and_biases_expect_one_half(self):
        assert amos_hyperparameters(768, role="bias").lr == 0.0005

    @pytest.mark.parametrize("constant", [False, True])
    @pytest.mark.parametrize("step", [2e-2, 2e-3])
    def test_the_half_life_is_that_of_the_balance_it_comes_from(self, step, constant):
        """The remaining error shrinks by ``step * p_t * sqrt(D_t)`` a step, D_t being the error's own square.

        p_t stays for the constant form and falls with the error otherwise: solved here one step at a time.
        """
        p = 0.05
        life = amos_hyperparameters(64, step=step, alignment=p, constant=constant).half_life
        form = InverseTime(half_life=life, squared=constant)
        error = 1.0
        for t in range(int(4 * life)):
            if t in (int(life), int(2 * life)):
                assert form.factor(t, 1) == pytest.approx(error**2, rel=1e-3)
            error *= 1 - step * p * (error if constant else error**2)
        assert form.factor(round(life), 1) == pytest.approx(0.5, rel=1e-3)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"d": 0}, "d must be an integer of at least 1"),
            ({"d": 8, "step": -1.0}, "step must be in"),
            ({"d": 8, "alignment": 1.5}, "alignment must be in"),
            ({"d": 8, "role": "matrx"}, "did you mean 'matrix'"),
        ],
    )
    def test_bad_input_is_named(self, options, says):
        with pytest.raises(ValueError, match=says):
            amos_hyperparameters(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 1.0}, "beta must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"clip": 0.0}, "clip must be in"),
        ({"extra_l2": math.nan}, "extra_l2 must be in"),
        ({"eps": 0.0}, "eps must be in"),
        ({"c_coef": -1.0}, "c_coef must be in"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        Amos([nn.Parameter(torch.zeros(2))], **options)


def test_a_scale_or_role_that_cannot_be_names_the_group():
    for extra, says in (({"eta": -1.0}, "group 0: eta must be"), ({"role": "martix"}, "group 0: role must be one of")):
        with pytest.raises(ValueError, match=says):
            Amos([{"params": [nn.Parameter(torch.zeros(2))], **extra}])


@pytest.mark.parametrize(
    ("bad", "stands_for"), [(math.nan, 0.0), (math.inf, 0.0), (1e38, 2.0**48), (-1e38, -(2.0**48))]
)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_an_entry_that_is_not_finite_or_too_large_stops_no_row(bad, stands_for, momentum):
    gradients = [gaussian(7, 11, seed=seed, dtype=torch.float32) for seed in range(4)]
    spoiled, meant = [[gradient.clone() for gradient in gradients] for _ in range(2)]
    spoiled[1][2, 3], meant[1][2, 3] = bad, stands_for
    got, expected = (run(each, torch.ones(7, 11), lr=0.1, momentum=momentum)[0] for each in (spoiled, meant))
    assert torch.equal(got, expected)
    assert got.isfinite().all()


def test_a_whole_gradient_of_the_largest_numbers_moves_every_weight_as_ones_do():
    huge, ones = (run([torch.full((4, 8), size)], torch.zeros(4, 8), lr=0.1)[0] for size in (1e38, 1.0))
    torch.testing.assert_close(huge, ones)
