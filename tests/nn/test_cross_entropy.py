"""Chunked cross-entropy against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from danlu.nn import linear_cross_entropy


@given(st.integers(1, 23), st.integers(1, 29), st.integers(2, 31), st.booleans())
def test_value_and_gradients_equal_the_plain_computation(tokens: int, chunk: int, vocab: int, holes: bool) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 5, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(vocab, 5, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    if holes:
        targets[::3] = -100
    ours = linear_cross_entropy(x, w, targets, chunk=chunk)
    theirs = F.cross_entropy(x @ w.T, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours * 0.3, (x, w)), torch.autograd.grad(theirs * 0.3, (x, w)), rtol=1e-11, atol=1e-12
    )


@given(st.integers(1, 23), st.integers(1, 29), st.integers(2, 31), st.booleans())
def test_z_loss_adds_the_squared_log_sum_exp_and_its_gradient(tokens: int, chunk: int, vocab: int, holes: bool) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 5, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(vocab, 5, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    if holes:
        targets[::3] = -100
    ours = linear_cross_entropy(x, w, targets, chunk=chunk, z_loss=0.07)
    logits = x @ w.T
    squares = logits.logsumexp(-1).square()[targets != -100].sum()
    plain = F.cross_entropy(logits, targets, reduction="sum") + 0.07 * squares
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours * 0.3, (x, w)), torch.autograd.grad(plain * 0.3, (x, w)), rtol=1e-11, atol=1e-12
    )
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, w, targets, chunk=chunk, z_loss=0.07), plain, rtol=1e-12, atol=1e-12
        )


def test_logits_of_a_thousand_overflow_nothing() -> None:
    x = torch.tensor([[1000.0], [-1000.0]]).requires_grad_()
    w = torch.tensor([[1.0], [-1.0], [0.0]])
    loss = linear_cross_entropy(x, w, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(2000)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[2.0], [0.0]]))


def test_only_the_gradients_asked_for_are_formed() -> None:
    x, w = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True)
    linear_cross_entropy(x, w, torch.tensor([1, 2, 3])).backward()
    assert w.grad is not None
    assert x.grad is None


def test_bfloat16_hidden_states_give_a_float32_loss_and_float32_weight_gradients() -> None:
    x, w = torch.randn(13, 8), torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(0, 17, (13,))
    exact = linear_cross_entropy(x, w, targets)
    (expected,) = torch.autograd.grad(exact, w)
    low = linear_cross_entropy(x.bfloat16(), w, targets)
    (grad,) = torch.autograd.grad(low, w)
    assert low.dtype == grad.dtype == torch.float32
    assert abs(low - exact) / exact < 0.01
    assert (grad - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("wrong", [-1, -99, 7, 100])
def test_a_target_outside_of_the_vocabulary_raises_as_in_torch(wrong: int) -> None:
    x, w, targets = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5), torch.tensor([2, wrong, -100])
    with pytest.raises(IndexError):
        F.cross_entropy(x @ w.T, targets)
    with pytest.raises(IndexError, match=rf"targets must be in \[0, 7\), or -100 .* got {wrong}"):
        linear_cross_entropy(x, w, targets)


def test_a_loss_scale_beyond_float16_reaches_float16_gradients_unharmed() -> None:
    x, w = torch.randn(9, 8), torch.randn(17, 8)
    targets = torch.arange(9)
    low, exact = x.half().requires_grad_(), x.half().float().requires_grad_()
    (linear_cross_entropy(low, w, targets) * 2.0**17 / 2**10).backward()
    scaled = torch.autograd.grad(linear_cross_entropy(low, w.half(), targets) * 2.0**17, low)[0]
    linear_cross_entropy(exact, w, targets).backward()
    assert low.grad is not None
    assert exact.grad is not None
    assert (low.grad.float() / 2**7 - exact.grad).norm() < 2e-3 * exact.grad.norm()
    fits = exact.grad.abs() * 2**17 < 6e4
    assert scaled[fits].isfinite().all()


def test_shapes_that_do_not_match_are_rejected() -> None:
    with pytest.raises(ValueError, match="must fit together"):
        linear_cross_entropy(torch.randn(3, 5), torch.randn(7, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(torch.randn(3, 5), torch.randn(7, 5), torch.zeros(3, dtype=torch.int64), chunk=0)
    with pytest.raises(ValueError, match="z_loss"):
        linear_cross_entropy(torch.randn(3, 5), torch.randn(7, 5), torch.zeros(3, dtype=torch.int64), z_loss=-1.0)
