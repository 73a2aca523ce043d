"""Low rank: the published comparison of choosers, CUR cores, sampled products, the pseudo-inverse iteration."""

from functools import cache

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, relative
from danlu.linalg.lowrank import (
    anncur,
    choose_columns,
    cr,
    cr_variance,
    cur,
    interpolative,
    iterative_pinv,
    nystrom,
    svd,
)

_MATRICES = 12


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _exponential() -> Tensor:
    """Twelve 300 x 200 matrices with singular values 0.8^i."""
    generator = _generator()
    left = torch.linalg.qr(torch.randn(_MATRICES, 300, 200, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(_MATRICES, 200, 200, dtype=torch.float64, generator=generator))[0]
    matrices: Tensor = (left * 0.8 ** torch.arange(200, dtype=torch.float64)) @ right.mT
    return matrices


def _optimum(M: Tensor, rank: int) -> Tensor:
    return svd(M, rank, method="exact").error


def _interpolative_ratio(method: str) -> float:
    """Median error of C C⁺ M over the optimum at rank 12."""
    M = _exponential()
    errors = torch.linalg.matrix_norm(M - interpolative(M, 12, method=method, generator=_generator()).reconstruct())
    return float((errors / _optimum(M, 12)).median())


def _cur_ratio(core: str) -> float:
    """Median error of CUR over the optimum at rank 12, columns and rows drawn uniformly."""
    M = _exponential()
    errors = torch.linalg.matrix_norm(M - cur(M, 12, method="uniform", core=core, generator=_generator()).reconstruct())
    return float((errors / _optimum(M, 12)).median())


def _cluster_ratio(method: str) -> float:
    """Median error of C C⁺ M over the optimum for columns in 12 tight clusters."""
    generator = _generator()
    label = torch.randint(12, (_MATRICES, 1, 200), generator=generator).expand(-1, 300, -1)
    centres = torch.randn(_MATRICES, 300, 12, dtype=torch.float64, generator=generator)
    noise = torch.randn(_MATRICES, 300, 200, dtype=torch.float64, generator=generator)
    M = centres.gather(-1, label) + 0.05 * noise
    errors = torch.linalg.matrix_norm(M - interpolative(M, 12, method=method).reconstruct())
    return float((errors / _optimum(M, 12)).median())


def _cauchy_error(*, chained: bool) -> float:
    """Error over the optimum on a Cauchy kernel with the columns and rows of largest leverage, rank 8."""
    x, y = torch.linspace(0, 1, 200, dtype=torch.float64), torch.linspace(1.5, 2.5, 300, dtype=torch.float64)
    M = 1 / (y[:, None] - x)
    columns, rows = choose_columns(M, 8, method="leverage"), choose_columns(M.mT, 8, method="leverage")
    if chained:
        C, R = M[:, columns], M[rows]
        approximation = C @ torch.linalg.pinv(C, rtol=1e-300) @ M @ torch.linalg.pinv(R, rtol=1e-300) @ R
    else:
        approximation = cur(M, columns=columns, rows=rows).reconstruct()
    return float(torch.linalg.matrix_norm(M - approximation) / _optimum(M, 8))


def _cur_on_exact_rank(*, transposed: bool) -> float:
    """Relative error of the intersection core on a matrix of rank 12; the control transposes U."""
    generator = _generator()
    M = torch.randn(300, 12, dtype=torch.float64, generator=generator)
    M = M @ torch.randn(12, 200, dtype=torch.float64, generator=generator)
    f = cur(M, 12, core="intersection", generator=generator)
    approximation = f.C @ f.U.mT @ f.R if transposed else f.reconstruct()
    return float((M - approximation).norm() / M.norm())


def _deim_over_bound(*, bare: bool) -> float:
    """Largest ratio of the spectral error to Sorensen and Embree's bound; the control bounds by σ_{r+1} alone."""
    M = _exponential()
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    f = cur(M, 12, method="deim")
    eta: Tensor | float = 1.0
    if not bare:
        blocks = (
            torch.take_along_dim(U[..., :12], f.rows.unsqueeze(-1), dim=-2),
            torch.take_along_dim(Vh.mT[..., :12], f.columns.unsqueeze(-1), dim=-2),
        )
        eta = sum((1 / torch.linalg.svdvals(block)[..., -1] for block in blocks), torch.zeros(_MATRICES))
    errors = torch.linalg.matrix_norm(M - f.reconstruct(), 2)
    return float((errors / (eta * S[..., 12])).max())


def _sampling_error(method: str) -> float:
    """Mean squared error of 5000 sampled products over the formula for the best probabilities."""
    generator = _generator()
    X = torch.randn(15, 50, dtype=torch.float64, generator=generator)
    X = X * torch.rand(50, dtype=torch.float64, generator=generator).log().abs()
    Y = torch.randn(50, 10, dtype=torch.float64, generator=generator)
    f = cr(X.expand(5_000, 15, 50), Y.expand(5_000, 50, 10), 8, method=method, generator=generator)
    return float((X @ Y - f.reconstruct()).square().sum((-2, -1)).mean() / cr_variance(X, Y, 8))


def _pinv_error(method: str) -> float:
    """Relative error of seven steps of an iterative pseudo-inverse of a 64 x 64 matrix of condition 539."""
    generator = _generator()
    U = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0]
    A = (U * torch.logspace(0, -torch.tensor(539.0).log10().item(), 64, dtype=torch.float64)) @ V.mT
    exact = torch.linalg.pinv(A)
    return float((iterative_pinv(A, method=method, condition=600.0, steps=7) - exact).norm() / exact.norm())


