"""The matrix sign: identities, adversarial spectra, every scale, and a gradient that is the gradient."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import gaussian

from danlu.approx import optimal_composition, published
from danlu.linalg import msign, orthogonalize, polar
from danlu.linalg.msign import METHODS, default_compositions, rank_tolerance


def _with_spectrum(sigma, m, n, seed=0):
    """Return a matrix with these singular values, and the product of its singular vectors."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    U = torch.linalg.qr(gaussian(m, len(sigma), seed=seed)).Q
    V = torch.linalg.qr(gaussian(n, len(sigma), seed=seed + 1)).Q
    return (U * sigma) @ V.T, U @ V.T


def _frobenius_error(X, sign):
    return ((X.double() - sign).norm() / math.sqrt(min(sign.shape))).item()


def _log_uniform(count, low, seed=0):
    return 10 ** (math.log10(low) * torch.rand(count, generator=torch.Generator().manual_seed(seed)).double())


SHAPES = [(1, 1), (1, 7), (7, 1), (11, 11), (7, 13), (13, 7), (2, 3, 5, 11)]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_of_msign_are_one(shape):
    S = torch.linalg.svdvals(msign(gaussian(*shape)))
    assert (S - 1).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_msign_is_idempotent_and_its_product_with_the_matrix_is_symmetric_and_not_negative(shape):
    M = gaussian(*shape)
    X = msign(M)
    H = X.mT @ M
    torch.testing.assert_close(msign(X), X, rtol=0, atol=1e-12)
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(H).min() > -1e-12


