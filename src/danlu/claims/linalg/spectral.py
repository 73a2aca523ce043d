"""The spectral norm: its gradient, the rate of power iteration, and the falling water level of spectral decay."""

import functools

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, relative
from danlu.linalg import spectral_norm, spectral_norm_gradient
from danlu.optim import spectral_decay_


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_spectrum(sigma: Tensor, m: int, n: int) -> Tensor:
    U, V = torch.linalg.qr(_gaussian(m, len(sigma))).Q, torch.linalg.qr(_gaussian(n, len(sigma), seed=1)).Q
    M: Tensor = (U * sigma) @ V.T
    return M


def _gradient_error(*, frobenius: bool) -> float:
    M, D = _gaussian(7, 11), _gaussian(7, 11, seed=1)
    G = M / M.norm() if frobenius else spectral_norm_gradient(M, iterations=600)
    h = 1e-5
    slope = (torch.linalg.matrix_norm(M + h * D, 2) - torch.linalg.matrix_norm(M - h * D, 2)) / (2 * h)
    return abs(float((G * D).sum() - slope))


def _rate(iterations: int, block: int) -> float:
    """Factor by which the error of the vector shrinks in so many iterations, singular values 1, 0.8 and 0.5."""
    M = _with_spectrum(torch.tensor([1.0, 0.8, 0.5]).double(), 7, 5)
    v1, start = torch.linalg.svd(M).Vh[0], _gaussian(5, block, seed=3)

    def tangent(count: int) -> Tensor:
        v = spectral_norm(M, start=start[:, 0] if block == 1 else start, iterations=count, block=block).right
        ratio: Tensor = (v - (v @ v1) * v1).norm() / (v @ v1).abs()
        return ratio

    return (tangent(10 + iterations) / tangent(10)).item()


def _triple_error(*, warm: bool) -> float:
    """Error of norm and vectors of a stack after two warm calls of 30 iterations; the control begins anew."""
    M = torch.stack([1e-30 * _with_spectrum(torch.tensor([2.0, 1.3, 0.4]).double(), 7, 5), -_gaussian(7, 5, seed=2)])
    top = spectral_norm(M, iterations=30)
    top = spectral_norm(M, iterations=30, start=top.start if warm else None)
    U, S, Vh = torch.linalg.svd(M)
    same = (top.left.unsqueeze(-1) * top.right.unsqueeze(-2) - U[..., :1] @ Vh[..., :1, :]).abs().max()
    return max(float(same), float((top.value / S[..., 0] - 1).abs().max()))


def _share(iterations: int) -> float:
    M = _gaussian(1024, 1024).float()
    return float(spectral_norm(M, iterations=iterations).value / torch.linalg.eigvalsh(M @ M.T)[-1].sqrt())


@functools.cache
def _after_decay(*, spectral: bool) -> tuple[Tensor, Tensor]:
    """Singular values before and after decay for a time of 6, in steps of 4e-3."""
    sigma = torch.cat([torch.tensor([3, 2.5, 2, 1.5, 1]), torch.linspace(0.5, 0.1, 15)]).double()
    W, start = _with_spectrum(sigma, 30, 20), None
    for _ in range(1500):
        if spectral:
            start = spectral_decay_(W, 4e-3, start=start, iterations=4, block=6)
        else:
            W *= 1 - 4e-3
    return sigma, torch.linalg.svdvals(W)


def _tail_change(*, spectral: bool) -> float:
    before, after = _after_decay(spectral=spectral)
    return (after[5:] - before[5:]).abs().max().item()


CLAIMS = (
    Claim(
        name="gradient",
        statement="error of u v^T against central differences of the norm; control: the gradient of the Frobenius norm",
        source="kexue.fm 10648: the gradient of the spectral norm is u_1 v_1^T",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _gradient_error(frobenius=False),
        control=lambda: _gradient_error(frobenius=True),
        seconds=0.3,
    ),
    Claim(
        name="rate",
        statement="error of the vector after one more iteration, singular values 1, 0.8, 0.5; control: a block of two",
        source="power iteration: (sigma_2 / sigma_1)^2",
        expected=0.64,
        tolerance=absolute(1e-3),
        measure=lambda: _rate(1, 1),
        control=lambda: _rate(1, 2),
        seconds=0.1,
    ),
    Claim(
        name="block-rate",
        statement="the same with a block of two vectors; control: one vector",
        source="subspace iteration: (sigma_3 / sigma_1)^2",
        expected=0.25,
        tolerance=absolute(1e-3),
        measure=lambda: _rate(1, 2),
        control=lambda: _rate(1, 1),
        seconds=0.1,
    ),
    Claim(
        name="warm-start",
        statement="error of norm and vectors of a stack, one matrix near 1e-30, after two calls; control: the second "
        "call begins anew",
        source="power iteration continued: the error of 60 iterations",
        expected=5e-7,
        tolerance=at_most(),
        measure=lambda: _triple_error(warm=True),
        control=lambda: _triple_error(warm=False),
        seconds=0.1,
    ),
    Claim(
        name="ten-iterations",
        statement="share of the norm of a 1024 x 1024 Gaussian after ten iterations from a cold start; control: five",
        source="measured in float64 from the vector of ones: 0.971 (0.933 after five)",
        expected=0.971,
        tolerance=absolute(0.006),
        measure=lambda: _share(10),
        control=lambda: _share(5),
        seconds=1.0,
    ),
    Claim(
        name="water-level",
        statement="largest singular value after spectral decay for a time of 6 from 3, 2.5, 2, 1.5, 1; control: plain",
        source="derivation: dL/dt = -L/p while p values stand at the level L, here exp(-2.8865 / 5)",
        expected=0.5614,
        tolerance=relative(0.0005),
        measure=lambda: _after_decay(spectral=True)[1][0].item(),
        control=lambda: _after_decay(spectral=False)[1][0].item(),
        seconds=1.0,
    ),
    Claim(
        name="tail-untouched",
        statement="largest change of the singular values below the level over that time; control: plain decay",
        source="derivation: sigma_i(t) = min(sigma_i(0), L(t))",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _tail_change(spectral=True),
        control=lambda: _tail_change(spectral=False),
        seconds=1.0,
    ),
)
