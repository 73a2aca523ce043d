"""The matrix sign: its error against published coefficient sets and against torch's own, its start and its gradient."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from danlu.approx import Composition, published
from danlu.claims.frame import Claim, absolute, at_least, at_most, exact, relative
from danlu.linalg import msign, orthogonalize


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


def _share_doubled(second: Literal["schatten8", "frobenius"]) -> float:
    """Share of 100 x 100 Gaussian matrices whose smallest value after five steps doubles by the start ``second``."""
    M, f = _gaussian(200, 100, 100).float(), published("jordan")
    before = torch.linalg.svdvals(orthogonalize(M, f, scale="frobenius"))[:, -1]
    after = torch.linalg.svdvals(orthogonalize(M, f, scale=second))[:, -1]
    return float((after >= 2 * before).double().mean())


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
        expected=1e-3,
        tolerance=at_most(),
        measure=lambda: _float32_error("auto"),
        control=lambda: _float32_error("jordan"),
        seconds=0.6,
    ),
    Claim(
        name="below-torch",
        statement="worst ratio of bfloat16 errors to torch.optim.Muon's coefficients over four spectra; control: those",
        source="design goal; torch.optim.Muon uses (3.4445, -4.775, 2.0315), five steps",
        expected=0.95,
        tolerance=at_most(),
        measure=lambda: _worst_ratio_to_torch("auto"),
        control=lambda: _worst_ratio_to_torch("jordan"),
        seconds=0.5,
    ),
    Claim(
        name="polar-express-5",
        statement="relative Frobenius error of Polar Express, 5 steps, 256 x 1024 Gaussian, float64; control: Jordan",
        source="computed from the published list (arXiv 2505.16932) with its safety factor; 0.152 for Jordan's",
        expected=0.084,
        tolerance=relative(0.1),
        measure=lambda: _rectangular_error(published("polar_express", 5)),
        control=lambda: _rectangular_error(published("jordan")),
        seconds=1.0,
    ),
    Claim(
        name="jordan-floor",
        statement="largest |sigma - 1| after 40 of Jordan's steps: they never converge; control: Polar Express",
        source="limit set [0.6819, 1.1343] of 3.4445 x - 4.775 x^3 + 2.0315 x^5",
        expected=0.3182,
        tolerance=absolute(0.002),
        measure=lambda: _limit_error("jordan"),
        control=lambda: _limit_error("polar_express"),
        seconds=0.1,
    ),
    Claim(
        name="fitted-1024",
        statement="mean (sigma - 1)^2 on a 1024 x 1024 Gaussian by the 3 steps fitted to it; control: Jordan's",
        source="kexue.fm 10592, table (1024, 1024, 3): 0.10257, Jordan's 0.18278",
        expected=0.10257,
        tolerance=relative(0.01),
        measure=lambda: _fitted_error(4.328, -9.666, 7.020),
        control=lambda: _fitted_error(3.4445, -4.7750, 2.0315),
        seconds=4.0,
    ),
    Claim(
        name="start",
        statement="share of 100 x 100 Gaussians whose smallest value the Schatten-8 start doubles; control: no change",
        source="kexue.fm 10922 says usually; 0.60 over 500 draws",
        expected=0.5,
        tolerance=at_least(),
        measure=lambda: _share_doubled("schatten8"),
        control=lambda: _share_doubled("frobenius"),
        seconds=2.0,
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
        expected=1e-7,
        tolerance=at_most(),
        measure=lambda: _gradient_error(frozen_root=False),
        control=lambda: _gradient_error(frozen_root=True),
        seconds=0.1,
    ),
)
