"""Muon: its identities, its agreement with torch's, and the bugs that others have."""

import copy
import io
import math

import pytest
import torch
from steps import one_step, step
from tensors import gaussian
from torch import nn

from danlu.approx import optimal_composition, published
from danlu.linalg._newton_schulz import multiplications
from danlu.optim import Muon, shape_scale
from danlu.optim.muon_step import SCALES

EXACT = optimal_composition(1e-3, 9)  # error below float64 rounding on [1e-3, 1]


def polar(matrix):
    U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (11, 11), (1, 5), (5, 1), (1, 1)])
def test_the_update_is_the_polar_factor_of_the_gradient(shape):
    gradient = gaussian(*shape)
    update = -one_step(gradient, method=EXACT, scale="plain")
    torch.testing.assert_close(update, polar(gradient), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (11, 11)])
def test_the_exact_update_has_the_rms_of_adamw(shape):
    update = one_step(gaussian(*shape), method=EXACT)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("aspect", [1, 2, 4])
@pytest.mark.parametrize("tall", [False, True])
def test_the_default_update_has_rms_within_a_tenth_of_adamw(aspect, tall):
    gradient = gaussian(127, 127 * aspect, dtype=torch.float32)
    update = one_step(gradient.mT.contiguous() if tall else gradient)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, abs=0.02)


def test_jordans_five_steps_from_the_frobenius_norm_fall_short_of_the_rms_and_the_rms_scale_mends_it():
    # A steep spectrum: most singular values stay below what five steps can lift.
    values = torch.arange(1, 65, dtype=torch.float64) ** -2.0
    gradient = polar(gaussian(64, 64)) @ torch.diag(values) @ polar(gaussian(64, 64, seed=1))
    short = one_step(gradient, method=published("jordan", 5)).square().mean().sqrt().item()
    mended = one_step(gradient, method=published("jordan", 5), scale="rms").square().mean().sqrt().item()
    assert short < 0.19
    assert mended == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("shape", [(96, 96), (64, 256)])