def test_msign_of_a_vector_a_diagonal_and_a_scalar_are_the_textbook_ones():
    v = gaussian(17, 1)
    torch.testing.assert_close(msign(v), v / v.norm(), rtol=0, atol=1e-14)
    d = torch.tensor([3.0, -0.1, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(msign(d.diag()), d.sign().diag(), rtol=0, atol=1e-14)


def test_root_mean_square_is_one_over_the_root_of_the_longer_side():
    assert (msign(gaussian(37, 101)).square().mean().sqrt() * math.sqrt(101)).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("method", ["svd", "designed", "polar_express"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal_factors_pass_through(method, dtype):
    P, Q = (torch.linalg.qr(gaussian(k, k, seed=k)).Q for k in (7, 13))
    R = gaussian(7, 13)
    left = msign((P @ R @ Q).to(dtype), method=method).double()
    right = P @ msign(R.to(dtype), method=method).double() @ Q
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("method", ["auto", "designed", "jordan"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_power_of_two_changes_no_bit(method, dtype):
    M = gaussian(3, 11, 17, dtype=dtype)
    for exponent in (-60, -7, 5, 60):
        assert torch.equal(msign(M * 2.0**exponent, method=method), msign(M, method=method))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_other_factors_change_no_more_than_rounding(dtype, tolerance):
    M = gaussian(11, 29, dtype=dtype)
    for factor in (1e-20, 0.3, 7.0, 1e20):
        torch.testing.assert_close(msign(M * factor), msign(M), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["svd", "designed"])
def test_a_minus_sign_and_a_transposition_pass_through(method):
    M = gaussian(7, 13)
    torch.testing.assert_close(msign(-M, method=method), -msign(M, method=method), rtol=0, atol=1e-12)
    torch.testing.assert_close(msign(M.T, method=method), msign(M, method=method).T, rtol=0, atol=1e-12)


def test_rank_deficient_matrix_gives_exactly_its_rank_of_ones():
    M = gaussian(23, 5) @ gaussian(5, 31, seed=1)
    S = torch.linalg.svdvals(msign(M))
    assert (S[:5] - 1).abs().max() < 1e-12
    assert S[5:].max() < 1e-12
    assert rank_tolerance(M) == pytest.approx(31 * 2**-52)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    assert torch.linalg.svdvals(U @ Vh)[5:].min() > 0.9  # the plain product would be a completion of full rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix_gives_zero_and_leaves_its_neighbours_alone(method, dtype):
    M = gaussian(3, 7, 11).to(dtype)
    M[1] = 0
    X = msign(M, method=method)
    assert X.dtype == dtype
    assert torch.equal(X[1], torch.zeros_like(X[1]))
    torch.testing.assert_close(X[::2], msign(M[::2], method=method), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("auto", "svd", "designed")])
@pytest.mark.parametrize("shape", [(11, 13), (13, 11), (5, 29)])
def test_matrix_iteration_is_the_scalar_composition_on_the_singular_values(name, shape):
    M = gaussian(*shape)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    expected = (U * torch.from_numpy(published(name)((S / M.norm()).numpy()))) @ Vh
    torch.testing.assert_close(msign(M, method=name), expected, rtol=0, atol=1e-10)


def test_norms_between_the_largest_singular_value_and_frobenius_are_ordered():
    for shape in ((7, 13), (31, 31), (1, 5)):
        M = gaussian(*shape)
        A = M @ M.T
        chain = [torch.linalg.matrix_norm(M, 2), (A @ A).norm() ** 0.25, A.norm() ** 0.5, M.norm()]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(chain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["svd", "designed", "jordan"])
def test_input_is_left_unchanged(method, dtype):
    for shape in ((5, 5), (3, 11), (11, 3), (2, 3, 7)):
        M = gaussian(*shape, dtype=dtype)
        before = M.clone()
        msign(M, method=method)
        msign(M.mT, method=method)
        assert torch.equal(M, before)


@given(
    m=st.integers(1, 300),
    n=st.integers(1, 300),
    batch=st.sampled_from([(), (1,), (2,), (2, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_msign_is_near_the_exact_one_for_every_shape_stride_and_dtype(m, n, batch, dtype, transposed, strided, seed):
    sigma = _log_uniform(min(m, n), 2e-3, seed)
    M, sign = _with_spectrum(sigma, m, n, seed)
    M, sign = M.expand(*batch, m, n), sign.expand(*batch, m, n)
    M = M.to(dtype)
    if strided:
        wide = torch.zeros(*batch, 2 * m, 3 * n, dtype=dtype)
        wide[..., ::2, ::3] = M
        M = wide[..., ::2, ::3]
    if transposed:
        M, sign = M.mT, sign.mT
    X = msign(M)
    error = (X.double() - sign).norm() / sign.norm()
    assert X.shape == M.shape
    # bfloat16 cannot hold a matrix to better than 1/256, which alone moves the direction of values of 2e-3.
    assert error < {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.45}[dtype]


ADVERSARIAL = {
    "log uniform 1e-6": _log_uniform(37, 1e-6),
    "clustered": torch.cat([torch.full((20,), 1.0), torch.full((17,), 1 + 1e-9)]),
    "one giant": torch.cat([torch.tensor([1e6]), torch.linspace(0.5, 1, 36)]),
    "exact zeros": torch.cat([torch.linspace(0.5, 1, 30), torch.zeros(7)]),
    "rank 1": torch.cat([torch.tensor([0.7]), torch.zeros(36)]),
}


@pytest.mark.parametrize("shape", [(37, 37), (37, 101), (101, 37)])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_exact_path_is_right_on_adversarial_spectra(name, shape):
    sigma = ADVERSARIAL[name].double()
    M, _ = _with_spectrum(sigma, *shape)
    U = torch.linalg.qr(gaussian(shape[0], 37, seed=0)).Q
    V = torch.linalg.qr(gaussian(shape[1], 37, seed=1)).Q
    expected = (U * (sigma > 0)) @ V.T
    torch.testing.assert_close(msign(M), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 37), (37, 149), (149, 37)])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_iteration_stays_bounded_on_adversarial_spectra(name, shape, dtype):
    M, _ = _with_spectrum(ADVERSARIAL[name], *shape)
    S = torch.linalg.svdvals(msign(M.to(dtype)).double())
    assert S.max() < (1 + 1e-3 if dtype == torch.float32 else 1.15)


def test_float32_reaches_1e_3_for_values_down_to_1e_3():
    for shape in ((128, 128), (64, 256), (256, 64)):
        M, sign = _with_spectrum(_log_uniform(min(shape), 1e-3), *shape)
        assert _frobenius_error(msign(M.float()), sign) < 1e-3


def _four_spectra(r):
    i = torch.arange(1, r + 1)
    return {
        "gaussian": None,
        "log uniform": _log_uniform(r, 1e-3),
        "power law": 1 / i.double(),
        "heavy tail": torch.where(i <= r // 16, 1.0, 1e-2),
    }


@pytest.mark.parametrize("shape", [(128, 128), (96, 384), (384, 96)])
@pytest.mark.parametrize("name", _four_spectra(16))
def test_bfloat16_error_is_below_that_of_five_steps_of_torch(name, shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    sigma = _four_spectra(min(shape))[name]
    if sigma is None:
        M = gaussian(*shape)
        sign = msign(M)
    else:
        M, sign = _with_spectrum(sigma, *shape)
    theirs = _zeropower_via_newtonschulz(M.float(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert _frobenius_error(msign(M.bfloat16()), sign) < 0.95 * _frobenius_error(theirs, sign)


@pytest.mark.parametrize(("steps", "expected"), [(5, 0.084), (6, 9.6e-4), (7, 2.8e-6)])
def test_polar_express_reaches_the_recorded_errors_on_a_rectangular_gaussian(steps, expected):
    errors = []
    for seed in range(3):
        M = gaussian(256, 1024, seed=seed)
        sign = msign(M)
        errors.append(_frobenius_error(msign(M, method="polar_express", steps=steps), sign))
    assert np.median(errors) == pytest.approx(expected, rel=0.15)


def test_polar_express_beats_jordan_from_five_steps_on_and_not_before():
    M = gaussian(256, 1024, dtype=torch.float32)
    sign = msign(M.double())

    def error(name, steps):
        return _frobenius_error(msign(M, method=name, steps=steps), sign)

    for steps in (2, 3, 4):
        assert error("polar_express", steps) > error("jordan", steps)
    for steps in (5, 6):
        assert error("polar_express", steps) < error("jordan", steps)


def test_jordan_never_converges_but_stays_in_its_limit_set():
    X = msign(gaussian(31, 97), method="jordan", steps=40)
    S = torch.linalg.svdvals(X)
    assert S.min() > 0.6818
    assert S.max() < 1.1344
    assert S.max() - S.min() > 0.1


def test_more_steps_by_lower_reach_smaller_values():
    sigma = _log_uniform(61, 1e-5)
    M, sign = _with_spectrum(sigma, 61, 89)
    assert _frobenius_error(msign(M, method="designed", lower=1e-6), sign) < 1e-9
    assert _frobenius_error(msign(M, method="designed", steps=3), sign) > 0.3


def test_step_count_follows_the_flatness_of_the_spectrum():
    flat, steep = (
        gaussian(256, 256, dtype=torch.bfloat16),
        _with_spectrum(1 / torch.arange(1, 257), 256, 256)[0].bfloat16(),
    )
    five, four = default_compositions(torch.bfloat16)
    for M, taken in ((flat, four), (steep, five)):
        assert torch.equal(msign(M), orthogonalize(M[None], taken)[0])


def test_many_steps_on_the_gram_side_do_not_blow_up_null_directions():
    M = (gaussian(31, 7) @ gaussian(7, 97, seed=1)).float()
    S = torch.linalg.svdvals(msign(M, method="designed", lower=1e-7))
    assert (S[:7] - 1).abs().max() < 1e-4
    assert S.max() < 1.001
    blown = orthogonalize(M[None], optimal_composition(1e-7, 20), gram_steps=19)
    assert not torch.linalg.svdvals(blown.nan_to_num(1e9))[0].max() < 1.001


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3), (0, 3, 3)])
def test_empty_matrices_come_back_empty(shape):
    assert msign(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (5, 5), (2, 3, 5), (1, 1), (1, 5)])
@pytest.mark.parametrize("method", ["svd", "designed"])
def test_gradient_is_the_gradient_of_the_exact_sign(shape, method):
    M = gaussian(*shape).requires_grad_()
    f = (lambda M: msign(M)) if method == "svd" else (lambda M: msign(M, method="designed", lower=1e-3))
    assert torch.autograd.gradcheck(f, (M,), eps=1e-6, atol=1e-6)


def test_gradient_at_a_rank_deficient_matrix_is_right_along_changes_that_keep_the_rank():
    L, R = gaussian(7, 3), gaussian(3, 11, seed=1)
    dL, dR = gaussian(7, 3, seed=2), gaussian(3, 11, seed=3)
    G = gaussian(7, 11, seed=4)
    M = (L @ R).requires_grad_()
    (msign(M) * G).sum().backward()
    h = 1e-6
    difference = (msign((L + h * dL) @ (R + h * dR)) - msign((L - h * dL) @ (R - h * dR))) / (2 * h)
    slope = (M.grad * (dL @ R + L @ dR)).sum()
    assert slope.item() == pytest.approx((difference * G).sum().item(), rel=1e-6)


def test_gradient_is_orthogonal_to_the_matrix_because_scale_does_not_matter():
    M = gaussian(5, 9).requires_grad_()
    (msign(M) * gaussian(5, 9, seed=1)).sum().backward()
    assert abs((M.grad * M).sum().item()) < 1e-12
    assert M.grad.norm() > 0.1


def test_gradient_in_float32_agrees_with_float64():
    G = gaussian(11, 23, seed=1)
    grads = []
    for dtype in (torch.float64, torch.float32):
        M = (gaussian(11, 23) * 1e-12).to(dtype).requires_grad_()
        (msign(M) * G.to(dtype)).sum().backward()
        grads.append(M.grad.double())
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[0].norm()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(7, 7), (13, 7), (7, 13)])
def test_polar_factors_are_those_of_scipy(shape, side):
    M = gaussian(*shape)
    U, P = polar(M, side=side)
    theirs_u, theirs_p = scipy.linalg.polar(M.numpy(), side=side)
    np.testing.assert_allclose(U.numpy(), theirs_u, atol=1e-12)
    np.testing.assert_allclose(P.numpy(), theirs_p, atol=1e-12)
    torch.testing.assert_close(U @ P if side == "right" else P @ U, M, rtol=0, atol=1e-12)


M23 = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: msign([[1.0]]), TypeError, "M must be a torch.Tensor, got list"),
        (lambda: msign(torch.ones(2, 2, dtype=torch.int64)), TypeError, "M must have a real floating dtype"),
        (lambda: msign(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "torch.complex64"),
        (lambda: msign(torch.ones(3)), ValueError, "M must have at least 2 dimensions"),
        (lambda: msign(torch.tensor([[math.nan, 1.0]])), ValueError, "M must be finite"),
        (lambda: msign(torch.tensor([[math.inf, 1.0]])), ValueError, "M must be finite"),
        (lambda: msign(M23, method="polar_expres"), ValueError, "did you mean 'polar_express'"),
        (lambda: msign(M23, steps=0), ValueError, "steps must be an integer of at least 1"),
        (lambda: msign(M23, steps="many"), TypeError, "steps must be an integer"),
        (lambda: msign(M23, lower=0.0), ValueError, r"lower must be in \(0, 1\)"),
        (lambda: msign(M23, method="svd", steps=3), ValueError, "steps and lower must be left out"),
        (lambda: msign(M23, method="jordan", lower=0.1), ValueError, "lower must be left out when method is 'jordan'"),
        (lambda: msign(M23, method=published("jordan"), steps=3), ValueError, "steps and lower must be left out"),
        (lambda: msign(M23, dtype=torch.int8), TypeError, "dtype must be a real floating torch.dtype"),
        (lambda: polar(M23, side="middle"), ValueError, "side must be one of 'right', 'left'"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()
