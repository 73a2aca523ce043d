"""Clipping: the norm that results, the direction that stays, and gradients that are not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tensors import gaussian
from torch import nn

from danlu.optim import (
    NonFiniteGuard,
    clip_grad_norm_,
    clip_groups_,
    descent_factor,
    grad_norm,
    limited_step,
    nonfinite_gradients,
)


def parameters(*gradients):
    """Return parameters that hold these gradients; None for none."""
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(()) if gradient is None else torch.zeros_like(gradient))
        parameter.grad = None if gradient is None else gradient.clone()
        made.append(parameter)
    return made


def flat(params):
    return torch.cat([p.grad.double().flatten() for p in params])


entries = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
arrays = npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=7), elements=entries)


@given(st.lists(arrays, min_size=1, max_size=4), st.floats(1e-3, 1e3))
def test_the_clipped_norm_is_the_smaller_of_norm_and_threshold_and_the_direction_stays(gradients, max_norm):
    params = parameters(*map(torch.from_numpy, gradients))
    before = flat(params)
    assume(before.norm() > 1e-6)
    returned = clip_grad_norm_(params, max_norm)
    after = flat(params)
    assert returned.item() == pytest.approx(before.norm().item(), rel=1e-6)
    assert after.norm().item() == pytest.approx(min(before.norm().item(), max_norm), rel=1e-6)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0).item() == pytest.approx(1, abs=1e-6)


@given(st.lists(arrays, min_size=1, max_size=4), st.floats(1e-2, 1e3))
def test_agrees_with_torchs_clipping(gradients, max_norm):
    ours, theirs = (parameters(*map(torch.from_numpy, gradients)) for _ in range(2))
    assume(flat(ours).norm() > 1)
    mine = clip_grad_norm_(ours, max_norm)
    reference = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=3e-6, atol=1e-12)


def test_nothing_is_touched_below_the_threshold():
    gradient = torch.tensor([0.3, 0.4])
    params = parameters(gradient)
    version = params[0].grad._version
    assert clip_grad_norm_(params, 1.0).item() == pytest.approx(0.5)
    assert torch.equal(params[0].grad, gradient)
    assert params[0].grad._version == version


def test_a_zero_gradient_stays_zero():
    params = parameters(torch.zeros(3))
    assert clip_grad_norm_(params).item() == 0
    assert torch.equal(params[0].grad, torch.zeros(3))


def test_no_gradient_at_all_has_norm_zero():
    assert clip_grad_norm_(parameters(None, None)).item() == 0


def test_one_tensor_may_stand_alone_and_a_generator_is_read_once():
    params = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    assert grad_norm(params[0]).item() == 3
    assert clip_grad_norm_(p for p in params).item() == 5


def test_a_parameter_listed_twice_counts_once():
    (parameter,) = parameters(torch.tensor([3.0]))
    assert grad_norm([parameter, parameter]).item() == 3


def test_clipping_each_tensor_is_not_clipping_all_together():
    together, apart = (parameters(torch.tensor([3.0]), torch.tensor([0.5])) for _ in range(2))
    clip_grad_norm_(together)
    clip_groups_([{"params": [p]} for p in apart])
    assert flat(apart).tolist() == [1.0, 0.5]
    assert flat(together).tolist() != flat(apart).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_summed_in_float32(dtype):
    gradient = torch.full((4096,), 30.0, dtype=dtype)  # the sum of squares overflows float16
    params = parameters(gradient)
    assert clip_grad_norm_(params, 1.0).item() == pytest.approx(30 * 64, rel=1e-6)
    assert params[0].grad.dtype == dtype
    assert flat(params).norm().item() == pytest.approx(1, rel=4e-3)


def test_mixed_dtypes_count_together():
    params = parameters(torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64))
    assert grad_norm(params).item() == pytest.approx(5)


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e30])
def test_norms_beyond_the_square_root_of_float32_are_clipped_all_the_same(scale):
    params = parameters(torch.tensor([3.0, 4.0]) * scale)
    norm = clip_grad_norm_(params, 1.0)
    if scale > 1:
        assert norm.item() == pytest.approx(5 * scale, rel=1e-6)
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))
    else:
        torch.testing.assert_close(params[0].grad, torch.tensor([3.0, 4.0]) * scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_left_to_be_found(bad):
    params = parameters(torch.tensor([5.0]), torch.tensor([bad]))
    norm = clip_grad_norm_(params)
    assert not math.isfinite(norm)
    assert params[0].grad.item() == 5
    assert nonfinite_gradients([("a", params[0]), ("b", params[1])]) == ["b"]


def test_the_compiled_path_without_branches_agrees_with_the_eager_one():
    gradients = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0])
    for values in (gradients, [g * 1e-3 for g in gradients], [g * math.nan for g in gradients]):
        eager, compiled = parameters(*values), parameters(*values)
        expected = clip_grad_norm_(eager)
        got = torch.compile(clip_grad_norm_, backend="eager", fullgraph=True)(compiled)
        torch.testing.assert_close(got, expected, equal_nan=True)
        for a, b in zip(eager, compiled):
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_descent_clipping_caps_the_predicted_drop():
    u, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    factor = descent_factor([u], [g], limit=2.0)
    assert (factor * (u @ g)).item() == pytest.approx(2.0)


def test_descent_clipping_of_gradient_descent_begins_where_the_norm_exceeds_one():
    unit = torch.tensor([0.6, 0.8])
    assert descent_factor([unit], [unit]).item() == 1
    assert descent_factor([2 * unit], [2 * unit]).item() == pytest.approx(0.25)


@pytest.mark.parametrize("product", [0.0, -3.0])
def test_an_update_that_climbs_is_not_clipped(product):
    assert descent_factor([torch.tensor([product])], [torch.tensor([1.0])]).item() == 1


def test_the_cosine_of_a_gaussian_gradient_and_its_sign_is_root_two_over_pi():
    g = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(g, g.sign(), dim=0)
    assert cosine.item() == pytest.approx(math.sqrt(2 / math.pi), abs=2e-3)


class TestGuard:
    """Steps that are not finite are skipped, counted, and blamed on a parameter."""

    def test_finite_steps_pass(self):
        guard = NonFiniteGuard()
        assert guard.allows(torch.tensor(1.0), [])
        assert guard.skipped == 0

    def test_a_step_that_is_not_finite_is_skipped_and_its_parameter_named(self, caplog):
        good, bad = parameters(torch.ones(2), torch.tensor([math.nan]))
        guard = NonFiniteGuard()
        norm = clip_grad_norm_([good, bad])
        assert not guard.allows(norm, [("good", good), ("layer.bad", bad)])
        assert guard.skipped == 1
        assert "layer.bad" in caplog.text
        assert "good" not in caplog.text

    def test_too_many_in_a_row_stop_the_run(self):
        (bad,) = parameters(torch.tensor([math.inf]))
        guard = NonFiniteGuard(patience=2)
        norm = grad_norm([bad])
        assert not guard.allows(norm, [("w", bad)])
        assert not guard.allows(norm, [("w", bad)])
        with pytest.raises(FloatingPointError, match="3 steps in a row, in w"):
            guard.allows(norm, [("w", bad)])

    def test_a_finite_step_forgives_but_the_count_stays(self):
        guard = NonFiniteGuard(patience=1)
        for _ in range(3):
            assert not guard.allows(torch.tensor(math.nan), [])
            assert guard.allows(torch.tensor(1.0), [])
        assert guard.skipped == 3

    def test_its_counts_make_the_round_trip(self):
        guard, other = NonFiniteGuard(), NonFiniteGuard()
        guard.allows(torch.tensor(math.nan), [])
        other.load_state_dict(guard.state_dict())
        assert (other.skipped, other.consecutive) == (1, 1)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_threshold_that_cannot_be_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm must be"):
        clip_grad_norm_(parameters(torch.ones(1)), max_norm)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="parameters must be a tensor or an iterable of tensors, got dict"):
        clip_grad_norm_({})
    with pytest.raises(TypeError, match=r"parameters\[1\] must be a tensor, got tuple"):
        clip_grad_norm_([nn.Parameter(torch.ones(1)), ("w", None)])
    (sparse,) = parameters(torch.ones(3))
    sparse.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"parameters\[0\] has a sparse gradient"):
        clip_grad_norm_([sparse])
    with pytest.raises(ValueError, match="as many"):
        descent_factor([], [torch.ones(1)])
    with pytest.raises(ValueError, match="one shape"):
        descent_factor([torch.ones(2)], [torch.ones(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_limited_step_of_gradient_descent_lowers_the_loss_by_the_rate_times_the_limit_at_most(dtype):
    slope = gaussian(7, dtype=dtype)
    for size, limit in [(3.0, 1.0), (3.0, 0.25), (0.01, 1.0)]:
        weight = torch.nn.Parameter(torch.zeros(7, dtype=dtype))
        weight.grad = size * slope / slope.norm()
        factor = limited_step(torch.optim.SGD([weight], lr=0.1), limit)
        fall = -(weight.grad * weight).sum().item()
        assert fall == pytest.approx(0.1 * min(size**2, limit), rel=1e-5)
        assert factor.item() == pytest.approx(min(1, limit / size**2), rel=1e-5)


def test_a_step_below_the_limit_is_the_optimizer_s_own_bit_for_bit():
    ends = []
    for limit in (None, 1e9):
        weights = [torch.nn.Parameter(gaussian(5, 3, dtype=torch.float32)) for _ in range(2)]
        groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        for seed in range(3):
            for weight in weights:
                weight.grad = gaussian(5, 3, seed=seed, dtype=torch.float32)
            optimizer.step() if limit is None else limited_step(optimizer, limit)
        ends.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(*ends)


def test_a_limited_step_counts_each_group_at_its_own_rate_and_leaves_out_what_has_no_gradient():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.125}]
    for weight in weights[:2]:
        weight.grad = torch.ones(1)
    assert limited_step(torch.optim.SGD(groups), 0.5).item() == 0.25  # <u, g> is 2
    assert [weight.item() for weight in weights] == [-0.25, -0.03125, 0]
    with pytest.raises(ValueError, match="limit must be"):
        limited_step(torch.optim.SGD(groups), 0.0)
