"""Low rank: the published comparison of choosers, CUR cores, sampled products, the pseudo-inverse iteration."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.linalg.lowrank import (
    anncur,
    choose_columns,
    cr,
    cr_variance,
    cur,
    interpolative,
    iterative_pinv,
    landmark_attention,
    least_squares,
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


def _deflated(M: Tensor, index: int, *, deflate: bool) -> Tensor:
    column = M[:, index] / M[:, index].norm()
    return M - torch.outer(column, column @ M) if deflate else M.index_fill(1, torch.tensor([index]), 0.0)


def _by_residual(M: Tensor, score: Callable[[Tensor], Tensor], *, deflate: bool) -> list[int]:
    """Four columns, each the one of largest score in what those before it leave."""
    chosen: list[int] = []
    for _ in range(4):
        found = score(M)
        found[chosen] = -1
        chosen.append(int(found.argmax()))
        M = _deflated(M, chosen[-1], deflate=deflate)
    return chosen


def _gain(E: Tensor) -> Tensor:
    return (E.mT @ E).square().sum(0) / E.square().sum(0).clamp(min=1e-20)


def _interpolation_points(V: Tensor, *, deflate: bool) -> list[int]:
    """DEIM by its definition: the largest entry of each vector's residual after interpolation."""
    chosen: list[int] = []
    for j in range(V.shape[1]):
        v = V[:, j]
        if chosen and deflate:
            v = v - V[:, :j] @ torch.linalg.solve(V[chosen, :j], v[chosen])
        chosen.append(int(v.abs().argmax()))
    return chosen


def _choosers_that_agree(*, deflate: bool) -> float:
    """How many choosers, of six on each of four matrices, agree with plain loops; the control never deflates."""
    agree = 0
    for seed in range(4):
        generator = _generator(seed)
        M = torch.randn(12, 9, dtype=torch.float64, generator=generator) * torch.arange(1, 10)
        K = M.mT @ M
        V = torch.linalg.svd(M).Vh[:4].mT
        leverage = V.square().sum(1)
        pairs = [
            (choose_columns(M, 4, method="cpqr"), _by_residual(M, lambda E: E.square().sum(0), deflate=deflate)),
            (choose_columns(M, 4, method="greedy"), _by_residual(M, _gain, deflate=deflate)),
            (choose_columns(M, 4, method="deim"), _interpolation_points(V, deflate=deflate)),
            (choose_columns(M, 4, method="leverage"), leverage.topk(4).indices.tolist()),
            (choose_columns(M, 4, method="norm"), M.norm(dim=0).topk(4).indices.tolist()),
            (nystrom(K, 4, method="cholesky").landmarks, _by_residual(M, lambda E: E.square().sum(0), deflate=deflate)),
        ]
        agree += sum(found.tolist() == plain for found, plain in pairs)
    return float(agree)


def _distance_from_formulas(*, through_block: bool) -> float:
    """Largest relative distance of approximations from their formulas; the control takes CUR's core from its block."""
    generator = _generator()
    M = torch.randn(9, 8, dtype=torch.float64, generator=generator)
    X, Y = M[:, :7], torch.randn(7, 6, dtype=torch.float64, generator=generator)
    columns, rows = torch.tensor([5, 0, 3]), torch.tensor([1, 7, 2])
    C, R, B = M[:, columns], M[rows], M[rows][:, columns]
    inverse = torch.linalg.pinv
    K = M @ M.mT
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    sizes = X.norm(dim=0) * Y.norm(dim=1)
    top = sizes.topk(3).indices
    terms = torch.stack([torch.outer(X[:, i], Y[i]) for i in top])
    share = torch.linalg.lstsq(terms.flatten(1).mT, (X @ Y).flatten()[:, None]).solution[:, 0]
    left, right = X[:, top], Y[top]
    full = left @ inverse(left) @ X @ Y @ inverse(right) @ right
    q, k, v = torch.randn(3, 10, 4, dtype=torch.float64, generator=generator)
    groups = [slice(0, 4), slice(4, 7), slice(7, 10)]  # ten tokens in three segments, as equal as can be
    q_mean, k_mean = (torch.stack([x[group].mean(0) for group in groups]) for x in (q / 2, k))
    near, middle, far = (torch.softmax(a @ b.mT, -1) for a, b in ((q / 2, k_mean), (q_mean, k_mean), (q_mean, k)))
    optimal = inverse(C) @ M @ inverse(R)
    nystrom_found = nystrom(K, landmarks=rows)
    pairs = [
        (interpolative(M, columns=columns).reconstruct(), C @ inverse(C) @ M),
        (cur(M, columns=columns, rows=rows).U, inverse(B) if through_block else optimal),
        (cur(M, columns=columns, rows=rows).reconstruct(), C @ optimal @ R),
        (cur(M, columns=columns, rows=rows, core="intersection").reconstruct(), C @ inverse(B) @ R),
        (cur(M, columns=columns[:2], rows=rows, core="intersection").U, inverse(B[:, :2])),
        (cur(M, columns=columns, rows=rows[:2], core="intersection").U, inverse(B[:2])),
        (svd(M, 3).reconstruct(), best),
        (svd(M, 3, method="randomized", power=30, generator=generator).reconstruct(), best),
        (svd(M, 3, method="exact").error, S[3:].norm()),
        (nystrom_found.reconstruct(), K[:, rows] @ inverse(K[rows][:, rows]) @ K[rows]),
        (nystrom_found.error, (K - K[:, rows] @ inverse(K[rows][:, rows]) @ K[rows]).trace()),
        (nystrom_found.matmul(M), K[:, rows] @ inverse(K[rows][:, rows]) @ K[rows] @ M),
        (cr(X, Y, 3).reconstruct(), left @ right),
        (cr(X, Y, 3, weights="diagonal").reconstruct(), torch.tensordot(share, terms, 1)),
        (cr(X, Y, 3, weights="full").reconstruct(), full),
        (
            cr_variance(X, Y, 2, probabilities=torch.ones(7).double()),
            (7 * sizes.square().sum() - (X @ Y).square().sum()) / 2,
        ),
        (least_squares(M, Y[:1].mT.repeat(2, 1)[:9]), inverse(M) @ Y[:1].mT.repeat(2, 1)[:9]),
        (least_squares(M.mT, Y[:6].mT.repeat(2, 1)[:8]), inverse(M.mT) @ Y[:6].mT.repeat(2, 1)[:8]),
        (iterative_pinv(M), inverse(M)),
        (iterative_pinv(M, method="nystromformer", steps=40), inverse(M)),
        (landmark_attention(q, k, v, landmarks=3, inverse="svd"), near @ inverse(middle) @ far @ v),
    ]
    return max(float((found - plain).abs().max() / plain.abs().max()) for found, plain in pairs)


