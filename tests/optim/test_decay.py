"""The decays of Muon: which singular values each of them lowers, and by how much."""

import math

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.optim import Muon, MuonConfig, clipped_decay_, decay_, spectral_decay_


def with_values(values, m, n):
    U, V = torch.linalg.qr(gaussian(m, len(values))).Q, torch.linalg.qr(gaussian(n, len(values), seed=1)).Q
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


def after_one_step(weight, lr=0.1, **options):
    """The weight after a step along a zero gradient: what the decay alone does."""
    weight = nn.Parameter(weight.clone())
    weight.grad = torch.zeros_like(weight)
    Muon([weight], lr=lr, **options).step()
    return weight.detach()


def test_decoupled_decay_lowers_every_value():
    W = with_values([4.0, 2.0, 0.5], 7, 5)
    assert torch.equal(after_one_step(W, weight_decay=0.3), W * (1 - 0.1 * 0.3))


def test_spectral_decay_lowers_the_largest_value_only():
    W = with_values([4.0, 1.0, 0.5], 7, 5)
    values = torch.linalg.svdvals(after_one_step(W, weight_decay=0.3, decay="spectral"))
    # Ten iterations leave (1/4)^20 of the second direction.
    torch.testing.assert_close(
        values[:3], torch.tensor([4 * 0.97, 1.0, 0.5], dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


def test_clipped_decay_lowers_what_is_above_the_bound():
    W = with_values([4.0, 3.0, 0.5], 7, 5)
    values = torch.linalg.svdvals(after_one_step(W, weight_decay=2.0, decay="clipped", decay_bound=1.0))
    expected = torch.tensor([4 - 0.2 * 3, 3 - 0.2 * 2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(values[:3], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"decay": "spectral"}, {"decay": "clipped", "decay_bound": 0.5}])
def test_the_decay_comes_before_the_update_and_leaves_the_update_as_it_is(options):
    W, G = gaussian(7, 5), gaussian(7, 5, seed=3)
    ends = {}
    for decay in (0.0, 0.3):
        weight = nn.Parameter(W.clone())
        weight.grad = G.clone()
        Muon([weight], lr=0.1, weight_decay=decay, **options).step()
        ends[decay] = weight.detach()
    decayed = W.clone()
    decay_(decayed, 0.1 * 0.3, **{"kind": options["decay"], "bound": options.get("decay_bound")})
    torch.testing.assert_close(ends[0.3] - ends[0.0], decayed - W, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"decay": "spectral"}, {"decay": "clipped", "decay_bound": 0.5}])
def test_experts_kernels_and_declared_parts_decay_each_apart(options):
    stack = gaussian(3, 7, 5)
    whole = after_one_step(stack, weight_decay=0.3, **options)
    for expert, end in zip(stack, whole):
        torch.testing.assert_close(end, after_one_step(expert, weight_decay=0.3, **options), rtol=1e-12, atol=1e-12)
    for weight, group in ((gaussian(6, 5), {"split": (4, 2)}), (gaussian(6, 3, 2, 2), {"role": "conv"})):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = torch.zeros_like(parameter)
        Muon([{"params": [parameter], **group}], lr=0.1, weight_decay=0.3, **options).step()
        parts = weight.split((4, 2)) if "split" in group else [weight.flatten(1)]
        expected = torch.cat([after_one_step(part, weight_decay=0.3, **options) for part in parts])
        torch.testing.assert_close(parameter.detach().flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_clipped_decay_holds_the_norm_at_the_bound_plus_the_step_over_the_decay():
    weight = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, scale="plain", decay="clipped", decay_bound=2.0, momentum=0.0)
    gradient = -gaussian(7, 5)
    for _ in range(400):
        weight.grad = gradient
        optimizer.step()
    # A step adds lr and takes lr * decay of the excess: at rest 2 + 1 / 0.5, to the 1 % of the iteration.
    norm = torch.linalg.matrix_norm(weight.detach(), 2).item()
    assert norm == pytest.approx(4.0, rel=0.015)


def test_spectral_decay_leaves_small_values_that_decoupled_decay_wipes_out():
    W = with_values([3.0, 1.0, 0.1], 11, 7)
    ends = {}
    for kind in ("decoupled", "spectral"):
        weight = nn.Parameter(W.clone())
        optimizer = Muon([weight], lr=0.1, weight_decay=0.5, decay=kind)
        for _ in range(20):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        ends[kind] = torch.linalg.svdvals(weight.detach())
    assert ends["decoupled"][2].item() == pytest.approx(0.1 * 0.95**20)
    assert ends["spectral"][2].item() == pytest.approx(0.1, rel=1e-9)
    assert ends["spectral"][0].item() == pytest.approx(3 * 0.95**20, rel=1e-3)


def test_a_learning_rate_in_a_tensor_and_the_choice_in_a_group_are_honoured():
    W = with_values([4.0, 1.0], 7, 5)
    by_group = [nn.Parameter(W.clone()), nn.Parameter(W.clone())]
    for parameter in by_group:
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": [by_group[0]], "decay": "spectral"}, {"params": [by_group[1]]}]
    Muon(groups, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.3).step()
    torch.testing.assert_close(by_group[0].detach(), after_one_step(W, weight_decay=0.3, decay="spectral"))
    torch.testing.assert_close(by_group[1].detach(), after_one_step(W, weight_decay=0.3))