def test_fast_is_less_wrong_than_jordans_five_steps_and_takes_fewer_products(shape):
    side = min(shape)
    spectra = [torch.logspace(0, -3, side), 1 / torch.arange(1.0, side + 1), torch.linspace(1, 0.01, side)]
    left, right = polar(gaussian(shape[0], side)), polar(gaussian(side, shape[1], seed=1))
    for values in spectra:
        gradient = left * values @ right
        wrong, jordans = (
            (-one_step(gradient, method=method, scale="plain") - left @ right).norm() for method in ("fast", "jordan")
        )
        assert wrong < 0.9 * jordans
    costs = [
        multiplications(
            Muon([nn.Parameter(torch.zeros(shape))], method=m).composition.coefficients, *shape, torch.bfloat16
        )
        for m in ("fast", "auto", "jordan")
    ]
    assert costs[0] < 0.92 * costs[1] <= 0.92 * costs[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_of_jordans_update_lie_in_the_documented_band(dtype):
    gradient = gaussian(31, 67, dtype=torch.float32)
    update = one_step(gradient, scale="plain", method=published("jordan", 5), dtype=dtype)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.67
    assert values.max() < 1.22


def test_agrees_with_torchs_muon_where_both_reach_the_polar_factor():
    gradients = [gaussian(23, 37, seed=seed, dtype=torch.float32) for seed in range(4)]
    start = gaussian(23, 37, seed=9, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, method=optimal_composition(1e-3, 8, safety=1.01), dtype=torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, adjust_lr_fn="match_rms_adamw", ns_coefficients=(1.875, -1.25, 0.375), ns_steps=25
    )
    for gradient in gradients:
        step(mine, gradient)
        step(reference, gradient)
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs_momentum(nesterov):
    ours, theirs = nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(5, 7))
    mine = Muon([ours], lr=0.1, nesterov=nesterov)
    reference = torch.optim.Muon([theirs], lr=0.1, nesterov=nesterov)
    for seed in range(3):
        gradient = gaussian(5, 7, seed=seed, dtype=torch.float32)
        step(mine, gradient)
        step(reference, gradient)
    torch.testing.assert_close(
        mine.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_averaged_and_summed_momentum_give_the_same_step(nesterov):
    a, b = nn.Parameter(torch.zeros(7, 5).double()), nn.Parameter(torch.zeros(7, 5).double())
    averaged, summed = Muon([a], nesterov=nesterov), Muon([b], nesterov=nesterov, ema=False)
    for seed in range(4):
        step(averaged, gaussian(7, 5, seed=seed))
        step(summed, gaussian(7, 5, seed=seed))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("power", [-60, -7, 3, 60])
def test_a_power_of_two_on_the_loss_changes_no_bit(power):
    gradient = gaussian(13, 7, dtype=torch.float32)
    assert torch.equal(one_step(gradient), one_step(gradient * 2.0**power))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_the_scale_of_the_loss_is_forgotten(scale, dtype):
    gradient = gaussian(13, 29, dtype=torch.float32)
    error = (one_step(gradient, dtype=dtype) - one_step(gradient * scale, dtype=dtype)).norm()
    assert error < (1e-5 if dtype == torch.float32 else 4e-2) * one_step(gradient).norm()


@pytest.mark.parametrize("scale", ["moonlight", "plain", "rms"])
def test_transposing_the_weight_transposes_the_step(scale):
    gradient = gaussian(13, 29)
    options = {"scale": scale, "steps": 6}
    torch.testing.assert_close(one_step(gradient, **options).mT, one_step(gradient.mT.contiguous(), **options))


def test_scales_by_shape_are_those_of_their_sources():
    assert shape_scale("plain", 8, 2) == 1
    assert shape_scale("jordan", 8, 2) == 2
    assert shape_scale("jordan", 2, 8) == 1
    assert shape_scale("mup", 2, 8) == 0.5
    assert shape_scale("moonlight", 1024, 64) == pytest.approx(6.4)


def test_decay_keeps_the_spectral_norm_under_its_bound():
    weight = nn.Parameter(5 * polar(gaussian(9, 17)))
    optimizer = Muon([weight], lr=0.5, weight_decay=0.1, scale="plain", method=EXACT)
    for seed in range(120):
        step(optimizer, gaussian(9, 17, seed=seed % 3))
    assert torch.linalg.matrix_norm(weight, 2) <= 1 / 0.1 + 1e-9
    assert torch.linalg.matrix_norm(weight, 2) > 5


def test_decay_alone_shrinks_by_the_rate_times_the_decay():
    weight = gaussian(5, 3)
    shrunk = one_step(torch.zeros(5, 3).double(), weight, lr=0.5, weight_decay=0.2)
    torch.testing.assert_close(shrunk, 0.9 * weight)


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 30])
def test_the_size_of_a_chunk_does_not_change_the_step(chunk_bytes):
    gradients = [gaussian(7, 5, seed=s) for s in range(3)] + [gaussian(4, 7, 5, seed=7)]
    whole = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    chunked = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    step(Muon(whole), *gradients)
    step(Muon(chunked, chunk_bytes=chunk_bytes), *gradients)
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_foreach_and_loop_agree(nesterov, ema, lr):
    results = []
    for foreach in (False, True):
        params = [nn.Parameter(gaussian(5, 7, seed=s)) for s in range(3)]
        optimizer = Muon(params, lr=lr, nesterov=nesterov, ema=ema, foreach=foreach)
        for seed in range(2):
            step(optimizer, *(gaussian(5, 7, seed=10 * seed + i) for i in range(3)))
        results.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_and_momentum_are_not_overwritten_by_the_iteration(dtype, nesterov):
    gradient = gaussian(7, 13).to(dtype) * 100
    parameter = nn.Parameter(torch.zeros(7, 13, dtype=dtype))
    optimizer = Muon([parameter], nesterov=nesterov, dtype=dtype)
    for count in range(1, 4):
        step(optimizer, gradient)
        assert torch.equal(parameter.grad, gradient)
        expected = gradient.float().norm() * (1 - 0.95**count)
        torch.testing.assert_close(
            optimizer.state[parameter]["momentum_buffer"].float().norm(), expected, rtol=2e-2, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rank_one_and_nan_matrices_leave_their_neighbours_alone(dtype):
    good = gaussian(7, 13, dtype=torch.float32)
    rank_one = torch.outer(gaussian(7, dtype=torch.float32), gaussian(13, dtype=torch.float32))
    bad = good.clone()
    bad[2, 3] = math.nan
    params = [nn.Parameter(torch.zeros(7, 13)) for _ in range(5)]
    step(Muon(params, lr=1.0, scale="plain", dtype=dtype), good, torch.zeros(7, 13), rank_one, bad, good)
    alone = one_step(torch.stack([good] * 5), scale="plain", dtype=dtype)[0]
    torch.testing.assert_close(params[0].detach(), alone)
    torch.testing.assert_close(params[4].detach(), alone)
    assert torch.equal(params[1].detach(), torch.zeros(7, 13))
    update, unit = -params[2].detach(), rank_one / rank_one.norm()
    assert (update * unit).sum().item() == pytest.approx(1, abs=0.05)
    # Rounding to bfloat16 gives a matrix of rank one a tail of singular values, which the iteration lifts.
    assert torch.linalg.matrix_norm(update, 2) < (1.05 if dtype == torch.float32 else 1.25)
    assert params[3].isnan().any()


@pytest.mark.parametrize("scale", SCALES)
def test_a_zero_gradient_from_rest_moves_nothing(scale):
    assert torch.equal(one_step(torch.zeros(3, 5), scale=scale), torch.zeros(3, 5))


def test_maximize_climbs_by_the_same_step():
    gradient = gaussian(5, 7)
    assert torch.equal(one_step(gradient, maximize=True), -one_step(gradient))


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_makes_the_round_trip_bit_exactly(dtype, momentum_dtype):
    def fresh(weights):
        return Muon([("w", weights)], lr=0.1, momentum_dtype=momentum_dtype)

    weight = nn.Parameter(gaussian(5, 7).to(dtype))
    optimizer = fresh(weight)
    for seed in range(3):
        step(optimizer, gaussian(5, 7, seed=seed).to(dtype))
    file = io.BytesIO()
    torch.save({"w": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = nn.Parameter(saved["w"].clone())
    resumed = fresh(other)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.state[other]["momentum_buffer"].dtype == (momentum_dtype or dtype)
    for seed in range(3, 6):
        step(optimizer, gaussian(5, 7, seed=seed).to(dtype))
        step(resumed, gaussian(5, 7, seed=seed).to(dtype))
    assert torch.equal(weight, other)


def test_momentum_in_bfloat16_follows_momentum_in_float32():
    short, full = nn.Parameter(torch.zeros(7, 11)), nn.Parameter(torch.zeros(7, 11))
    optimizers = Muon([short], momentum_dtype=torch.bfloat16), Muon([full])
    for seed in range(5):
        for optimizer in optimizers:
            step(optimizer, gaussian(7, 11, seed=seed, dtype=torch.float32))
    assert (
        optimizers[0].state[short]["momentum_buffer"].nbytes * 2 == optimizers[1].state[full]["momentum_buffer"].nbytes
    )
    assert (short - full).norm() < 0.03 * full.norm()


def test_a_copy_of_the_optimizer_keeps_its_iteration():
    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))], method="jordan", steps=5, dtype=torch.float32)
    twin = copy.deepcopy(optimizer)
    assert (twin.composition, twin.dtype) == (optimizer.composition, torch.float32)


