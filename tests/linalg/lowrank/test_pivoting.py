import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.linalg.lowrank.pivoting import deim, pivots, residual_greedy

D = torch.float64


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_pivots_are_those_of_lapack(m, n, seed):
    M = torch.randn(m, n, dtype=D, generator=torch.Generator().manual_seed(seed))
    k = min(m, n)
    expected = scipy.linalg.qr(M.numpy(), pivoting=True, mode="r")[1][:k]
    # The last pivot of a square matrix is whatever is left; a wide one has ties of zero residual after k.
    assert pivots(M.mT, k)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("ratio", [0.8, 0.2, 0.03])
def test_pivots_follow_lapack_through_a_spectrum_that_falls_by_fourteen_orders(make, ratio):
    count = min(30, int(14 / -np.log10(ratio)))
    M = make(41, 37, torch.tensor(ratio, dtype=D) ** torch.arange(37))
    expected = scipy.linalg.qr(M.numpy(), pivoting=True, mode="r")[1][:count]
    chosen, left = pivots(M.mT, count)
    R = scipy.linalg.qr(M.numpy()[:, expected], mode="r")[0]
    ours = scipy.linalg.qr(M.numpy()[:, chosen.numpy()], mode="r")[0]
    # Equal picks, or picks of equal size where rounding decides between two columns.
    assert np.allclose(np.abs(np.diag(ours)), np.abs(np.diag(R)), rtol=1e-2, atol=1e-15)
    Q = torch.linalg.qr(M[:, chosen])[0]
    true = torch.linalg.matrix_norm(M - Q @ (Q.mT @ M))
    assert float(left) == pytest.approx(float(true), rel=1e-3, abs=2e-15)


def test_the_diagonal_of_r_bounds_what_follows_it(generator):
    M = torch.randn(30, 23, dtype=D, generator=generator)
    chosen, _ = pivots(M.mT, 23)
    R = torch.linalg.qr(M[:, chosen])[1]
    for k in range(23):
        assert (R[k, k] ** 2 >= R[k:, k:].square().cumsum(0).diagonal() - 1e-10).all()


def test_a_batch_is_pivoted_matrix_by_matrix(generator):
    M = torch.randn(2, 3, 13, 11, dtype=D, generator=generator)
    chosen, left = pivots(M, 5)
    for i in range(2):
        for j in range(3):
            one, residual = pivots(M[i, j], 5)
            assert chosen[i, j].tolist() == one.tolist()
            assert float(left[i, j]) == pytest.approx(float(residual), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_pivots_do_not_depend_on_scale(scale, generator):
    M = torch.randn(17, 13, dtype=D, generator=generator)
    chosen, left = pivots(scale * M, 6)
    expected, residual = pivots(M, 6)
    assert chosen.tolist() == expected.tolist()
    assert float(left) == pytest.approx(float(residual) * scale, rel=1e-10)


@pytest.mark.parametrize("chooser", [lambda M, r: pivots(M.mT, r)[0], residual_greedy])
def test_pivots_beyond_the_rank_are_distinct_and_finite(chooser, low_rank):
    for M in (torch.zeros(7, 5, dtype=D), torch.ones(7, 5, dtype=D), low_rank(7, 5, 2)):
        assert sorted(chooser(M, 5).tolist()) == list(range(5))


def reference_deim(V):
    chosen = [int(np.abs(V[:, 0]).argmax())]
    for k in range(1, V.shape[1]):
        c = np.linalg.solve(V[chosen, :k], V[chosen, k])
        chosen.append(int(np.abs(V[:, k] - V[:, :k] @ c).argmax()))
    return chosen


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 99))
def test_deim_is_gaussian_elimination_with_partial_pivoting(n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(n, min(n, r), dtype=D, generator=generator))[0]
    chosen = deim(V).tolist()
    assert chosen == reference_deim(V.numpy())
    assert len(set(chosen)) == len(chosen)
    assert deim(torch.stack([V, V.flip(0)]))[1].tolist() == [n - 1 - i for i in reference_deim(V.numpy())]


def test_greedy_takes_the_column_with_the_smallest_total_residual_at_every_step(make):
    M = make(19, 13, 0.7 ** torch.arange(13.0))
    chosen = residual_greedy(M, 6).tolist()
    for k in range(6):
        residuals = []
        for j in range(13):
            trial = M[:, [*chosen[:k], j]]
            Q = torch.linalg.qr(trial)[0][:, : k + 1 if j not in chosen[:k] else k]
            residuals.append(float(torch.linalg.matrix_norm(M - Q @ (Q.mT @ M))))
        assert int(np.argmin(residuals)) == chosen[k]


def test_greedy_keeps_its_digits_below_the_square_root_of_eps(make):
    M = make(41, 37, 0.2 ** torch.arange(37.0))
    chosen = residual_greedy(M, 16)
    Q = torch.linalg.qr(M[:, chosen])[0]
    optimum = 0.2**16 / (1 - 0.04) ** 0.5
    assert torch.linalg.matrix_norm(M - Q @ (Q.mT @ M)) < 5 * optimum


def test_the_greedy_choice_goes_on_where_the_gram_matrix_has_lost_its_digits():
    """All columns nearly one: what is left of them after the first step is below the rounding of their products."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.linalg.qr(torch.randn(31, 9, dtype=torch.float64, generator=generator))[0].split((1, 8), 1)
    order = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])
    M = common + 1e-9 * own * 2.0**-order
    chosen = residual_greedy(M, 8)
    for count in range(1, 7):
        Q = torch.linalg.qr(M[:, chosen[:count]])[0]
        E = M - Q @ (Q.mT @ M)
        E = E - Q @ (Q.mT @ E)
        norms = E.square().sum(0)
        left = norms > 1e-6 * norms.max()
        gain = torch.where(left, (E.mT @ E).square().sum(1) / norms, 0)
        assert gain[chosen[count]] > 0.99 * gain.max()