def test_a_state_saved_before_there_was_a_choice_still_steps():
    W = gaussian(7, 5)
    weight = nn.Parameter(W.clone())
    optimizer = Muon([weight], lr=0.1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["decay"], saved["param_groups"][0]["decay_bound"]
    optimizer.load_state_dict(saved)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), W * 0.99)


def test_the_configuration_hands_the_choice_to_muon():
    config = MuonConfig(decay="clipped", decay_bound=3.0)
    group = config.build(nn.Linear(3, 5, bias=False)).param_groups[0]
    assert (group["decay"], group["decay_bound"]) == ("clipped", 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "spectrall"}, "did you mean 'spectral'"),
        ({"decay": "clipped", "decay_bound": 0.0}, "decay_bound"),
        ({"decay": "clipped", "decay_bound": math.nan}, "decay_bound"),
        ({"decay": "spectral", "decay_bound": 1.0}, "belongs to decay='clipped'"),
        ({"decay_bound": 1.0}, "belongs to decay='clipped'"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(3, 3))], **options)
    with pytest.raises(ValueError, match=message):
        MuonConfig(**options)


def test_a_clipped_decay_without_its_bound_is_refused():
    with pytest.raises(TypeError, match="decay_bound must be a number, got None"):
        Muon([nn.Parameter(torch.zeros(3, 3))], decay="clipped")


@pytest.mark.parametrize("amount", [0.01, 0.5, 1.0, 2.0])
def test_spectral_decay_with_an_unconverged_vector_still_raises_no_singular_value(amount):
    W = gaussian(13, 7)
    before = torch.linalg.svdvals(W)
    start = gaussian(7, seed=5)
    old = W.clone()
    v = spectral_decay_(W, amount, start=start, iterations=1)
    assert (torch.linalg.svdvals(W) <= before + 1e-12).all()
    lost = (2 * amount - amount**2) * (old @ v).square().sum()
    assert W.square().sum().item() == pytest.approx((old.square().sum() - lost).item(), abs=1e-11)


def test_spectral_decay_falls_like_a_water_level_and_leaves_the_tail_alone():
    sigma = torch.tensor([3, 2.5, 2, 1.5, 1, *torch.linspace(0.5, 0.1, 15).tolist()], dtype=torch.float64)
    W = with_values(sigma.tolist(), 30, 20)
    step, v, t = 2e-3, None, 0.0
    while t < 6 - step / 2:
        v = spectral_decay_(W, step, start=v, iterations=4, block=6)
        t += step
    S = torch.linalg.svdvals(W)
    # dL/dt = -L/p: between two values the level takes p times the logarithm of their ratio.
    level, left = 3.0, 6.0
    for p, floor in ((1, 2.5), (2, 2.0), (3, 1.5), (4, 1.0), (5, 0.5)):
        used = min(left, p * math.log(level / floor))
        level, left = level * math.exp(-used / p), left - used
    assert level == pytest.approx(0.56141, abs=1e-5)
    assert (S[:5] - level).abs().max() < 4e-3
    torch.testing.assert_close(S[5:], sigma[5:], rtol=0, atol=1e-10)
    assert math.exp(-6) * 0.5 < 0.01 * S[5]  # what ordinary decay would have left of the tail


def test_spectral_decay_works_on_a_stack_and_on_16_bit_weights():
    W = gaussian(3, 7, 5).bfloat16()
    before = torch.linalg.svdvals(W.double())
    spectral_decay_(W, 0.5, iterations=50)
    after = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(after.sum(-1), before.sum(-1) - before[:, 0] / 2, rtol=0.02, atol=0)


def test_clipped_decay_settles_where_the_law_says_and_spares_the_rest():
    # A push of norm eta along one direction each step: after the push the value settles at bound + eta / amount.
    W = torch.diag(torch.tensor([0.5, 0.3, 1.0], dtype=torch.float64))
    push = torch.diag(torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64))
    for _ in range(400):
        clipped_decay_(W, 0.1, 0.8)
        settled = W[2, 2].item()
        W += push
    assert W[2, 2].item() == pytest.approx(0.8 + 0.02 / 0.1, abs=1e-9)
    assert settled == pytest.approx(0.8 + 0.9 / 0.1 * 0.02, abs=1e-9)
    assert W.diagonal()[:2].tolist() == pytest.approx([0.5, 0.3], abs=1e-13)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: clipped_decay_(torch.ones(2, 2), 1.5, 1.0), r"amount must be in \[0, 1\]"),
        (lambda: clipped_decay_(torch.ones(2, 2), 0.5, 0.0), "bound"),
        (lambda: spectral_decay_(torch.ones(2, 3), 2.5), r"amount must be in \[0, 2\]"),
    ],
)
def test_amounts_and_bounds_out_of_range_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
