"""Clipping of singular values, ``mclip(M) = U clip(S, low, high) V^T``, and related functions.

The default needs eigendecompositions of the small Gram matrix and is accurate on every spectrum. The forms that consist
of products and matrix signs (without any decomposition) are here too, each under its name in the literature. Each of
them fails on some spectra, which `mclip` lists.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from danlu._validate import choice, integer, number, positive
from danlu.linalg._matrix import check_matrix
from danlu.linalg._newton_schulz import at_least_float32, power_of_two_scale
from danlu.linalg.msign import msign, rank_tolerance

__all__ = ["mclip", "mstep", "singular_power", "spectral_relu"]

Sign = Callable[[Tensor], Tensor]
Method = Literal["auto", "svd", "gram", "v1", "v2", "v3", "block", "general", "hard_cap"]

METHODS = ("auto", "svd", "gram", "v1", "v2", "v3", "block", "general", "hard_cap")

# A Gram matrix in precision eps resolves a singular value s only to eps * s_1^2 / s. Values are lowered by at most this
# factor at a time, so that the error stays below about 16 eps of the largest value.
_REACH = 32.0


def mclip(M: Tensor, low: float = -1.0, high: float = 1.0, *, method: Method = "auto", sign: Sign = msign) -> Tensor:
    """Return ``U clip(S, low, high) V^T`` where ``M = U S V^T``; singular values that are zero stay zero.

    Singular values are not negative, so any ``low <= 0`` only caps them at ``high``. As ``high`` falls to 0,
    ``mclip(M, high=c) / c`` tends to ``msign(M)``.

    Args:
        M: ``(…, m, n)``, real floating, without NaN or infinity. It is left unchanged.
        low, high: the interval for the singular values.
        method:
            ``"auto"`` is ``"gram"`` where ``low <= 0 <= high`` and ``"svd"`` otherwise.

            ``"gram"``: removes the part above ``high`` with the eigenvectors of the small Gram matrix, in several
            stages if the spectrum is wide. The error is below 2e-5 of the largest singular value in float32 and 1e-13
            in float64 on every spectrum; bfloat16 and float16 are computed in float32, so that only the result is
            rounded.

            ``"svd"``: by the singular value decomposition. A positive ``low`` raises only singular values above
            ``eps * max(m, n) * sigma_1``; smaller ones count as zero.

            The rest are built from ``sign`` and inherit its error. ``"v1"`` (2 signs, nested) is wrong by up to 1/2 in
            the direction of a zero singular value. ``"v2"`` (2 signs) has an error proportional to sigma where the sign
            is inexact. ``"v3"`` (3 signs) cancels that error, but with sigma_1 of 100 or more it sets the singular
            values below 1 to zero. ``"block"`` is one sign of size m + n. ``"hard_cap"`` is 2 signs, ``"general"`` 3
            signs, nested, and the only one of these that accepts a positive ``low``.
        sign: the matrix sign from which these forms are built.

    Returns:
        ``(…, m, n)`` in the dtype of ``M``. No gradient is recorded.

    Raises:
        TypeError: ``M`` is not a real floating tensor.
        ValueError: ``low > high``; ``M`` not finite; a positive ``low`` or a ``high <= 0`` with a form that does not
            support it.

    Sources: Su, "Singular value clipping by msign" parts 1 and 2 (v1, v2, v3); Cesista, "Numerically stable spectral
    clipping via Newton-Schulz" (block form, hard cap, spectral ReLU); Higham, Functions of Matrices, ch. 5.

    >>> import torch
    >>> mclip(torch.diag(torch.tensor([3.0, 0.25, 0.0])))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.2500, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    check_matrix("M", M)
    number("low", low)
    number("high", high)
    if low > high:
        raise ValueError(f"low must not exceed high, got low={low!r} and high={high!r}")
    choice("method", method, METHODS)
    capping = low <= 0 <= high
    if method == "auto":
        method = "gram" if capping else "svd"
    if method == "gram" and not capping:
        raise ValueError(f"method 'gram' needs low <= 0 <= high, got low={low!r} and high={high!r}; use 'svd'")
    if method in ("v1", "v2", "v3", "block", "hard_cap") and (low > 0 or high <= 0):
        raise ValueError(f"method {method!r} needs low <= 0 < high, got low={low!r} and high={high!r}; use 'auto'")
    if high == 0 and capping:
        return torch.zeros_like(M)
    if M.numel() == 0:
        return torch.empty_like(M)
    with torch.no_grad():
        if method == "svd":
            return _map_singular_values(M, lambda S: S.clamp(low, high), keep_zero=not capping)
        # Every form commutes with transposition; a wide matrix keeps the square factors on the small side.
        wide = M if M.shape[-2] <= M.shape[-1] else M.mT
        if method == "gram":
            X = _cap(wide, high)
        elif method == "general":
            X = _general(wide, max(low, -high), high, sign)
        else:
            X = high * _UNIT_FORMS[method](wide / high, sign)
        return X if wide is M else X.mT


def spectral_relu(M: Tensor, threshold: float, *, method: Literal["svd", "sign"] = "svd", sign: Sign = msign) -> Tensor:
    """Return ``U max(S, threshold) V^T``: every non-zero singular value is raised to at least ``threshold``.

    ``method="sign"`` evaluates ``(a s + M + (a s - M) msign(a s - M)^T s) / 2`` with ``s = msign(M)``.

    >>> import torch
    >>> spectral_relu(torch.diag(torch.tensor([3.0, 0.25])), 1.0)
    tensor([[3., 0.],
            [0., 1.]])
    """
    check_matrix("M", M)
    positive("threshold", threshold)
    choice("method", method, ("svd", "sign"))
    with torch.no_grad():
        if method == "svd":
            return _map_singular_values(M, lambda S: S.clamp(min=threshold), keep_zero=True)
        s = sign(M)
        D = threshold * s - M
        return (threshold * s + M + _absolute(D, s, sign)) / 2