def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.eye(3))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], lr=0.1).step(closure).item() == 3.0


def test_a_matrix_regression_is_solved():
    target, inputs = gaussian(5, 7), gaussian(7, 64, seed=1)
    weight = nn.Parameter(torch.zeros(5, 7).double())
    optimizer = Muon([weight], lr=0.3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / 150)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((weight - target) @ inputs).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 1e-3


def test_step_compiles_once_into_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    weight, experts = nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(3, 5, 7))
    plain = nn.Parameter(torch.zeros(5, 7))
    # In bfloat16 a graph and single operations round differently.
    options = {"lr": torch.tensor(0.1), "dtype": torch.float32}
    optimizer, eager = Muon([weight, experts], **options), Muon([plain], **options)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    for seed in range(3):
        gradient = gaussian(5, 7, seed=seed, dtype=torch.float32)
        weight.grad, plain.grad, experts.grad = gradient.clone(), gradient.clone(), gaussian(3, 5, 7).float()
        options["lr"].fill_(0.1 / (seed + 1))
        compiled()
        eager.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(weight, plain)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_reads_no_value_from_the_device():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():  # tensors without values: whoever asks for one is refused
        for foreach in (False, True):
            params = [nn.Parameter(torch.empty(shape)) for shape in ((5, 7), (5, 7), (3, 4, 6))]
            optimizer = Muon(params, lr=torch.tensor(0.1), scale="rms", dtype=torch.float32, foreach=foreach)
            for parameter in params:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
        with pytest.raises(DataDependentOutputException):
            float(params[0].detach().norm())


