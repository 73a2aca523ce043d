"""Functions of matrices in the contract: each against its formula by the singular value decomposition in float64."""

from collections.abc import Callable
from typing import Any

import torch
from contract.table import Case, Function
from tensors import gaussian
from torch import Tensor

from danlu.linalg import (
    cr,
    cur,
    interpolative,
    landmark_attention,
    mclip,
    msign,
    mstep,
    nystrom,
    pinv,
    polar,
    singular_power,
    spectral_norm,
    spectral_relu,
    svd,
)
from danlu.linalg.lowrank import iterative_pinv, least_squares

WIDE = dict.fromkeys(("bfloat16", "float16"), "must be float32 or float64")
DRAWN = dict.fromkeys(("torch.func.vmap, per-sample gradients", "torch.func, Hessians"), "called random operation")
"""The estimate of an error draws; ``vmap(randomness="different")`` says that it may."""


def matrix(name: str, fast: Function, plain: Function, **options: Any) -> Case:
    """Return the case of a function of matrices, whose sizes are a part of it."""
    options = {"activations": matrices, "dynamic": None, "heavy": True, **options}
    return Case(name, fast, plain, **options)


def low_rank(name: str, fast: Function, plain: Function, **options: Any) -> Case:
    """Return the case of a function that refuses 16 bits."""
    return matrix(name, fast, plain, recorded=True, **{"raises": WIDE, **options})


def matrices(b: int, t: int) -> tuple[Tensor, ...]:
    """Matrices 3 x 4 whose singular values are far from one another and from every threshold below."""
    U, _, Vh = torch.linalg.svd(gaussian(b, 3, 4, seed=1), full_matrices=False)
    return ((U * torch.tensor([3.0, 1.3, 0.4], dtype=U.dtype)) @ Vh,)


def by_svd(function: Callable[[Tensor], Tensor]) -> Function:
    def call(M: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return (U * function(S).unsqueeze(-2)) @ Vh

    return call


def polar_factor(M: Tensor) -> Tensor:
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (Vh.mT * S.unsqueeze(-2)) @ Vh


def pseudo_inverse(M: Tensor) -> Tensor:
    return M.mT @ torch.linalg.inv(M @ M.mT)


def truncated(M: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :]


def top_direction(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M.detach(), full_matrices=False)
    return U[..., :1] @ Vh[..., :1, :]


def projected(M: Tensor) -> Tensor:
    """The first two columns' space."""
    C = M[..., :2]
    return C @ torch.linalg.inv(C.mT @ C) @ C.mT @ M


def crossed(M: Tensor) -> Tensor:
    """The best approximation from the first two columns and rows."""
    R = M[..., :2, :]
    return projected(M) @ R.mT @ torch.linalg.inv(R @ R.mT) @ R


def kernel(x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) * x.unsqueeze(-3)).sum(-1) + torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)


def landmarks(x: Tensor) -> Tensor:
    K = kernel(x)
    C = K[..., :2]
    return C @ torch.linalg.inv(C[..., :2, :]) @ C.mT


def triples(b: int, t: int) -> tuple[Tensor, ...]:
    return gaussian(b, 4, 3, seed=1), gaussian(b, 4, 3, seed=2), gaussian(b, 4, 2, seed=3)


def softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 3**-0.5
    q_mean, k_mean = (x.unflatten(-2, (2, 2)).mean(-2) for x in (q, k))
    inner = torch.linalg.inv((q_mean @ k_mean.mT).softmax(-1))
    return (q @ k_mean.mT).softmax(-1) @ inner @ (q_mean @ k.mT).softmax(-1) @ v


def largest_terms(M: Tensor) -> Tensor:
    chosen = M.detach().square().sum(-2).topk(2, dim=-1).indices
    C = torch.take_along_dim(M, chosen.unsqueeze(-2), dim=-1)
    return C @ C.mT


def two(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


CASES = [
    matrix("msign", msign, by_svd(torch.ones_like), slack=2),
    matrix("msign, designed steps", lambda M: msign(M, method="designed", steps=8), by_svd(torch.ones_like), slack=2),
    matrix("polar", lambda M: polar(M)[1], polar_factor, recorded=True),
    matrix("mclip", lambda M: mclip(M, high=2.0), by_svd(lambda S: S.clamp(max=2.0))),
    matrix("mclip, low and high", lambda M: mclip(M, 0.7, 2.0), by_svd(lambda S: S.clamp(0.7, 2.0))),
    matrix("mclip, by signs", lambda M: mclip(M, 0.7, 2.0, method="general"), by_svd(lambda S: S.clamp(0.7, 2.0)),
           recorded=True, slack=4),
    matrix("spectral_relu", lambda M: spectral_relu(M, 2.0), by_svd(lambda S: S.clamp(min=2.0))),
    matrix("mstep", lambda M: mstep(M, 2.0), by_svd(lambda S: (S > 2).to(S))),
    matrix("singular_power", lambda M: singular_power(M, 2), by_svd(torch.square), recorded=True, slack=2),
    matrix("spectral_norm", lambda M: spectral_norm(M, block=3, iterations=3).value,
           lambda M: torch.linalg.svdvals(M)[..., 0]),
    low_rank("pinv", pinv, pseudo_inverse),
    low_rank("iterative_pinv", lambda M: iterative_pinv(M, condition=10.0, steps=7), pseudo_inverse, slack=10),
    low_rank("least_squares", least_squares, lambda M, B: pseudo_inverse(M) @ B,
             activations=lambda b, t: (*matrices(b, t), gaussian(b, 3, 2, seed=2))),
    low_rank("landmark_attention", lambda q, k, v: landmark_attention(q, k, v, landmarks=2), softmaxes,
             activations=triples),
    low_rank("svd", lambda M: svd(M, 2).reconstruct(), truncated),
    low_rank("interpolative", lambda M: interpolative(M, columns=two(0, 1)).reconstruct(), projected,
             raises=WIDE | DRAWN),
    low_rank("cur", lambda M: cur(M, columns=two(0, 1), rows=two(0, 1)).reconstruct(), crossed, raises=WIDE | DRAWN),
    low_rank("nystrom", lambda x: nystrom(kernel(x), landmarks=two(0, 1)).reconstruct(), landmarks,
             activations=lambda b, t: (gaussian(b, 3, 2, seed=1),)),
    low_rank("cr", lambda M: cr(M, M.mT.contiguous(), 2).reconstruct(), largest_terms, raises=WIDE | DRAWN),
]  # fmt: skip
"""The functions of `danlu.linalg` that give numbers with derivatives."""