def mstep(M: Tensor, threshold: float = 1.0, *, method: Literal["svd", "sign"] = "svd", sign: Sign = msign) -> Tensor:
    """Return ``U step(S - threshold) V^T``: values above ``threshold`` become 1, values below 0, equal ones 1/2.

    ``method="sign"`` evaluates ``(msign(M) + msign(M - threshold msign(M))) / 2``.

    >>> import torch
    >>> mstep(torch.diag(torch.tensor([3.0, 0.25])))
    tensor([[1., 0.],
            [0., 0.]])
    """
    check_matrix("M", M)
    positive("threshold", threshold)
    choice("method", method, ("svd", "sign"))
    with torch.no_grad():
        if method == "svd":
            half = torch.tensor(0.5)
            return _map_singular_values(M, lambda S: torch.heaviside(S - threshold, half.to(S)))
        s = sign(M)
        return (s + sign(M - threshold * s)) / 2


def singular_power(M: Tensor, exponent: int, *, sign: Sign = msign) -> Tensor:
    """Return ``U S**exponent V^T`` by products: ``M (M^T M)^k`` if odd, ``msign(M) (M^T M)^k`` if even.

    Zero singular values stay zero, also at ``exponent=0``, which is ``msign``. Differentiable.

    >>> import torch
    >>> singular_power(torch.diag(torch.tensor([3.0, -0.5])), 2)
    tensor([[ 9.0000,  0.0000],
            [ 0.0000, -0.2500]])
    """
    check_matrix("M", M)
    integer("exponent", exponent, low=0)
    X = M if exponent % 2 else sign(M)
    wide = M.shape[-2] <= M.shape[-1]
    A = M @ M.mT if wide else M.mT @ M
    for _ in range(exponent // 2):
        X = A @ X if wide else X @ A
    return X


def _map_singular_values(M: Tensor, function: Callable[[Tensor], Tensor], keep_zero: bool = False) -> Tensor:
    work = M.to(at_least_float32(M.dtype))
    U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    mapped = function(S)
    if keep_zero:
        mapped = torch.where(rank_tolerance(work) * S[..., :1] < S, mapped, 0)
    result: Tensor = (U * mapped.unsqueeze(-2)) @ Vh
    return result.to(M.dtype)


def _cap(M: Tensor, high: float) -> Tensor:
    """Cap the singular values of a wide ``M`` by subtracting ``Q_> (1 - high / S_>) Q_>^T M``."""
    scale = power_of_two_scale(M)
    X = (M * scale).to(at_least_float32(M.dtype))
    cap = (high * scale).to(X.dtype).squeeze(-1)
    while True:
        squares, Q = torch.linalg.eigh(X @ X.mT)
        S = squares.clamp_min(0).sqrt()
        target = torch.maximum(cap, S[..., -1:] / _REACH)
        excess = torch.where(target < S, 1 - target / S, 0)
        if not bool(excess.any()):
            break
        X = X - (Q * excess.unsqueeze(-2)) @ (Q.mT @ X)
        if bool((target <= cap).all()):
            break
    return X.to(M.dtype) / scale


def _v1(M: Tensor, sign: Sign) -> Tensor:
    s = sign(M)
    D = sign(M - s)
    return (M + s + D - M @ (s.mT @ D)) / 2


def _v2(M: Tensor, sign: Sign) -> Tensor:
    s = sign(M)
    return (M + s + sign(_shifted_gram(M, -1)) @ (s - M)) / 2


def _v3(M: Tensor, sign: Sign) -> Tensor:
    s = sign(M)
    return (sign(_shifted_gram(M, 1)) @ (s + M) + sign(_shifted_gram(M, -1)) @ (s - M)) / 2


def _block(M: Tensor, sign: Sign) -> Tensor:
    m, n = M.shape[-2:]
    H = M.new_zeros((*M.shape[:-2], m + n, m + n))
    H[..., :m, m:], H[..., m:, :m] = M, M.mT
    H.diagonal(dim1=-2, dim2=-1).fill_(1)
    s = sign(H)
    return s[..., :m, m:] + s[..., :m, :m] @ M


def _hard_cap(M: Tensor, sign: Sign) -> Tensor:
    s = sign(M)
    return (s + M - _absolute(s - M, s, sign)) / 2


_UNIT_FORMS: dict[str, Callable[[Tensor, Sign], Tensor]] = {
    "v1": _v1,
    "v2": _v2,
    "v3": _v3,
    "block": _block,
    "hard_cap": _hard_cap,
}


def _general(M: Tensor, low: float, high: float, sign: Sign) -> Tensor:
    s = sign(M)
    below, above = sign(low * s - M), sign(high * s - M)
    inner = low * below - M @ (s.mT @ below) - high * above + M @ (s.mT @ above)
    return ((low + high) * s + inner) / 2


def _absolute(D: Tensor, s: Tensor, sign: Sign) -> Tensor:
    """Return ``D msign(D)^T s``: ``D`` with its singular values, signed in the basis of ``s``, made positive."""
    return D @ (sign(D).mT @ s) if D.shape[-2] > D.shape[-1] else (D @ sign(D).mT) @ s


def _shifted_gram(M: Tensor, shift: float) -> Tensor:
    A = M @ M.mT
    A.diagonal(dim1=-2, dim2=-1).add_(shift)
    return A
