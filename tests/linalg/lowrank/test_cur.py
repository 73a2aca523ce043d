import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.linalg.lowrank import CHOOSERS, choose_columns, cur, interpolative

D = torch.float64


def norm(M):
    return torch.linalg.matrix_norm(M)


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", CHOOSERS)
def test_optimum_then_interpolative_then_cur_is_the_order_of_the_errors(method, make, generator):
    M = make(61, 47, 0.8 ** torch.arange(47.0))
    f = cur(M, 7, method=method, generator=generator)
    one_sided = norm(M - interpolative(M, columns=f.columns).reconstruct())
    other_side = norm(M - interpolative(M.mT, columns=f.rows).reconstruct().mT)
    two_sided = norm(M - f.reconstruct())
    assert norm(torch.linalg.svdvals(M)[7:, None]) <= one_sided <= two_sided <= one_sided + other_side


def test_no_perturbed_middle_factor_is_better_than_the_optimal_one(generator):
    M = torch.randn(23, 19, dtype=D, generator=generator)
    f = cur(M, 4, generator=generator)
    best = norm(M - f.C @ f.U @ f.R)
    assert relative(f.C @ f.U @ f.R, f.reconstruct()) < 1e-12
    size = f.U.abs().max()
    noise = torch.randn(2000, 4, 4, dtype=D, generator=generator)
    scale = 10 ** torch.empty(2000, 1, 1, dtype=D).uniform_(-5, 0, generator=generator)
    assert (norm(M - f.C @ (f.U + size * scale * noise) @ f.R) > best).all()


def test_optimal_core_is_c_plus_m_r_plus(generator):
    M = torch.randn(23, 19, dtype=D, generator=generator)
    f = cur(M, 4, generator=generator)
    assert relative(f.U, torch.linalg.pinv(f.C) @ M @ torch.linalg.pinv(f.R)) < 1e-12


@pytest.mark.parametrize(("c", "r"), [(5, 5), (3, 7), (7, 3)])
def test_intersection_core_is_the_pseudo_inverse_of_the_block(c, r, generator):
    M = torch.randn(23, 19, dtype=D, generator=generator)
    columns, rows = torch.randperm(19, generator=generator)[:c], torch.randperm(23, generator=generator)[:r]
    f = cur(M, columns=columns, rows=rows, core="intersection")
    assert relative(f.U, torch.linalg.pinv(M[rows][:, columns])) < 1e-11
    assert relative(f.C @ f.U @ f.R, f.reconstruct()) < 1e-11


def test_intersection_reproduces_the_chosen_rows_and_columns(generator):
    M = torch.randn(31, 23, dtype=D, generator=generator)
    f = cur(M, 6, core="intersection", method="cpqr")
    again = f.reconstruct()
    assert relative(again[:, f.columns], f.C) < 1e-12
    assert relative(again[f.rows], f.R) < 1e-12


def test_intersection_completes_a_block_by_c_a_inverse_b(generator):
    M = torch.randn(9, 8, dtype=D, generator=generator)
    A, B, C = M[:3, :3], M[:3, 3:], M[3:, :3]
    f = cur(M, columns=torch.arange(3), rows=torch.arange(3), core="intersection")
    assert relative(f.reconstruct()[3:, 3:], C @ torch.linalg.solve(A, B)) < 1e-11


