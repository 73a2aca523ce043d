import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.linalg.lowrank import cur, nystrom

D = torch.float64


def kernel(n, generator, width=1.0, d=3):
    x = torch.randn(n, d, dtype=D, generator=generator)
    return torch.exp(-torch.cdist(x, x).square() / (2 * width**2))


def trace(M):
    return M.diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("method", ["random_cholesky", "cholesky", "uniform"])
def test_nystrom_is_the_intersection_cur_on_equal_rows_and_columns(method, generator):
    K = kernel(53, generator)
    f = nystrom(K, 7, method=method, generator=generator)
    g = cur(K, columns=f.landmarks, rows=f.landmarks, core="intersection")
    assert torch.allclose(f.reconstruct(), g.reconstruct(), atol=1e-9)
    assert torch.allclose(f.reconstruct()[f.landmarks], K[f.landmarks], atol=1e-12)


def test_the_error_is_the_nuclear_norm_of_what_is_left(generator):
    K = kernel(53, generator)
    f = nystrom(K, 7, generator=generator)
    E = K - f.reconstruct()
    assert float(torch.linalg.eigvalsh(E)[0]) > -1e-12
    assert float(f.error) == pytest.approx(float(torch.linalg.svdvals(E).sum()), rel=1e-10)
    assert float(torch.linalg.matrix_norm(E)) <= float(f.error)


@given(st.integers(1, 5), st.integers(5, 40), st.integers(0, 99))
def test_a_matrix_of_that_rank_is_reproduced(r, n, seed):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(n, r, dtype=D, generator=generator)
    f = nystrom(B @ B.mT, r, generator=generator)
    assert torch.allclose(f.reconstruct(), B @ B.mT, atol=1e-8 * float(B.square().sum()))
    assert len(set(f.landmarks.tolist())) == r


def test_greedy_landmarks_are_those_of_pivoted_cholesky(generator):
    K = kernel(31, generator)
    d, expected, left = K.diagonal().clone(), [], K.clone()
    for _ in range(6):
        p = int(d.argmax())
        expected.append(p)
        left = left - left[:, p, None] * left[p] / left[p, p]
        d = left.diagonal()
    assert nystrom(K, 6, method="cholesky").landmarks.tolist() == expected


def test_random_pivots_are_drawn_in_proportion_to_the_diagonal(generator):
    K = torch.diag(torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=D)).expand(20_000, 4, 4)
    first = nystrom(K, 1, generator=generator).landmarks[:, 0]
    frequency = torch.bincount(first, minlength=4) / 20_000
    assert torch.allclose(frequency, torch.tensor([0.125, 0.25, 0.625, 0.0]), atol=0.015)


def test_random_pivots_beat_uniform_landmarks_on_uneven_clusters(generator):
    x = torch.cat(
        [0.05 * torch.randn(190, 2, dtype=D, generator=generator), 5 * torch.randn(10, 2, dtype=D, generator=generator)]
    )
    K = torch.exp(-torch.cdist(x, x).square()).expand(20, 200, 200)
    random, uniform = (
        nystrom(K, 15, method=m, generator=generator).error.median() for m in ("random_cholesky", "uniform")
    )
    assert float(random) < 0.3 * float(uniform)


def test_near_duplicate_landmarks_of_a_smooth_kernel_stay_finite(generator):
    x = torch.linspace(0, 1, 200, dtype=D)
    K = torch.exp(-((x[:, None] - x) ** 2))
    landmarks = torch.arange(40)
    assert torch.linalg.cond(K[:40, :40]) > 1e15
    f = nystrom(K, landmarks=landmarks)
    inverse = torch.linalg.inv(K[:40, :40] + 1e-18 * torch.eye(40, dtype=D))
    naive = K[:, :40] @ inverse @ K[:40]
    ours = torch.linalg.matrix_norm(K - f.reconstruct())
    assert float(torch.linalg.matrix_norm(K - naive)) > 10 * float(ours)
    assert sorted(f.landmarks.tolist()) == landmarks.tolist()


def test_a_batch_and_a_product_without_the_square_matrix(generator):
    K = torch.stack([kernel(29, generator), kernel(29, generator, width=3.0)])
    f = nystrom(K, 6, generator=generator)
    assert f.factor.shape == (2, 29, 6)
    assert torch.allclose(f.error, trace(K - f.reconstruct()), atol=1e-10)
    X = torch.randn(29, 3, dtype=D, generator=generator)
    assert torch.allclose(f.matmul(X), f.reconstruct() @ X, atol=1e-10)


def test_float32_and_zero_kernels(generator):
    K = kernel(41, generator).float()
    f = nystrom(K, 40, method="cholesky")
    assert float(f.error) == pytest.approx(float(nystrom(K.double(), 40, method="cholesky").error), rel=1e-3)
    zero = nystrom(torch.zeros(5, 5), 3)
    assert torch.equal(zero.reconstruct(), torch.zeros(5, 5))
    assert len(set(zero.landmarks.tolist())) == 3


def test_bad_input_is_named(generator):
    K = kernel(9, generator)
    with pytest.raises(ValueError, match="K must be square"):
        nystrom(K[:, :5], 2)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 9, got 10"):
        nystrom(K, 10)
    with pytest.raises(ValueError, match="rank must be given, or landmarks"):
        nystrom(K)
    with pytest.raises(ValueError, match="K must be symmetric, but K - Kᵀ reaches"):
        nystrom(K + torch.triu(K, 1), 2)
    with pytest.raises(ValueError, match="K must be positive semi-definite, but its diagonal holds"):
        nystrom(-K, 2)
    with pytest.raises(ValueError, match="K must be symmetric positive semi-definite, but a Schur complement"):
        nystrom(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="K must be finite"):
        nystrom(K * math.nan, 2)
    with pytest.raises(ValueError, match="diagonal must have shape"):
        nystrom(K, 2, diagonal=torch.ones(3))
    with pytest.raises(TypeError, match="K must be float32 or float64"):
        nystrom(K.half(), 2)


@pytest.mark.parametrize("exponent", [-80, 80])
def test_a_power_of_four_on_the_matrix_is_one_of_two_on_its_factor(exponent, generator):
    X = torch.randn(23, 3, dtype=D, generator=generator)
    plain, scaled = (nystrom(c * (X @ X.mT), 7, method="cholesky") for c in (1.0, 2.0**exponent))
    assert torch.equal(plain.landmarks, scaled.landmarks)
    assert torch.equal(2.0 ** (exponent // 2) * plain.factor, scaled.factor)