def _mean_of_estimates(*, of_optimum: bool) -> float:
    """Mean square of 400 estimated errors over the squared true error; the control has the error of the best rank."""
    generator = _generator()
    M = torch.randn(40, 30, dtype=torch.float64, generator=generator)
    columns = torch.arange(12).expand(400, 12)
    estimates = interpolative(M.expand(400, 40, 30), columns=columns, generator=generator).error
    true = torch.linalg.matrix_norm(M - interpolative(M, columns=columns[0]).reconstruct())
    return float((estimates / (_optimum(M, 12) if of_optimum else true)).square().mean())


_COMPARISON = "comparison of choosers on 300 x 200 matrices with singular values 0.8^i at rank 12"

CLAIMS = (
    Claim(
        name="pivoted-qr",
        statement="error over the optimum, columns by pivoted QR, 0.8^i, rank 12; control: columns at random",
        source=_COMPARISON,
        expected=1.38,
        tolerance=relative(0.03),
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
        tolerance=relative(0.07),
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
        source="1.13e3 by QR on each machine, against 1e10 and more by pseudo-inverses, on a kernel of condition 3e12",
        expected=1.3e3,
        tolerance=at_most(),
        measure=lambda: _cauchy_error(chained=False),
        control=lambda: _cauchy_error(chained=True),
        seconds=0.3,
    ),
    Claim(
        name="choosers",
        statement="choices of columns, of 24 by pivoted QR, greedy, DEIM, leverage, norm and Cholesky, that agree with "
        "plain loops; control: loops that do not deflate",
        source="their definitions (DEIM: Sorensen and Embree, arXiv 1407.5516, algorithm 1)",
        expected=24,
        tolerance=exact(),
        measure=lambda: _choosers_that_agree(deflate=True),
        control=lambda: _choosers_that_agree(deflate=False),
        seconds=0.1,
    ),
    Claim(
        name="formulas",
        statement="largest relative distance of 21 approximations from their formulas with pseudo-inverses, 9 x 8; "
        "control: CUR's optimal core taken from the intersection",
        source="definitions: C C+ M, C+ M R+, the Nyström approximation, CR, landmark attention",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _distance_from_formulas(through_block=False),
        control=lambda: _distance_from_formulas(through_block=True),
        seconds=0.1,
    ),
    Claim(
        name="estimated-error",
        statement="mean square of 400 estimated errors over the true one; control: over the optimum",
        source="derivation: E |E^T p|^2 = |E|^2 for standard normal p",
        expected=1.0,
        tolerance=relative(0.02),
        measure=lambda: _mean_of_estimates(of_optimum=False),
        control=lambda: _mean_of_estimates(of_optimum=True),
        seconds=0.2,
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
        tolerance=relative(0.01),
        measure=lambda: _sampling_error("sampled"),
        control=lambda: _sampling_error("uniform"),
        seconds=1,
    ),
    Claim(
        name="iterative-inverse",
        statement="relative error of seven quartic steps at condition 539; control: Nyströmformer's quartic",
        source="derivation: Chebyshev's T4 multiplies a small eigenvalue by 16 a step, Nyströmformer's by 3.25",
        expected=2e-13,
        tolerance=at_most(),
        measure=lambda: _pinv_error("chebyshev"),
        control=lambda: _pinv_error("nystromformer"),
        seconds=0.1,
    ),
    Claim(
        name="random-pivots",
        statement="trace error of Nyström over the best of that rank, uneven clusters; control: uniform landmarks",
        source="Chen, Epperly, Tropp and Webber, arXiv 2207.06503: near-optimal where uniform landmarks miss outliers",
        expected=2.0,
        tolerance=at_most(),
        measure=lambda: _nystrom_ratio("random_cholesky"),
        control=lambda: _nystrom_ratio("uniform"),
        seconds=0.3,
    ),
    Claim(
        name="score-completion",
        statement="relative error of scores completed from five anchors, rank 5; control: raw anchor scores",
        source="Yadav et al., arXiv 2210.12579, section 3: exact where the anchors have the matrix's rank",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _completion_error(weights=True),
        control=lambda: _completion_error(weights=False),
        seconds=0.1,
    ),
)
