"""Clipping of singular values, ``mclip(M) = U clip(S, low, high) V^T``, and related functions.

The default needs eigendecompositions of the small Gram matrix and is accurate on every spectrum. The forms that consist
of products and matrix signs (without any decomposition) are here too, each under its name in the literature. Each of
them fails on some spectra, which `mclip` lists.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from danlu._autograd import Fused
from danlu._validate import choice, integer, number, positive
from danlu.linalg._matrix import check_matrix, in_own_dtype
from danlu.linalg._newton_schulz import at_least_float32, power_of_two_scale
from danlu.linalg.msign import msign, rank_tolerance

__all__ = ["mclip", "mstep", "singular_power", "spectral_relu"]

Sign = Callable[[Tensor], Tensor]
Method = Literal["auto", "svd", "gram", "v1", "v2", "v3", "block", "general", "hard_cap"]

METHODS: tuple[Method, ...] = get_args(Method)
SpectralMethod = Literal["svd", "sign"]

# A Gram matrix in precision eps resolves a singular value s only to eps * s_1^2 / s. Values are lowered by at most this
# factor at a time, so that the error stays below about 16 eps of the largest value.
_REACH = 32.0


@in_own_dtype
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
        ``(…, m, n)`` in the dtype of ``M``, differentiable where no singular value is at a threshold.

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
        return M.clone().zero_()
    if M.numel() == 0:
        return M.clone()
    if method in ("svd", "gram"):
        return _Clip.of(M, None if capping else low, high, method == "gram")
    # Every form commutes with transposition; a wide matrix keeps the square factors on the small side.
    wide = M if M.shape[-2] <= M.shape[-1] else M.mT
    if method == "general":
        X = _general(wide, max(low, -high), high, sign)
    else:
        X = high * _UNIT_FORMS[method](wide / high, sign)
    return X if wide is M else X.mT


@in_own_dtype
def spectral_relu(M: Tensor, threshold: float, *, method: SpectralMethod = "svd", sign: Sign = msign) -> Tensor:
    """Return ``U max(S, threshold) V^T``: every non-zero singular value is raised to at least ``threshold``.

    ``method="sign"`` evaluates ``(a s + M + (a s - M) msign(a s - M)^T s) / 2`` with ``s = msign(M)``.

    >>> import torch
    >>> spectral_relu(torch.diag(torch.tensor([3.0, 0.25])), 1.0)
    tensor([[3., 0.],
            [0., 1.]])
    """
    check_matrix("M", M)
    positive("threshold", threshold)
    choice("method", method, get_args(SpectralMethod))
    if method == "svd":
        return _Clip.of(M, threshold, None, False)
    s = sign(M)
    D = threshold * s - M
    return (threshold * s + M + _absolute(D, s, sign)) / 2


@in_own_dtype
def mstep(M: Tensor, threshold: float = 1.0, *, method: SpectralMethod = "svd", sign: Sign = msign) -> Tensor:
    """Return ``U step(S - threshold) V^T``: values above ``threshold`` become 1, values below 0, equal ones 1/2.

    ``method="sign"`` evaluates ``(msign(M) + msign(M - threshold msign(M))) / 2``.

    >>> import torch
    >>> mstep(torch.diag(torch.tensor([3.0, 0.25])))
    tensor([[1., 0.],
            [0., 0.]])
    """
    check_matrix("M", M)
    positive("threshold", threshold)
    choice("method", method, get_args(SpectralMethod))
    if method == "svd":
        return _Step.of(M, threshold)
    s = sign(M)
    return (s + sign(M - threshold * s)) / 2


@in_own_dtype
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


class _Clip(Fused):
    """The clip by a decomposition, with the derivative of the exact one: differentiable as often as `msign` is."""

    @staticmethod
    def plain(M: Tensor, low: float | None, high: float | None, gram: bool) -> Tensor:
        if M.numel() == 0:
            return M.clone()
        if M.shape[-2] > M.shape[-1]:
            return _Clip.plain(M.mT, low, high, gram).mT
        scale = power_of_two_scale(M.detach()).double()
        # In float64, for the square of the matrix decides which singular values are above a threshold.
        A = M.double() * scale
        s, X = msign(A), A
        if high is not None:
            X = X - _above(A, high * scale) @ (A - high * scale * s)
        if low is not None:
            raised = low * scale * s - A
            X = X + raised - _above(A, low * scale) @ raised
        value = _map_singular_values(M.detach(), lambda S: S.clamp(low, high), low is not None)
        return value + ((X - X.detach()) / scale).to(M.dtype)

    @staticmethod
    def fast(_: Any, M: Tensor, low: float | None, high: float | None, gram: bool) -> tuple[Tensor]:
        if not gram or high is None:
            return (_map_singular_values(M, lambda S: S.clamp(low, high), low is not None),)
        return (_cap(M, high) if M.shape[-2] <= M.shape[-1] else _cap(M.mT, high).mT,)

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _derivative(_Clip.plain, grad, inputs)


class _Step(Fused):
    """The step function of singular values, with its derivative: they stay, the singular vectors turn."""

    @staticmethod
    def plain(M: Tensor, threshold: float) -> Tensor:
        if M.numel() == 0:
            return M.clone()
        if M.shape[-2] > M.shape[-1]:
            return _Step.plain(M.mT, threshold).mT
        scale = power_of_two_scale(M.detach()).double()
        A = M.double() * scale
        X = _above(A, threshold * scale) @ msign(A)
        return _Step.fast(None, M.detach(), threshold)[0] + (X - X.detach()).to(M.dtype)

    @staticmethod
    def fast(_: Any, M: Tensor, threshold: float) -> tuple[Tensor]:
        return (_map_singular_values(M, lambda S: ((threshold < S).to(S) + (threshold <= S).to(S)) / 2),)

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _derivative(_Step.plain, grad, inputs)


def _derivative(plain: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    M, *others = inputs
    with torch.enable_grad():
        M = M.detach().requires_grad_()
        (found,) = torch.autograd.grad(plain(M, *others), M, grad)
    return found, *(None for _ in others)


def _above(A: Tensor, threshold: Tensor) -> Tensor:
    """Return the projector on the left singular vectors of values above a threshold, half of it for equal ones."""
    eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    return (eye + msign(A @ A.mT - threshold.square() * eye)) / 2


def _map_singular_values(M: Tensor, function: Callable[[Tensor], Tensor], keep_zero: bool = False) -> Tensor:
    scale = power_of_two_scale(M)
    work = (M * scale).to(at_least_float32(M.dtype))
    U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    mapped = function(S / scale[..., 0].to(S.dtype))
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
    # For float16 the scale is float32: its numbers would not hold what is divided.
    return (X.to(M.dtype) / scale).to(M.dtype)


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
