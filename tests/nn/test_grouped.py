"""Dispatch to experts: the written-out sum, its gradients, what is kept, and that no token is dropped."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.nn import grouped
from danlu.nn.grouped import routed_experts

from .expert_sums import random, written_out


def test_gradients_equal_those_of_the_written_out_sum() -> None:
    x, w_up, w_down = (
        random(13, 11).requires_grad_(),
        random(7, 10, 11).requires_grad_(),
        random(7, 11, 5).requires_grad_(),
    )
    gate = random(13, 3).requires_grad_()
    chosen = torch.randint(0, 6, (13, 3), generator=torch.Generator().manual_seed(0))  # expert 6 stays idle
    upstream = random(13, 11)
    inputs = (x, gate, w_up, w_down)
    ours = torch.autograd.grad(routed_experts(x, gate, chosen, w_up, w_down), inputs, upstream)
    theirs = torch.autograd.grad(written_out(x, gate, chosen, w_up, w_down), inputs, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not ours[2][6].any()


def test_bfloat16_grouped_product_equals_the_float32_loop_within_its_rounding() -> None:
    x, w_up, w_down = random(37, 16), random(5, 32, 16) / 4, random(5, 16, 16) / 4
    gate, chosen = random(37, 2).sigmoid(), torch.randint(0, 5, (37, 2))
    leaves = [t.float().requires_grad_() for t in (x, w_up, w_down)]
    exact = routed_experts(leaves[0], gate.float(), chosen, leaves[1], leaves[2])
    low = routed_experts(leaves[0].bfloat16(), gate.float(), chosen, leaves[1], leaves[2])
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() / exact.norm() < 0.02
    ours = torch.autograd.grad(low.float().square().sum(), leaves)
    theirs = torch.autograd.grad(exact.square().sum(), leaves)
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cutting_the_experts_into_parts_changes_no_number(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [
        t.to(dtype).requires_grad_() for t in (random(40, 16), random(40, 2), random(7, 16, 16), random(7, 16, 8))
    ]
    x, gate, w_up, w_down = inputs
    chosen = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(0))  # expert 6 stays idle
    found = []
    for part in (1, 30 * 16 * dtype.itemsize, 1 << 30):  # one expert at a time, two or so, all at once
        monkeypatch.setattr(grouped, "_PART", part)
        y = routed_experts(x, gate, chosen, w_up, w_down)
        found.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    # Tokens get the sum of their experts in another order when these come in another number of calls.
    tolerance = {} if dtype == torch.bfloat16 else {"rtol": 1e-13, "atol": 1e-13}
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], **tolerance)


def test_of_a_choice_only_gate_and_up_activations_are_kept() -> None:
    x, gate, w_up, w_down = (
        t.requires_grad_() for t in (random(40, 16), random(40, 3), random(7, 20, 16), random(7, 16, 10))
    )
    chosen = torch.randint(0, 7, (40, 3), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        routed_experts(x, gate, chosen, w_up, w_down)
    inputs = {t.data_ptr() for t in (x, gate, chosen, w_up, w_down)}
    new = sum(t.numel() for t in kept if t.data_ptr() not in inputs)
    assert new == 120 * (20 + 3)  # gate and up; the gate, its place and its token


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_no_token_is_dropped_whatever_the_routing(tokens: int, experts: int, data: st.DataObject) -> None:
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, experts - 1), min_size=tokens, max_size=tokens)))[:, None]
    x = random(tokens, 3)
    w_up, w_down = random(experts, 4, 3), random(experts, 3, 2)
    gate = torch.ones(tokens, 1, dtype=torch.float64)
    ours = routed_experts(x, gate, chosen, w_up, w_down)
    torch.testing.assert_close(ours, written_out(x, gate, chosen, w_up, w_down), rtol=1e-11, atol=1e-11)


def test_block_of_a_network_is_the_sum_of_its_experts() -> None:
    """The geometric view: f(xA)B = sum of f(x A_i) B_i over blocks, and all of k = n is the dense network."""
    x, w_up, w_down = random(13, 11), random(7, 10, 11), random(7, 11, 5)
    everyone = torch.arange(7).expand(13, 7)
    y = routed_experts(x, torch.ones(13, 7, dtype=torch.float64), everyone, w_up, w_down)
    first, second = w_up[:, :5].reshape(35, 11), w_up[:, 5:].reshape(35, 11)
    dense = (F.silu(x @ first.T) * (x @ second.T)) @ w_down.transpose(0, 1).reshape(11, 35).T
    torch.testing.assert_close(y, dense, rtol=1e-11, atol=1e-12)


def test_normalised_experts_equal_the_written_out_sum_and_its_gradient() -> None:
    x, w_up, w_down = random(13, 11).requires_grad_(), random(7, 10, 11), random(7, 11, 5).requires_grad_()
    gate = random(13, 3).sigmoid().requires_grad_()
    chosen = random(13, 7).topk(3).indices

    def written(x: Tensor, gate: Tensor, w_down: Tensor) -> Tensor:
        rows = []
        for n in range(13):
            total = torch.zeros_like(x[n])
            for g, e in zip(gate[n], chosen[n]):
                first, second = (w_up[e] @ x[n]).chunk(2)
                v = w_down[e] @ (F.silu(first) * second)
                total = total + g * 0.5 * v / v.square().mean().sqrt()
            rows.append(total)
        return torch.stack(rows)

    ours = routed_experts(x, gate, chosen, w_up, w_down, rms=0.5)
    expected = written(x, gate, w_down)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    upstream = random(13, 11)
    found = torch.autograd.grad(ours, (x, gate, w_down), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, gate, w_down), upstream), rtol=1e-8, atol=1e-8)
    compiled = torch.compile(routed_experts, backend="eager", fullgraph=True)(x, gate, chosen, w_up, w_down, rms=0.5)
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-9)


def test_a_mask_chooses_any_number_of_experts_a_token_and_none() -> None:
    x, gate = random(13, 11).requires_grad_(), random(13, 7).requires_grad_()
    w_up, w_down = random(7, 10, 11), random(7, 11, 5)
    mask = random(13, 7) > 0.3
    mask[4] = False
    mask[:, 6] = False
    ours = routed_experts(x, gate, mask, w_up, w_down)
    assert not ours[4].any()
    expected = written_out(x, gate * mask, torch.arange(7).expand(13, 7), w_up, w_down)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    upstream = random(13, 11)
    ours_grad = torch.autograd.grad(ours, (x, gate), upstream)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(expected, (x, gate), upstream), rtol=1e-11, atol=1e-11)
