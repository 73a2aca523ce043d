"""The matrix sign: its error against published coefficient sets and against torch's own, its start and its gradient."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from danlu.approx import Composition, optimal_composition, published
from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.linalg import msign, orthogonalize, polar


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _vectors(m: int, n: int) -> tuple[Tensor, Tensor]:
    r = min(m, n)
    return torch.linalg.qr(_gaussian(m, r)).Q, torch.linalg.qr(_gaussian(n, r, seed=1)).Q


def _log_uniform(count: int) -> Tensor:
    return 10 ** (-3 * torch.rand(count, generator=torch.Generator().manual_seed(0)).double())


def _error(X: Tensor, sign: Tensor) -> float:
    return float((X.double() - sign).norm() / math.sqrt(min(sign.shape)))


def _float32_error(method: str) -> float:
    U, V = _vectors(256, 1024)
    return _error(msign(((U * _log_uniform(256)) @ V.T).float(), method=method), U @ V.T)


def _worst_ratio_to_torch(method: str) -> float:
    """Largest ratio of bfloat16 errors over four spectra: ours over five steps of torch.optim.Muon's coefficients."""
    U, V = _vectors(128, 512)
    i = torch.arange(1, 129)
    spectra = [_log_uniform(128), 1 / i.double(), torch.where(i <= 8, 1.0, 1e-2).double()]
    cases = [((U * s) @ V.T, U @ V.T) for s in spectra]
    M = _gaussian(128, 512, seed=2)
    cases.append((M, msign(M)))
    ratios = [
        _error(msign(M.bfloat16(), method=method), sign) / _error(msign(M.bfloat16(), method="jordan"), sign)
        for M, sign in cases
    ]
    return max(ratios)


def _rectangular_error(f: Composition) -> float:
    M = _gaussian(256, 1024)
    return _error(orthogonalize(M[None], f, scale="frobenius")[0], msign(M))


def _limit_error(method: str) -> float:
    S = torch.linalg.svdvals(msign(_gaussian(31, 97), method=method, steps=40))
    return float((S - 1).abs().max())


def _fitted_error(a: float, b: float, c: float) -> float:
    """Mean of (sigma - 1)^2 after three steps on a 1024 x 1024 Gaussian matrix."""
    f = replace(published("jordan", 3), coefficients=((a, b, c),) * 3)
    M = _gaussian(1024, 1024).float()
    S = torch.linalg.svdvals(orthogonalize(M[None], f, scale="frobenius")[0])
    return float((S.double() - 1).square().mean())


def _norm_of_start(scale: Literal["schatten8", "frobenius"]) -> float:
    """Schatten-8 norm of what the iteration starts from: of the result of a single step ``x -> x``."""
    same = Composition(coefficients=((1.0, 0.0, 0.0),), lower=1e-3, upper=1.0, errors=(0.999,), name="identity")
    X = orthogonalize(1e12 * _gaussian(2, 40, 60), same, scale=scale)
    return float(torch.linalg.svdvals(X).norm(8, -1).mean())


def _ways_apart(*, other_side: bool) -> float:
    """Largest distance between ways to the same polar factor, in float64; the control exchanges the sides."""
    worst = 0.0
    sigma = torch.logspace(0, -3, 6, dtype=torch.float64)
    for m, n in ((6, 9), (9, 6), (6, 6)):
        U, V = _vectors(m, n)
        M, X = (U * sigma) @ V.T, U @ V.T
        ways = [
            msign(M),
            msign(1e200 * M),
            msign(M, lower=1e-4),
            msign(M, method="designed", steps=12),
            msign(torch.stack([M, M]), method=optimal_composition(1e-4, 12))[1],
            msign(M, method="polar_express", steps=12),
            *(polar(M, side=side)[0] for side in ("right", "left")),
        ]
        worst = max(worst, *(float((way - X).abs().max()) for way in ways))
        right, left = (V * sigma) @ V.T, (U * sigma) @ U.T
        expected = (left, right) if other_side and m == n else (right, left)
        factors = (polar(M, side="right")[1], polar(M, side="left")[1])
        worst = max(worst, *(float((factor - P).abs().max()) for factor, P in zip(factors, expected)))
    return worst


def _rank(*, completed: bool) -> float:
    M = _gaussian(23, 5) @ _gaussian(5, 31, seed=1)
    if completed:
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        X = U @ Vh
    else:
        X = msign(M)
    return float((torch.linalg.svdvals(X) > 0.5).sum())


