import math

import numpy as np
import pytest
import scipy.linalg.interpolative
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.linalg.lowrank import CHOOSERS, choose_columns, interpolative
from danlu.linalg.lowrank.columns import _plus_plus

D = torch.float64


def norm(M):
    return torch.linalg.matrix_norm(M)


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@given(st.sampled_from(CHOOSERS), st.integers(1, 31), st.integers(1, 31), st.data())
def test_every_chooser_returns_distinct_columns_an_identity_and_an_error_no_better_than_the_optimum(method, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    M = torch.randn(m, n, dtype=D, generator=generator)
    f = interpolative(M, rank, method=method, generator=generator)
    assert len(set(f.columns.tolist())) == rank
    assert torch.equal(f.C, M[:, f.columns])
    assert torch.equal(f.Z[:, f.columns], torch.eye(rank, dtype=D))
    optimum = torch.linalg.svdvals(M)[rank:].square().sum().sqrt()
    assert float(norm(M - f.reconstruct())) >= float(optimum) * (1 - 1e-10) - 1e-10


@pytest.mark.parametrize("method", CHOOSERS)
def test_a_batch_gives_each_matrix_its_own_columns(method, low_rank, generator):
    M = low_rank(17, 13, 3, batch=(2, 5))
    f = interpolative(M, 3, method=method, generator=generator)
    assert f.columns.shape == (2, 5, 3)
    assert f.error.shape == (2, 5)
    if method not in ("leverage", "norm"):  # which may take near-duplicates
        assert relative(f.reconstruct(), M) < 1e-8
    assert torch.equal(f.C[1, 4], M[1, 4][:, f.columns[1, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_layout_and_dtype_do_not_matter(dtype, layout, low_rank):
    M = low_rank(23, 19, 4).to(dtype)
    view = {"contiguous": M, "transposed": M.mT.contiguous().mT, "strided": M.repeat_interleave(2, 1)[:, ::2]}[layout]
    kept = view.clone()
    f = interpolative(view, 4, generator=torch.Generator().manual_seed(0))
    g = interpolative(M, 4, generator=torch.Generator().manual_seed(0))
    assert f.Z.dtype == dtype
    assert f.columns.tolist() == g.columns.tolist()
    assert relative(f.reconstruct(), M) < 1e3 * torch.finfo(dtype).eps
    assert torch.equal(view, kept)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_vectors_are_matrices_too(shape, generator):
    M = torch.randn(shape, dtype=D, generator=generator)
    assert relative(interpolative(M, 1, generator=generator).reconstruct(), M) < 1e-14


def test_coefficients_are_those_of_the_pseudo_inverse(generator):
    M = torch.randn(31, 23, dtype=D, generator=generator)
    f = interpolative(M, 7, generator=generator)
    assert relative(f.Z, torch.linalg.pinv(f.C) @ M) < 1e-12


def test_pivoted_qr_gives_the_coefficients_r11_inverse_r12(make):
    M = make(31, 23, 0.8 ** torch.arange(23.0))
    _, R, pivots = scipy.linalg.qr(M.numpy(), pivoting=True, mode="economic")
    f = interpolative(M, 7, method="cpqr")
    assert f.columns.tolist() == pivots[:7].tolist()
    Z = np.empty((7, 23))
    Z[:, pivots] = np.hstack([np.eye(7), scipy.linalg.solve_triangular(R[:7, :7], R[:7, 7:])])
    assert relative(f.Z, torch.from_numpy(Z)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_scipy_picks_the_columns_of_pivoted_qr_whether_asked_for_randomness_or_not(seed):
    M = torch.randn(61, 47, dtype=D, generator=torch.Generator().manual_seed(seed))
    ours = interpolative(M, 8, method="cpqr").columns.tolist()
    for options in ({"rand": False}, {"rand": True, "rng": 1}, {"rand": True, "rng": 2}):
        index, _ = scipy.linalg.interpolative.interp_decomp(M.numpy(), 8, **options)
        assert index[:8].tolist() == ours


def test_the_sketch_does_depend_on_its_generator_and_on_nothing_else(generator):
    M = torch.randn(61, 47, dtype=D, generator=generator)

    def picks(seed):
        return choose_columns(M, 8, generator=torch.Generator().manual_seed(seed)).tolist()

    assert picks(1) == picks(1)
    assert len({tuple(picks(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_sketch_is_as_good_as_scipy(make, ratio):
    logs: dict[str, list[float]] = {"sketch": [], "uniform": []}
    for seed in range(9):
        M = make(211, 157, ratio ** torch.arange(157.0))
        index, projection = scipy.linalg.interpolative.interp_decomp(M.numpy(), 11)
        peer = scipy.linalg.interpolative.reconstruct_matrix_from_id(M.numpy()[:, index[:11]], index, projection)
        for method, found in logs.items():
            f = interpolative(M, 11, method=method, generator=torch.Generator().manual_seed(seed))
            found.append(math.log(float(norm(M - f.reconstruct()) / norm(M - torch.from_numpy(peer)))))
    # Within 3 % on average, up to twice the standard error of nine draws; columns at random are not.
    excess = {method: np.mean(found) - 2 * np.std(found, ddof=1) / 3 for method, found in logs.items()}
    assert excess["sketch"] < math.log(1.03) < excess["uniform"]


def test_a_power_step_brings_the_sketch_nearer_to_the_optimum(make):
    errors = {0: [], 1: []}
    for seed in range(15):
        M = make(211, 157, torch.arange(1.0, 158.0) ** -0.7)
        for power, found in errors.items():
            f = interpolative(M, 11, power=power, oversample=11, generator=torch.Generator().manual_seed(seed))
            found.append(float(norm(M - f.reconstruct())))
    assert np.mean(errors[1]) < np.mean(errors[0])


@pytest.mark.parametrize("method", ["sketch", "cpqr", "uniform", "deim"])
def test_error_estimate_is_unbiased_in_the_square(method, make, generator):
    M = make(41, 29, 0.8 ** torch.arange(29.0)).expand(300, 41, 29)
    f = interpolative(M, 5, method=method, generator=generator)
    ratios = (f.error / norm(M - f.reconstruct())) ** 2
    assert float(ratios.mean()) == pytest.approx(1, abs=0.06)


def kahan(n, theta):
    s, c = math.sin(theta), math.cos(theta)
    upper = torch.triu(-c * torch.ones(n, n, dtype=D), 1) + torch.eye(n, dtype=D)
    return torch.diag(s ** torch.arange(n, dtype=D)) @ upper


def test_kahan_matrix_shows_that_pivoted_qr_has_no_worst_case_guarantee():
    f = interpolative(kahan(40, 1.2), columns=torch.arange(39))
    assert float(f.Z.abs().max()) == pytest.approx(4.6e4, rel=0.02)


def test_coefficients_of_gaussian_matrices_stay_below_one(generator):
    M = torch.randn(300, 40, 60, dtype=D, generator=generator)
    largest = interpolative(M, 6, method="cpqr").Z
    off = largest.abs().masked_fill(largest == 1, 0).amax((-2, -1))
    assert float(off.median()) == pytest.approx(0.43, abs=0.02)
    assert float(off.max()) < 1


def test_dependent_columns_give_finite_minimum_norm_coefficients(low_rank):
    M = low_rank(17, 13, 2)
    f = interpolative(M, columns=torch.arange(5))
    assert torch.isfinite(f.Z).all()
    assert relative(f.reconstruct(), M) < 1e-9
    assert torch.equal(interpolative(torch.zeros(5, 4), 3).reconstruct(), torch.zeros(5, 4))


def test_leverage_scores_are_the_diagonal_of_the_hat_matrix_and_sum_to_their_number(low_rank):
    M = low_rank(19, 13, 5)
    V = torch.linalg.svd(M)[2][:5].mT
    scores = V.square().sum(-1)
    assert torch.allclose((torch.linalg.pinv(M, rtol=1e-10) @ M).diagonal(), scores, atol=1e-12)
    assert float(scores.sum()) == pytest.approx(5, abs=1e-12)
    assert choose_columns(M, 3, method="leverage", dominant=5).tolist() == scores.topk(3).indices.tolist()


def test_random_leverage_draws_each_column_in_proportion(make):
    M = make(23, 7, torch.tensor([3.0, 1.0, 0.5]))
    V = torch.linalg.svd(M)[2][:2].mT
    draws = choose_columns(
        M.expand(20_000, 23, 7), 1, method="leverage_random", dominant=2, generator=torch.Generator().manual_seed(0)
    )
    frequency = torch.bincount(draws[:, 0], minlength=7) / 20_000
    assert torch.allclose(frequency.double(), V.square().sum(-1) / 2, atol=0.015)


def test_kmeans_takes_one_column_of_each_cluster(generator):
    centres = 10 * torch.randn(20, 5, dtype=D, generator=generator)
    label = torch.arange(5).repeat(11)
    M = centres[:, label] + 0.1 * torch.randn(20, 55, dtype=D, generator=generator)
    assert sorted(label[choose_columns(M, 5, method="kmeans", generator=generator)].tolist()) == [0, 1, 2, 3, 4]


def test_uniform_sampling_breaks_on_uneven_columns_where_the_sketch_does_not(generator):
    M = torch.randn(97, 83, dtype=D, generator=generator) * torch.exp(2 * torch.randn(83, dtype=D, generator=generator))
    best = torch.linalg.svdvals(M)[6:].norm()
    sketch, sample = (
        np.median([float(norm(M - interpolative(M, 6, method=x, generator=generator).reconstruct())) for _ in range(9)])
        for x in ("sketch", "sample")
    )
    assert sketch < 1.3 * best
    assert sample > 1.5 * sketch


def test_bad_input_is_named():
    M = torch.ones(3, 5)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 4"):
        interpolative(M, 4)
    with pytest.raises(ValueError, match="rank must be given, or columns"):
        interpolative(M)
    with pytest.raises(TypeError, match=r"rank must be an integer, got 1\.0"):
        interpolative(M, 1.0)
    with pytest.raises(ValueError, match=r"method must be one of .* did you mean 'sketch'"):
        interpolative(M, 1, method="skech")
    with pytest.raises(ValueError, match="oversample must be an integer of at least 2, got 1"):
        interpolative(M, 2, oversample=1)
    with pytest.raises(ValueError, match="dominant must equal rank for 'deim'"):
        interpolative(M, 2, method="deim", dominant=1)
    with pytest.raises(TypeError, match=r"M must be float32 or float64, got torch\.int64"):
        interpolative(M.long(), 1)
    with pytest.raises(ValueError, match="M must have at least 2 dimensions"):
        interpolative(M[0], 1)
    with pytest.raises(ValueError, match="columns must not repeat an index"):
        interpolative(M, columns=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"columns must lie in \[0, 4\]"):
        interpolative(M, columns=torch.tensor([5]))
    with pytest.raises(TypeError, match="columns must be a tensor of integer indices"):
        interpolative(M, columns=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="columns must have the leading dimensions"):
        interpolative(M, columns=torch.tensor([[1], [2]]))


@pytest.mark.parametrize("method", CHOOSERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_nan_or_infinity_is_rejected_by_every_chooser(method, value):
    M = torch.rand(19, 17, generator=torch.Generator().manual_seed(0))
    M[13, 11] = value
    with pytest.raises(ValueError, match="M must be finite, but it holds NaN or Inf"):
        interpolative(M, 2, method=method)


@pytest.mark.parametrize("seed", range(3))
def test_seeds_of_kmeans_are_drawn_far_from_all_before_them(seed):
    points = 10 * torch.eye(11, dtype=D).repeat(4, 1)
    generator = torch.Generator().manual_seed(seed)
    assert sorted((_plus_plus(points, 11, generator) % 11).tolist()) == list(range(11))