class TestBadInput:
    """Every refusal names the argument, or the group and the parameter."""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"momentum": 1.0}, "momentum must be in"),
            ({"momentum": math.nan}, "momentum must be in"),
            ({"weight_decay": -0.1}, "weight_decay must be in"),
            ({"scale": "moonlght"}, "did you mean 'moonlight'"),
            ({"steps": 0}, "steps must be an integer"),
            ({"method": "polar_expres"}, "did you mean 'polar_express'"),
            ({"method": published("jordan", 5), "steps": 4}, "steps must be None or the composition's own 5"),
            ({"dtype": torch.float16}, "dtype must be one of"),
            ({"chunk_bytes": 0}, "chunk_bytes must be an integer"),
        ],
    )
    def test_options(self, options, says):
        with pytest.raises(ValueError, match=says):
            Muon([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("decay", ["decoupled", "spectral"])
def test_a_parameter_without_entries_is_stepped_past(decay):
    empty, weight, plain = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.eye(3, 4)), nn.Parameter(torch.eye(3, 4))
    for parameter in (empty, weight, plain):
        parameter.grad = torch.ones_like(parameter)
    Muon([empty, weight], decay=decay).step()
    Muon([plain], decay=decay).step()
    assert torch.equal(weight, plain)


def test_a_declaration_that_changes_between_two_steps_holds_from_then_on():
    weight, twin = (torch.nn.Parameter(gaussian(6, 4)) for _ in range(2))
    gradients = gaussian(6, 4, seed=1), gaussian(6, 4, seed=2)
    optimizer = Muon([weight])
    step(optimizer, gradients[0])
    twin.data.copy_(weight.detach())
    fresh = Muon([twin])
    fresh.load_state_dict(optimizer.state_dict())
    weight.danlu_split = twin.danlu_split = 2
    step(optimizer, gradients[1])
    step(fresh, gradients[1])
    assert torch.equal(weight, twin)
    weight.danlu_role = "embedding"
    with pytest.raises(ValueError, match="is declared 'embedding'; Muon takes matrices"):
        step(optimizer, gradients[1])


def test_plans_of_groups_that_are_gone_are_dropped():
    optimizer = Muon([{"params": [torch.nn.Parameter(gaussian(3, 2))]} for _ in range(3)])
    gone = []
    for _ in range(3):
        step(optimizer, *[gaussian(3, 2) for _ in range(3)])
        gone.append(optimizer.param_groups.pop(0))
        optimizer.add_param_group({"params": [torch.nn.Parameter(gaussian(3, 2))]})
    step(optimizer, *[gaussian(3, 2) for _ in range(3)])
    assert optimizer._plans.keys() == {id(group) for group in optimizer.param_groups}


def test_a_new_parameter_in_the_memory_of_one_that_is_gone_has_a_plan_of_its_own():
    optimizer = Muon([torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))], weight_decay=0.0)
    group, found = optimizer.param_groups[0], {}
    for turn in range(20):  # Python gives the place of an object to the next of its size
        group["params"] = [torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))]
        split = (None, (2, 4))[turn % 2]
        group["params"][0].danlu_split = split
        step(optimizer, gaussian(6, 4))
        stepped = group["params"][0].detach().clone()
        assert torch.equal(found.setdefault(split, stepped), stepped)
        optimizer.state.clear()
        group["params"] = []
    assert not torch.equal(*found.values())


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 19), (19, 2), (3, 5, 11)])
def test_the_scale_rms_makes_the_root_mean_square_a_fifth_whatever_the_shape(shape):
    update = one_step(gaussian(*shape), scale="rms", lr=1.0)
    for matrix in update.view(-1, *shape[-2:]):
        assert matrix.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)