def _gradient_error(*, frozen_root: bool) -> float:
    """Error of the gradient in a random direction against central differences."""
    M, D, G = (_gaussian(7, 11, seed=s) for s in range(3))
    W = M.clone().requires_grad_()
    if frozen_root:
        # (M M^T)^{-1/2} M with the root taken as a constant.
        root = msign(M) @ torch.linalg.pinv(M)
        X = root @ W
    else:
        X = msign(W)
    (gradient,) = torch.autograd.grad((X * G).sum(), W)
    h = 1e-5
    slope = ((msign(M + h * D) - msign(M - h * D)) * G).sum() / (2 * h)
    return abs(float((gradient * D).sum() - slope))


CLAIMS = (
    Claim(
        name="float32-error",
        statement="Frobenius error over sqrt(rank), float32, 256 x 1024, log-uniform 1e-3..1; control: Jordan",
        source="design goal: the composition's error bound on [1e-3, 1] is 1.1e-9 in seven steps",
        expected=3e-4,
        tolerance=at_most(),
        measure=lambda: _float32_error("auto"),
        control=lambda: _float32_error("jordan"),
        seconds=0.6,
    ),
    Claim(
        name="below-torch",
        statement="worst ratio of bfloat16 errors to torch.optim.Muon's coefficients over four spectra; control: "
        "Polar Express from the Frobenius norm",
        source="design goal; torch.optim.Muon uses (3.4445, -4.775, 2.0315), five steps",
        expected=0.4,
        tolerance=at_most(),
        measure=lambda: _worst_ratio_to_torch("auto"),
        control=lambda: _worst_ratio_to_torch("polar_express"),
        seconds=0.5,
    ),
    Claim(
        name="polar-express-5",
        statement="relative Frobenius error of Polar Express, 5 steps, 256 x 1024 Gaussian, float64; control: "
        "the list before its safety factor",
        source="computed from the published list (arXiv 2505.16932); 0.0893 without the factor, 0.154 for Jordan's",
        expected=0.0855,
        tolerance=relative(0.01),
        measure=lambda: _rectangular_error(published("polar_express", 5)),
        control=lambda: _rectangular_error(published("polar_express_unscaled", 5)),
        seconds=1.0,
    ),
    Claim(
        name="jordan-floor",
        statement="largest |sigma - 1| after 40 of Jordan's steps: they never converge; control: Polar Express",
        source="limit set [0.6819, 1.1343] of 3.4445 x - 4.775 x^3 + 2.0315 x^5",
        expected=0.3182,
        tolerance=absolute(3e-4),
        measure=lambda: _limit_error("jordan"),
        control=lambda: _limit_error("polar_express"),
        seconds=0.1,
    ),
    Claim(
        name="fitted-1024",
        statement="mean (sigma - 1)^2 on a 1024 x 1024 Gaussian by the 3 steps fitted to it; control: Jordan's",
        source="kexue.fm 10592, table (1024, 1024, 3): 0.10257, Jordan's 0.18278",
        expected=0.10257,
        tolerance=relative(0.004),
        measure=lambda: _fitted_error(4.328, -9.666, 7.020),
        control=lambda: _fitted_error(3.4445, -4.7750, 2.0315),
        seconds=4.0,
    ),
    Claim(
        name="start",
        statement="Schatten-8 norm of what the iteration starts from; control: the Frobenius start",
        source="kexue.fm 10922: the smallest bound on sigma_1 from the Gram matrix's fourth power",
        expected=1.0,
        tolerance=relative(1e-10),
        measure=lambda: _norm_of_start("schatten8"),
        control=lambda: _norm_of_start("frobenius"),
        seconds=0.1,
    ),
    Claim(
        name="ways-agree",
        statement="largest distance of nine ways to the polar decomposition, float64, three shapes, values 1e-3..1; "
        "control: the symmetric factors of the two sides exchanged",
        source="definition: M = U P = P' U",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _ways_apart(other_side=False),
        control=lambda: _ways_apart(other_side=True),
        seconds=0.1,
    ),
    Claim(
        name="rank",
        statement="ones among the singular values of the sign of a rank-5 matrix, 23 x 31; control: U V^T of an SVD",
        source="definition: msign(M) = U_r V_r^T",
        expected=5,
        tolerance=exact(),
        measure=lambda: _rank(completed=False),
        control=lambda: _rank(completed=True),
        seconds=0.1,
    ),
    Claim(
        name="gradient",
        statement="error of the implicit gradient against central differences; control: (M M^T)^{-1/2} held constant",
        source="derivation: differentiate M = H X and solve the Sylvester equation of H",
        expected=1e-8,
        tolerance=at_most(),
        measure=lambda: _gradient_error(frozen_root=False),
        control=lambda: _gradient_error(frozen_root=True),
        seconds=0.1,
    ),
)
