import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.linalg.lowrank import iterative_pinv, least_squares, pinv

D = torch.float64


def relative(got, wanted):
    return float(torch.linalg.matrix_norm(got - wanted) / torch.linalg.matrix_norm(wanted))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 7), (11, 11), (2, 3, 7, 5)])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_pinv_satisfies_the_four_penrose_conditions(shape, rank, generator):
    A = torch.randn(shape, dtype=D, generator=generator)
    if rank is not None and rank < min(shape[-2:]):
        A = A[..., :, :rank] @ torch.randn(*shape[:-2], rank, shape[-1], dtype=D, generator=generator)
    B = pinv(A)
    assert torch.allclose(A @ B @ A, A, atol=1e-10)
    assert torch.allclose(B @ A @ B, B, atol=1e-10)
    assert torch.allclose((A @ B).mT, A @ B, atol=1e-10)
    assert torch.allclose((B @ A).mT, B @ A, atol=1e-10)
    assert torch.allclose(pinv(B), A, atol=1e-10)


def test_pinv_of_full_column_rank_is_the_normal_equations_inverse(generator):
    A = torch.randn(13, 5, dtype=D, generator=generator)
    assert torch.allclose(pinv(A), torch.linalg.inv(A.mT @ A) @ A.mT, atol=1e-12)
    assert torch.allclose(pinv(A.mT), A @ torch.linalg.inv(A.mT @ A), atol=1e-12)


def test_pinv_is_the_limit_of_the_regularised_inverse_that_is_never_used_to_compute_it(make):
    A = make(9, 6, torch.tensor([1.0, 0.5, 0.1]))
    eye = torch.eye(6, dtype=D)
    errors = [relative(torch.linalg.solve(A.mT @ A + eps * eye, A.mT), pinv(A)) for eps in (1e-3, 1e-5, 1e-7, 1e-15)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[3] > 1e-4  # rounding takes over long before the limit


def test_singular_values_at_or_below_rtol_count_as_zero():
    A = torch.diag(torch.tensor([1.0, 0.5, 0.01], dtype=D))
    assert torch.allclose(pinv(A, rtol=0.1), torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=D)))


def test_pinv_passes_gradcheck_at_constant_rank(generator):
    A = torch.randn(5, 3, dtype=D, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(pinv, (A,))


@pytest.mark.parametrize(("m", "n"), [(17, 5), (5, 17), (7, 7)])
def test_least_squares_equals_pinv_times_matrix_where_both_are_exact(m, n, generator):
    A, M = torch.randn(m, n, dtype=D, generator=generator), torch.randn(m, 3, dtype=D, generator=generator)
    assert relative(least_squares(A, M), pinv(A) @ M) < 1e-12


@pytest.mark.parametrize(("m", "n"), [(17, 7), (7, 17)])
def test_least_squares_of_a_deficient_matrix_is_the_minimum_norm_solution(m, n, low_rank, generator):
    A, M = low_rank(m, n, 3), torch.randn(m, 2, dtype=D, generator=generator)
    assert relative(least_squares(A, M), pinv(A, rtol=1e-10) @ M) < 1e-9


def test_the_gradients_of_the_least_squares_loss_vanish_at_the_solution(generator):
    A, M = torch.randn(11, 4, dtype=D, generator=generator), torch.randn(11, 6, dtype=D, generator=generator)
    B = least_squares(A, M).requires_grad_()
    loss = (A @ B - M).square().sum()
    (gradient,) = torch.autograd.grad(loss, B)
    assert torch.allclose(gradient, 2 * A.mT @ (A @ B - M), atol=1e-12)
    assert gradient.abs().max() < 1e-12


def row_stochastic(condition, generator, n=64):
    """Softmax rows, mixed with the identity until the condition number is the one asked for."""
    noise = torch.randn(n, n, dtype=D, generator=generator)

    def at(t):
        return torch.softmax(noise + t * torch.eye(n, dtype=D), -1)

    low, high = 0.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.linalg.cond(at(middle)) > condition else (low, middle)
    return at(high)


def test_six_nystromformer_steps_are_no_pseudo_inverse_where_six_chebyshev_steps_are(generator):
    A = row_stochastic(539.0, generator)
    assert torch.linalg.cond(A) == pytest.approx(539, rel=0.05)
    exact = pinv(A)
    published = {s: relative(iterative_pinv(A, method="nystromformer", steps=s), exact) for s in (3, 6, 9, 15, 18)}
    assert published[3] > 0.9
    assert published[6] > 0.8
    assert published[18] < 1e-10
    assert relative(iterative_pinv(A, condition=800.0, steps=7), exact) < 1e-10
    assert relative(iterative_pinv(A, condition=800.0, steps=6), exact) < 1e-3


@given(st.integers(1, 41), st.integers(1, 41), st.floats(1.0, 4.0), st.integers(0, 99))
def test_chebyshev_iteration_converges_to_the_pseudo_inverse_at_the_condition_asked_for(m, n, digits, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, dtype=D, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, k, dtype=D, generator=generator))[0]
    A = 17.0 * (U * torch.logspace(0, -digits, k, dtype=D)) @ V.mT
    assert relative(iterative_pinv(A, condition=10**digits), pinv(A)) < 1e-14 * 10 ** (2 * digits) + 1e-12


def test_iterative_pinv_works_on_batches_in_float32_and_under_autograd(generator):
    A = torch.eye(5) + 0.2 * torch.rand(3, 2, 5, 5, generator=generator)
    assert torch.allclose(iterative_pinv(A, condition=100.0) @ A, torch.eye(5).expand(3, 2, 5, 5), atol=1e-4)
    B = (torch.eye(3, dtype=D) + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(iterative_pinv(B, condition=10.0).sum(), B)
    (exact,) = torch.autograd.grad(torch.linalg.inv(B).sum(), B)
    assert torch.allclose(gradient, exact, atol=1e-9)


def test_pseudo_inverse_of_zero_is_zero():
    assert torch.equal(pinv(torch.zeros(3, 5)), torch.zeros(5, 3))
    assert torch.equal(iterative_pinv(torch.zeros(3, 5)), torch.zeros(5, 3))
    assert torch.equal(least_squares(torch.zeros(5, 3), torch.ones(5, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("function", [pinv, iterative_pinv, lambda A: least_squares(A, A)])
def test_bad_input_is_named(function):
    with pytest.raises(TypeError, match=r"A must be float32 or float64, got torch.int64"):
        function(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        function(torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="A must have at least 2 dimensions"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="A must not be empty"):
        function(torch.ones(0, 3))
    with pytest.raises(ValueError, match="A must be finite"):
        function(torch.tensor([[1.0, torch.nan]]))


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="rtol must be in"):
        pinv(torch.eye(2), rtol=1.0)
    with pytest.raises(ValueError, match="condition must be in"):
        iterative_pinv(torch.eye(2), condition=1e9)
    with pytest.raises(ValueError, match="M must have as many rows as A"):
        least_squares(torch.eye(2), torch.eye(3))
    with pytest.raises(TypeError, match="M must have A's dtype"):
        least_squares(torch.eye(2), torch.eye(2, dtype=D))