def _nystrom_ratio(method: str) -> float:
    """Median trace error at 15 landmarks over that of the best rank 15, on uneven clusters."""
    generator = _generator()
    near = 0.05 * torch.randn(190, 2, dtype=torch.float64, generator=generator)
    x = torch.cat([near, 5 * torch.randn(10, 2, dtype=torch.float64, generator=generator)])
    K = torch.exp(-torch.cdist(x, x).square())
    best = torch.linalg.eigvalsh(K)[:-15].sum()
    return float(nystrom(K.expand(20, 200, 200), 15, method=method, generator=generator).error.median() / best)


def _completion_error(*, weights: bool) -> float:
    """Relative error of completed scores of new queries, rank 5; the control scores with the raw anchor rows."""
    generator = _generator()
    S = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    S = S @ torch.randn(5, 300, dtype=torch.float64, generator=generator)
    index = anncur(S[:20], 5, generator=generator)
    asked = S[20:, index.items]
    completed = index.complete(asked) if weights else asked @ S[:5]
    return float((completed - S[20:]).norm() / S[20:].norm())


_COMPARISON = "comparison of choosers on 300 x 200 matrices with singular values 0.8^i at rank 12"

CLAIMS = (
    Claim(
        name="pivoted-qr",
        statement="error over the optimum, columns by pivoted QR, 0.8^i, rank 12; control: columns at random",
        source=_COMPARISON,
        expected=1.38,
        tolerance=relative(0.06),
        measure=lambda: _interpolative_ratio("cpqr"),
        control=lambda: _interpolative_ratio("uniform"),
        seconds=1,
    ),
    Claim(
        name="uniform",
        statement="error over the optimum, columns at random, 0.8^i, rank 12; control: columns by the default sketch",
        source=_COMPARISON,
        expected=2.48,
        tolerance=relative(0.1),
        measure=lambda: _interpolative_ratio("uniform"),
        control=lambda: _interpolative_ratio("sketch"),
        seconds=1,
    ),
    Claim(
        name="optimal-core",
        statement="CUR error over the optimum, uniform rows and columns, optimal core; control: intersection core",
        source=_COMPARISON,
        expected=3.33,
        tolerance=relative(0.15),
        measure=lambda: _cur_ratio("optimal"),
        control=lambda: _cur_ratio("intersection"),
        seconds=1,
    ),
    Claim(
        name="near-duplicates",
        statement="error over the optimum on clustered columns is small for pivoted QR; control: top leverage",
        source="derivation: a centre seen through one noisy column doubles the variance, sqrt(2) of the optimum",
        expected=1.42,
        tolerance=at_most(),
        measure=lambda: _cluster_ratio("cpqr"),
        control=lambda: _cluster_ratio("leverage"),
        seconds=1,
    ),
    Claim(
        name="no-chained-inverses",
        statement="CUR error over the optimum on a Cauchy kernel, leverage columns, by QR; control: chained pinvs",
        source="7.0e3 by QR against 1.1e13 by pseudo-inverses on such a kernel with condition 3e12",
        expected=2e4,
        tolerance=at_most(),
        measure=lambda: _cauchy_error(chained=False),
        control=lambda: _cauchy_error(chained=True),
        seconds=0.3,
    ),
    Claim(
        name="exact-on-low-rank",
        statement="relative error of the intersection CUR of a matrix of rank 12; control: its core transposed",
        source="Goreinov, Tyrtyshnikov and Zamarashkin 1997: exact where the block has the matrix's rank",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _cur_on_exact_rank(transposed=False),
        control=lambda: _cur_on_exact_rank(transposed=True),
        seconds=0.1,
    ),
    Claim(
        name="deim-bound",
        statement="largest spectral error of DEIM CUR over (η_p + η_q) σ_{r+1}; control: over σ_{r+1}",
        source="Sorensen and Embree, arXiv 1407.5516, theorem 4.1",
        expected=1.0,
        tolerance=at_most(),
        measure=lambda: _deim_over_bound(bare=False),
        control=lambda: _deim_over_bound(bare=True),
        seconds=1.5,
    ),
    Claim(
        name="sampled-product",
        statement="mean squared error of 5000 sampled products over (Z² - ‖XY‖²)/r; control: uniform sampling",
        source="Drineas, Kannan and Mahoney 2006, lemma 4",
        expected=1.0,
        tolerance=relative(0.03),
        measure=lambda: _sampling_error("sampled"),
        control=lambda: _sampling_error("uniform"),
        seconds=1,
    ),
    Claim(
        name="iterative-inverse",
        statement="relative error of seven quartic steps at condition 539; control: Nyströmformer's quartic",
        source="derivation: Chebyshev's T4 multiplies a small eigenvalue by 16 a step, Nyströmformer's by 3.25",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _pinv_error("chebyshev"),
        control=lambda: _pinv_error("nystromformer"),
        seconds=0.1,
    ),
    Claim(
        name="random-pivots",
        statement="trace error of Nyström over the best of that rank, uneven clusters; control: uniform landmarks",
        source="Chen, Epperly, Tropp and Webber, arXiv 2207.06503: near-optimal where uniform landmarks miss outliers",
        expected=3.0,
        tolerance=at_most(),
        measure=lambda: _nystrom_ratio("random_cholesky"),
        control=lambda: _nystrom_ratio("uniform"),
        seconds=0.3,
    ),
    Claim(
        name="score-completion",
        statement="relative error of scores completed from five anchors, rank 5; control: raw anchor scores",
        source="Yadav et al., arXiv 2210.12579, section 3: exact where the anchors have the matrix's rank",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _completion_error(weights=True),
        control=lambda: _completion_error(weights=False),
        seconds=0.1,
    ),
)
