"""Linear, norm and feed-forward layers against PyTorch's own formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tensors import gaussian

from danlu.nn import FeedForward, Linear, RMSNorm, SquarePlusConfig, declare, swiglu
from danlu.nn.linear import matrix_vector

random = partial(gaussian, seed=2)


def test_rms_norm_and_its_gradients_equal_torchs() -> None:
    norm = RMSNorm(7, eps=1e-5).double()
    norm.weight.data = random(7)
    x = random(3, 5, 7).requires_grad_()
    expected = F.rms_norm(x, (7,), norm.weight, 1e-5)
    upstream = random(3, 5, 7)
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    theirs = torch.autograd.grad(expected, (x, norm.weight), upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rms_norm_without_gradients_equals_itself_with_them() -> None:
    norm, x = RMSNorm(5), torch.randn(3, 5)
    with torch.no_grad():
        silent = norm(x)
    torch.testing.assert_close(silent, norm(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_sums_bfloat16_in_float32() -> None:
    x = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    assert RMSNorm(4096)(x).dtype == torch.bfloat16
    torch.testing.assert_close(RMSNorm(4096)(x).float(), torch.full((1, 4096), 0.995), rtol=5e-3, atol=0)


def test_swiglu_gradient_passes_a_numerical_check() -> None:
    assert torch.autograd.gradcheck(swiglu, random(3, 10).requires_grad_())


def test_feed_forward_is_the_gated_formula_with_separate_weights() -> None:
    layer, x = FeedForward(5, 7).double(), random(3, 5)
    gate, up = layer.gate_up.weight.split(7)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_feed_forward_gates_by_another_activation_where_one_is_given() -> None:
    layer, x = FeedForward(5, 7, activation=SquarePlusConfig()).double(), random(2, 3, 5)
    gate, up = layer.gate_up.weight.split(7)
    expected = (layer.activation(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_linear_computes_in_the_dtype_of_its_input_and_keeps_float32_weights() -> None:
    layer = Linear(5, 3)
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x, layer.weight.bfloat16()))
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_linear_keeps_the_rms_of_activations_at_initialisation() -> None:
    torch.manual_seed(0)
    y = Linear(389, 401)(torch.randn(211, 389))
    assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.02)


def test_declared_split_must_cover_the_rows() -> None:
    with pytest.raises(ValueError, match=r"split of weight must be .* sum to its 6 rows, got \(4, 3\)"):
        declare(torch.nn.Linear(4, 6), "weight", "matrix", split=(4, 3))


@pytest.mark.parametrize(("arguments", "name"), [((0, 3), "in_features"), ((3, -1), "out_features")])
def test_impossible_sizes_are_rejected_by_name(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Linear(*arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_matrix_times_a_vector_is_the_same_by_rows_by_columns_and_on_any_number_of_threads(threads: int) -> None:
    weight = torch.randn(523, 504, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(504, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for laid_out in (weight, weight.T.contiguous().T, weight[:7], weight[:, :503].T.contiguous().T):
            y = matrix_vector(laid_out, x[: laid_out.shape[1]])
            torch.testing.assert_close(y, (laid_out * x[: laid_out.shape[1]]).sum(1), rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(before)
