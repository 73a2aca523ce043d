import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from danlu.nn import FullAttention, attend, rotary_angles


def test_attention_is_the_softmax_average_of_the_values():
    q, k, v = torch.randn(3, 2, 3, 5, 7, dtype=torch.float64)
    weights = (q @ k.mT / 7**0.5).softmax(-1)
    assert torch.allclose(attend(q, k, v), weights @ v, rtol=0, atol=1e-13)


def test_the_tangent_is_that_of_the_formula_and_carries_a_gradient():
    q, k, v, dq, dk, dv = torch.randn(6, 2, 3, 5, 7, dtype=torch.float64)
    q.requires_grad_()
    out, slope = torch.func.jvp(attend, (q, k, v), (dq, dk, dv))
    s, ds = q @ k.mT / 7**0.5, (dq @ k.mT + q @ dk.mT) / 7**0.5
    p = s.softmax(-1)
    expected = (p * (ds - (p * ds).sum(-1, keepdim=True))) @ v + p @ dv
    assert torch.allclose(out, p @ v, rtol=0, atol=1e-13)
    assert torch.allclose(slope, expected, rtol=0, atol=1e-13)
    mine, theirs = (torch.autograd.grad(s.square().sum(), q, retain_graph=True)[0] for s in (slope, expected))
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-11)


def test_without_positions_tokens_may_be_permuted_and_with_them_not():
    layer = FullAttention(24, 3).double()
    x, order = torch.randn(2, 5, 24, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    rope = rotary_angles(torch.arange(5.0, dtype=torch.float64), 8)
    assert torch.allclose(layer(x)[:, order], layer(x[:, order]), rtol=0, atol=1e-12)
    assert (layer(x, rope)[:, order] - layer(x[:, order], rope)).abs().amax() > 1e-3


def test_heads_that_do_not_divide_are_rejected():
    with pytest.raises(ValueError, match="num_heads must divide the width 10, got 3"):
        FullAttention(10, 3)


def test_operations_are_those_that_torch_counts():
    layer, x = FullAttention(24, 3), torch.randn(1, 11, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(x)
    assert layer.flops(11) == counter.get_total_flops()