@given(st.integers(1, 6), st.integers(6, 40), st.integers(6, 40), st.integers(0, 99))
def test_cur_of_a_matrix_of_that_rank_is_exact_with_either_core(r, m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(m, r, dtype=D, generator=generator) @ torch.randn(r, n, dtype=D, generator=generator)
    assert relative(cur(M, r, generator=generator).reconstruct(), M) < 1e-12
    assert relative(cur(M, r, core="intersection", generator=generator).reconstruct(), M) < 1e-11


def test_more_indices_than_the_rank_stay_exact(low_rank, generator):
    M = low_rank(23, 19, 3)
    for core in ("optimal", "intersection"):
        assert relative(cur(M, 8, core=core, generator=generator).reconstruct(), M) < 1e-10


def test_an_exactly_singular_intersection_is_survived():
    M = torch.zeros(6, 5, dtype=D)
    M[:3, :2], M[3:, 2:] = 1.0, torch.arange(9.0, dtype=D).view(3, 3)
    # The block of these rows and columns is zero: a solve with it raises.
    f = cur(M, columns=torch.tensor([0, 1]), rows=torch.tensor([3, 4]), core="intersection")
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.inv(M[3:5, :2])
    assert torch.isfinite(f.reconstruct()).all()


@pytest.mark.parametrize("r", [4, 8, 12])
@pytest.mark.parametrize("shape", ["exp", "power", "gaussian", "clusters"])
def test_deim_never_violates_its_spectral_bound(r, shape, make, generator):
    i = torch.arange(83, dtype=D)
    M = {
        "exp": lambda: make(101, 83, 0.8**i),
        "power": lambda: make(101, 83, 1 / (i + 1)),
        "gaussian": lambda: torch.randn(101, 83, dtype=D, generator=generator),
        "clusters": lambda: (
            torch.randn(101, 5, dtype=D, generator=generator).repeat_interleave(17, 1)[:, :83]
            + 0.05 * torch.randn(101, 83, dtype=D, generator=generator)
        ),
    }[shape]()
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    f = cur(M, r, method="deim")
    eta = [1 / float(torch.linalg.svdvals(block)[-1]) for block in (U[f.rows, :r], Vh[:r].mT[f.columns])]
    error = float(torch.linalg.matrix_norm(M - f.reconstruct(), 2))
    assert float(s[r]) <= error <= sum(eta) * float(s[r])


def cauchy(m=300, n=200):
    x, y = torch.linspace(0, 1, n, dtype=D), torch.linspace(1.5, 2.5, m, dtype=D)
    return 1 / (y[:, None] - x)


def test_chained_pseudo_inverses_fail_on_a_smooth_kernel_where_this_does_not():
    M = cauchy()
    optimum = float(torch.linalg.svdvals(M)[8:].norm())
    columns = choose_columns(M, 8, method="leverage")
    rows = choose_columns(M.mT, 8, method="leverage")
    C, R = M[:, columns], M[rows]
    assert torch.linalg.cond(C) > 1e9
    tiny = 1e-300
    chained = C @ torch.linalg.pinv(C, rtol=tiny) @ M @ torch.linalg.pinv(R, rtol=tiny) @ R
    ours = float(norm(M - cur(M, columns=columns, rows=rows).reconstruct()))
    assert float(norm(M - chained)) > 1e3 * ours
    for method in ("cpqr", "deim", "sketch"):
        f = cur(M, 8, method=method, generator=torch.Generator().manual_seed(0))
        assert float(norm(M - f.reconstruct())) < 6 * optimum


def test_rows_and_columns_of_a_batch_are_chosen_matrix_by_matrix(low_rank, generator):
    M = low_rank(17, 13, 3, batch=(2, 5))
    for core in ("optimal", "intersection"):
        f = cur(M, 3, core=core, generator=generator)
        assert f.rows.shape == f.columns.shape == (2, 5, 3)
        assert relative(f.reconstruct().reshape(-1, 13), M.reshape(-1, 13)) < 1e-9


@pytest.mark.parametrize("core", ["optimal", "intersection"])
def test_error_estimate_is_unbiased_in_the_square(core, make, generator):
    M = make(41, 29, 0.8 ** torch.arange(29.0)).expand(300, 41, 29)
    f = cur(M, 5, core=core, generator=generator)
    ratios = (f.error / norm(M - f.reconstruct())) ** 2
    assert float(ratios.mean()) == pytest.approx(1, abs=0.06)


def test_one_side_may_be_given(generator):
    M = torch.randn(17, 13, dtype=D, generator=generator)
    f = cur(M, 3, columns=torch.tensor([4, 1, 0]), generator=generator)
    assert f.columns.tolist() == [4, 1, 0]
    g = cur(M, 3, rows=torch.tensor([4, 1, 0]), method="cpqr")
    assert g.rows.tolist() == [4, 1, 0]
    assert g.columns.tolist() == choose_columns(M, 3, method="cpqr").tolist()


def test_bad_input_is_named():
    M = torch.ones(3, 5)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 4"):
        cur(M, 4)
    with pytest.raises(ValueError, match="rank must be given, or both columns and rows"):
        cur(M, columns=torch.tensor([0]))
    with pytest.raises(ValueError, match="rank must be left out or equal the 1 columns given, got 2"):
        cur(M, 2, columns=torch.tensor([0]))
    with pytest.raises(ValueError, match="core must be one of 'optimal', 'intersection'"):
        cur(M, 1, core="cross")
    with pytest.raises(ValueError, match="rows must not repeat an index"):
        cur(M, 2, rows=torch.tensor([0, 0]))
    with pytest.raises(TypeError, match=r"M must be float32 or float64, got torch\.complex64"):
        cur(M.to(torch.complex64), 1)
    for core in ("optimal", "intersection"):
        with pytest.raises(ValueError, match="M must be finite"):
            cur(M * math.nan, 1, core=core)
    assert np.isfinite(float(cur(M, 1).error))
