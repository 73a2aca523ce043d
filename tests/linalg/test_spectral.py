"""The spectral norm by power iteration, its gradient, and starts that fail."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import gaussian

from danlu.linalg import spectral_norm, spectral_norm_gradient


def _with_spectrum(sigma, m, n):
    U, V = torch.linalg.qr(gaussian(m, len(sigma))).Q, torch.linalg.qr(gaussian(n, len(sigma), seed=1)).Q
    return (U * torch.as_tensor(sigma, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (11, 11), (1, 5), (5, 1), (2, 3, 5, 7)])
@pytest.mark.parametrize("block", [1, 3])
def test_norm_and_vectors_are_those_of_the_singular_value_decomposition(shape, block):
    if block > min(shape[-2:]):
        pytest.skip("a block has at most min(m, n) vectors")
    M = gaussian(*shape)
    top = spectral_norm(M, iterations=300, block=block)
    torch.testing.assert_close(top.value, torch.linalg.matrix_norm(M, 2), rtol=1e-10, atol=0)
    image = (M @ top.right.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(image, top.value.unsqueeze(-1) * top.left, rtol=0, atol=1e-10)
    torch.testing.assert_close(top.left.norm(dim=-1), torch.ones(shape[:-2]).double(), rtol=0, atol=1e-12)


@given(m=st.integers(1, 40), n=st.integers(1, 40), exponent=st.integers(-90, 90), seed=st.integers(0, 99))
def test_estimate_never_exceeds_the_norm_and_scales_with_the_matrix(m, n, exponent, seed):
    M = gaussian(m, n, seed=seed)
    value = spectral_norm(M).value
    assert value <= torch.linalg.matrix_norm(M, 2) * (1 + 1e-12)
    assert torch.equal(spectral_norm(M * 2.0**exponent).value, value * 2.0**exponent)


def test_error_shrinks_by_the_square_of_the_ratio_of_singular_values():
    M = _with_spectrum([1.0, 0.8], 7, 5)
    v1 = torch.linalg.svd(M).Vh[0]

    def tangent(iterations):
        right = spectral_norm(M, start=gaussian(5, seed=3), iterations=iterations).right
        cosine = (right @ v1).abs()
        return (right - (right @ v1) * v1).norm() / cosine

    assert (tangent(9) / tangent(8)).item() == pytest.approx(0.64, abs=1e-6)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [1, 10])
def test_estimate_from_ones_on_a_power_law_is_the_ratio_of_its_moments(exponent, iterations):
    i = torch.arange(1, 1025, dtype=torch.float64)
    top = spectral_norm(torch.diag(i**-exponent), start=torch.ones(1024), iterations=iterations)
    moments = [(i ** (-exponent * (4 * iterations + k))).sum() for k in (0, 2)]
    assert top.value.item() == pytest.approx((moments[1] / moments[0]).sqrt().item(), rel=1e-12)


def test_gaussian_matrix_reaches_97_percent_in_ten_iterations():
    M = gaussian(1024, 1024, dtype=torch.float32)
    norm = torch.linalg.eigvalsh(M @ M.T)[-1].sqrt()
    share = [(spectral_norm(M, iterations=t).value / norm).item() for t in (1, 5, 10, 20)]
    assert share == pytest.approx([0.775, 0.933, 0.971, 0.990], abs=0.02)
    assert (spectral_norm(M, block=16).value / norm).item() > 0.99


def test_warm_start_continues_where_the_last_call_stopped():
    M = gaussian(37, 53)
    for block in (1, 4):
        start, values = None, []
        for _ in range(5):
            top = spectral_norm(M, start=start, iterations=2, block=block)
            start = top.start
            values.append(top.value.item())
        assert values == sorted(values)
        assert values[-1] == pytest.approx(spectral_norm(M, iterations=10, block=block).value.item(), rel=1e-9)


def test_rows_that_sum_to_zero_do_not_stop_the_iteration():
    M = gaussian(7, 11)
    M -= M.mean(1, keepdim=True)
    assert (M.T @ (M @ torch.ones(11).double())).norm() < 1e-13
    for start in (None, torch.ones(11).double()):
        value = spectral_norm(M, start=start, iterations=300).value
        assert value.item() == pytest.approx(torch.linalg.matrix_norm(M, 2).item(), rel=1e-9)


def test_start_in_the_null_space_is_replaced():
    M = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    top = spectral_norm(M, start=torch.tensor([0.0, 0.0, 1.0]), iterations=50)
    assert top.value.item() == pytest.approx(2)


def test_zero_matrix_has_norm_zero_and_unit_vectors():
    top = spectral_norm(torch.zeros(2, 3, 5))
    assert torch.equal(top.value, torch.zeros(2))
    assert torch.equal(top.left.norm(dim=-1), torch.ones(2))
    assert torch.equal(top.right.norm(dim=-1), torch.ones(2))


def test_gradient_is_u_v_transposed_by_finite_differences():
    M = gaussian(7, 11)
    D = gaussian(7, 11, seed=1)
    G = spectral_norm_gradient(M, iterations=300)
    h = 1e-5
    slope = (torch.linalg.matrix_norm(M + h * D, 2) - torch.linalg.matrix_norm(M - h * D, 2)) / (2 * h)
    assert (G * D).sum().item() == pytest.approx(slope.item(), abs=1e-8)
    assert G.norm().item() == pytest.approx(1, abs=1e-12)
    W = M.clone().requires_grad_()
    spectral_norm(W, iterations=300).value.backward()
    torch.testing.assert_close(W.grad, G, rtol=0, atol=1e-12)


def test_norm_times_gradient_is_the_best_rank_one_approximation():
    M = gaussian(7, 11)
    U, S, Vh = torch.linalg.svd(M)
    top = spectral_norm(M, iterations=300)
    torch.testing.assert_close(
        top.value * spectral_norm_gradient(M, iterations=300), S[0] * torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-9
    )


def test_at_a_tie_the_gradient_is_one_of_the_subgradients():
    eye = torch.eye(3, dtype=torch.float64)
    G = spectral_norm_gradient(eye)
    for seed in range(20):
        D = gaussian(3, 3, seed=seed) * 0.1
        assert torch.linalg.matrix_norm(eye + D, 2) >= 1 + (G * D).sum() - 1e-12
    assert torch.linalg.matrix_norm(eye - 0.1 * G, 2) > 1 - 0.1  # which a gradient would not allow


M23 = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: spectral_norm(torch.ones(3)), ValueError, "M must have at least 2 dimensions"),
        (lambda: spectral_norm(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "real floating dtype"),
        (lambda: spectral_norm(torch.full((2, 2), math.inf)), ValueError, "M must be finite"),
        (lambda: spectral_norm(torch.zeros(0, 3)), ValueError, "M must not be empty"),
        (lambda: spectral_norm(M23, iterations=0), ValueError, "iterations must be an integer of at least 1"),
        (lambda: spectral_norm(M23, block=3), ValueError, "block must be an integer from 1 to 2"),
        (lambda: spectral_norm(M23, start=torch.ones(2)), ValueError, r"start must have shape \(3,\), got \(2,\)"),
        (lambda: spectral_norm(M23, start=torch.ones(3), block=2), ValueError, r"start must have shape \(3, 2\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_start_that_is_drawn_or_replaced_is_in_the_null_space_of_rows_that_sum_to_zero():
    M = torch.tensor([[[2.0, -2.0]], [[1.0, -1.0]]])
    exact = torch.tensor([8.0, 2.0]).sqrt()  # of a matrix of rank one, after one iteration
    torch.testing.assert_close(spectral_norm(M, iterations=1).value, exact)
    torch.testing.assert_close(spectral_norm(M, start=torch.ones(2, 2), iterations=1).value, exact)
    for start in (None, torch.ones(2)):
        mapped = torch.func.vmap(lambda one, start=start: spectral_norm(one, start=start, iterations=1).value)(M)
        torch.testing.assert_close(mapped, exact)


@pytest.mark.parametrize("block", [1, 2])
def test_of_a_batch_only_the_starts_that_are_lost_are_replaced(block):
    M = torch.diag_embed(torch.tensor([[3.0, 2.0, 1.0, 0.0]]).double().expand(2, 4))
    start = torch.zeros(2, 4, block, dtype=torch.float64)
    start[0, 0, 0] = start[0, 1, block - 1] = 1.0  # in the first matrix the very singular vectors
    start[0, 1, 0] *= block - 1
    start[1, 3] = 1.0  # in the second the null space
    top = spectral_norm(M, start=start if block > 1 else start[..., 0], iterations=1, block=block)
    assert top.value[0].item() == pytest.approx(3.0, rel=1e-15)
    fresh = spectral_norm(M[1], iterations=1, block=block).value
    assert top.value[1].item() == pytest.approx(fresh.item(), rel=1e-15)
    assert fresh.item() > 1.0
