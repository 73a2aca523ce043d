"""The spectral norm by power iteration, and its gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu._autograd import Fused, ordinary
from danlu._validate import integer
from danlu.linalg._matrix import check_matrix, in_own_dtype
from danlu.linalg._newton_schulz import at_least_float32, power_of_two_scale

__all__ = ["TopSingular", "spectral_norm", "spectral_norm_gradient"]


class TopSingular(NamedTuple):
    """The largest singular value of ``M`` and its vectors: ``M right = value * left``.

    Attributes:
        value: ``(…)``. The gradient is ``left right^T``, second and third derivatives are those of the exact norm
            (where the largest singular value is simple). The vectors are constants.
        left: ``(…, m)``, a unit vector.
        right: ``(…, n)``, a unit vector.
        start: ``(…, n)`` or ``(…, n, block)``: pass it as ``start`` to the next call.
    """

    value: Tensor
    left: Tensor
    right: Tensor
    start: Tensor


@in_own_dtype
def spectral_norm(M: Tensor, *, start: Tensor | None = None, iterations: int = 10, block: int = 1) -> TopSingular:
    """Return the largest singular value of ``M`` by power iteration, from below.

    One iteration is two products with ``M`` and multiplies the error by ``(sigma_2 / sigma_1)^2``. Spectra that are
    flat at the top, such as Gaussian ones, converge slowly: there ``block > 1`` iterates on a subspace of that many
    vectors, with the factor ``(sigma_{block + 1} / sigma_1)^2``. ``start`` warm-starts the iteration from the last
    call.

    Args:
        M: ``(…, m, n)``, real floating, finite. Reshape a convolution kernel to (out, in * k * k) first.
        start: the ``start`` of an earlier call, of shape ``(…, n)`` or ``(…, n, block)``; by default a fixed
        pseudo-random
            vector (the vector of ones, a common choice, is in the null space of any matrix whose rows sum to zero). A
            start in the null space of ``M`` is replaced.
        iterations: at least 1. Ten reach 97 % of the norm of a square Gaussian matrix from a cold start.
        block: number of vectors, at most min(m, n).

    Raises:
        ValueError: ``start`` has the wrong shape; ``block`` exceeds min(m, n).

    Sources: Yoshida & Miyato, arXiv 1705.10941; Golub & Van Loan, Matrix Computations, 8.2.

    >>> import torch
    >>> top = spectral_norm(torch.diag(torch.tensor([1.0, -3.0, 2.0])), iterations=30)
    >>> top.value
    tensor(3.)
    >>> top.right.abs()[1]
    tensor(1.)
    """
    check_matrix("M", M)
    m, n = M.shape[-2:]
    if 0 in (m, n):
        raise ValueError(f"M must not be empty, got shape {tuple(M.shape)}")
    integer("iterations", iterations)
    integer("block", block, high=min(m, n))
    with torch.no_grad():
        scale = power_of_two_scale(M.detach())
        A = (M.detach() * scale).to(at_least_float32(M.dtype))
        V = _start(A, start, block)
        for _ in range(iterations):
            V = _orthonormal(A.mT @ (A @ V))
        if block == 1:
            right = V[..., 0]
        else:
            # The best linear combination of the block's vectors (Rayleigh-Ritz).
            _, _, Zh = torch.linalg.svd(A @ V, full_matrices=False)
            V = V @ Zh.mT
            right = V[..., 0]
        image = (A @ right.unsqueeze(-1)).squeeze(-1)
        norm = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        # A zero matrix has no left singular vector; any unit vector will do.
        left = torch.where(norm > 0, image / norm, torch.eye(m, 1, dtype=A.dtype, device=A.device)[:, 0])
        left, right, V = left.to(M.dtype), right.to(M.dtype), V.to(M.dtype)
    return TopSingular(_Norm.of(M, left, right, scale), left, right, V[..., 0] if block == 1 else V)


@in_own_dtype
def spectral_norm_gradient(M: Tensor, *, start: Tensor | None = None, iterations: int = 10, block: int = 1) -> Tensor:
    """Return ``u v^T``, the gradient of the spectral norm where the largest singular value is simple.

    Multiplied by the norm it is the gradient of half its square, which is also the best rank-1 approximation of ``M``.
    At a tie the norm has no gradient and this is one of its subgradients.

    >>> import torch
    >>> spectral_norm_gradient(torch.diag(torch.tensor([1.0, -3.0])), iterations=30).round(decimals=6) + 0.0
    tensor([[ 0.,  0.],
            [ 0., -1.]])
    """
    top = spectral_norm(M.detach(), start=start, iterations=iterations, block=block)
    return top.left.unsqueeze(-1) * top.right.unsqueeze(-2)


class _Norm(Fused):
    """``left^T M right`` of the two vectors that were found, whose further derivatives are those of the exact norm.

    ``scale`` keeps the sum from overflowing.
    """

    @staticmethod
    def plain(M: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        A = (M * scale).to(at_least_float32(M.dtype))
        wide = A if A.shape[-2] <= A.shape[-1] else A.mT
        G = wide @ wide.mT
        S, U = torch.linalg.eigh(G.detach())
        top = U[..., -1:]
        # Newton's step for the eigenvector, and its Rayleigh quotient: right up to the third derivative.
        gaps = S[..., -1:] - S
        apart = gaps > 4 * torch.finfo(S.dtype).eps * S.shape[-1] * S[..., -1:]
        turned = top + (U * torch.where(apart, 1 / gaps, 0).unsqueeze(-2)) @ (U.mT @ (G @ top))
        square = (turned * (G @ turned)).sum((-2, -1)) / turned.square().sum((-2, -1))
        exact = torch.where(square > 0, square, 1).sqrt()
        # Less its value and first derivative, which are those of the vectors found.
        image = (wide.detach().mT @ top) / exact.detach()[..., None, None]
        rest = exact - (top * (wide @ image)).sum((-2, -1))
        found = ((A * right.to(A.dtype).unsqueeze(-2)).sum(-1) * left.to(A.dtype)).sum(-1)
        norm: Tensor = ((found + (rest - rest.detach())) / scale[..., 0, 0]).to(M.dtype)
        return norm

    @staticmethod
    def fast(_: Any, M: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> tuple[Tensor]:
        value = ((M * scale * right.unsqueeze(-2)).sum(-1) * left).sum(-1) / scale[..., 0, 0]
        return (value.to(M.dtype),)

    @staticmethod
    def derivative(
        _: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]
    ) -> tuple[Tensor | None, None, None, None]:
        _, left, right, _ = inputs
        return (grad.unsqueeze(-1) * left).unsqueeze(-1) * right.unsqueeze(-2), None, None, None


def _start(A: Tensor, start: Tensor | None, block: int) -> Tensor:
    shape = (*A.shape[:-2], A.shape[-1], block)
    if ordinary(A):
        generator = torch.Generator().manual_seed(10648)
        fresh = torch.randn(shape[-2:], generator=generator, dtype=torch.float64).to(A).expand(shape)
    else:
        # Transforms and traces have no generators of their own; any vector without a structure serves.
        places = torch.arange(shape[-2] * block, dtype=torch.float64, device=A.device).view(shape[-2:])
        fresh = torch.sin(10648 * (places + 1) ** 0.5).to(A.dtype).expand(shape)
    if start is None:
        return fresh
    V = start.unsqueeze(-1) if block == 1 and start.ndim == A.ndim - 1 else start
    if V.shape != shape:
        expected = shape[:-1] if block == 1 else shape
        raise ValueError(f"start must have shape {tuple(expected)}, got {tuple(start.shape)}")
    V = V.to(A)
    # A vector in the null space stays there: replace it.
    lost = torch.linalg.vector_norm(A @ V, dim=-2, keepdim=True) <= torch.finfo(A.dtype).eps
    return torch.where(lost, fresh, V)


def _orthonormal(Y: Tensor) -> Tensor:
    if Y.shape[-1] > 1:
        Q: Tensor = torch.linalg.qr(Y).Q
        return Q
    norm = torch.linalg.vector_norm(Y, dim=-2, keepdim=True)
    unit = torch.eye(Y.shape[-2], 1, dtype=Y.dtype, device=Y.device)
    return torch.where(norm > 0, Y / norm, unit)
