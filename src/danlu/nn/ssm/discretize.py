r"""From a linear differential equation to a recurrence, for an input that is held at ``u_k`` during a step.

For ``x' = A x + B u`` with a step ``h`` (kexue.fm 10137):

=========  ====================================================================
forward    ``x + h (A x + B u)``
backward   ``(I - h A)^{-1} (x + h B u)``
bilinear   ``(I - h A/2)^{-1} ((I + h A/2) x + h B u)``
exact      ``e^{hA} x + A^{-1} (e^{hA} - I) B u``
=========  ====================================================================

of order 1, 1, 2 and without error. For the whole-history systems ``x' = (A x + B u) / t`` time enters through
``ln t`` only, so that no step size is needed: see `history_step`.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._validate import choice, integer, positive

Method = Literal["forward", "backward", "bilinear", "exact"]
HistoryMethod = Literal["bilinear", "bilinear-post", "exact"]


def _check(A: Tensor, B: Tensor) -> None:
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.shape[-1] != A.shape[-1]:
        raise ValueError(f"A must be (..., d, d) and B (..., d), got {tuple(A.shape)} and {tuple(B.shape)}")


def _exponential(M: Tensor) -> Tensor:
    """``e^M`` by the [7/7] Pade quotient, scaled and squared (Higham, 2005), for float64 ``(..., d, d)``.

    torch.linalg.matrix_exp leaves a relative 1e-13 a step (float32: 5e-5), which adds up over a thousand of them.
    """
    norm = float(M.abs().sum(-2).amax()) if M.numel() else 0.0
    squarings = max(0, math.ceil(math.log2(norm / 0.95))) if norm > 0 else 0
    M = M / 2**squarings
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    M2 = M @ M
    M4 = M2 @ M2
    M6 = M2 @ M4
    odd = M @ (M6 + 1512 * M4 + 277200 * M2 + 8648640 * eye)
    even = 56 * M6 + 25200 * M4 + 1995840 * M2 + 17297280 * eye
    power: Tensor = torch.linalg.solve(even - odd, even + odd)
    for _ in range(squarings):
        power = power @ power
    return power


def exact_step(A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``e^{hA}`` and ``A^{-1} (e^{hA} - I) B`` by one exponential of ``[[hA, hB], [0, 0]]``; ``A`` may be singular.

    Args:
        A: ``(d, d)``.
        B: ``(d,)``.
        h: steps, any shape.

    Returns:
        ``h.shape + (d, d)`` and ``h.shape + (d,)``.
    """
    d = A.shape[-1]
    wide = torch.promote_types(A.dtype, torch.float64)
    both = torch.zeros(*h.shape, d + 1, d + 1, dtype=wide, device=A.device)
    both[..., :d, :d], both[..., :d, d] = h[..., None, None] * A, h[..., None] * B
    both = _exponential(both).to(A.dtype)
    return both[..., :d, :d], both[..., :d, d]


def discretize(A: Tensor, B: Tensor, step: float, *, method: Method = "exact") -> tuple[Tensor, Tensor]:
    """Matrices of ``x_{k+1} = Abar x_k + Bbar u_k``.

    Args:
        A: ``(d, d)``, real or complex.
        B: ``(d,)``.
        step: length of a step, positive.
        method: see the module.

    Returns:
        ``Abar`` ``(d, d)`` and ``Bbar`` ``(d,)``.

    Raises:
        ValueError: shapes that do not fit, a step that is not positive, an unknown method.

    >>> A, B = torch.tensor([[-1.0]]), torch.tensor([1.0])
    >>> [round(discretize(A, B, 0.5, method=m)[0].item(), 4) for m in ("forward", "backward", "bilinear", "exact")]
    [0.5, 0.6667, 0.6, 0.6065]
    """
    _check(A, B)
    positive("step", step)
    choice("method", method, get_args(Method))
    if method == "exact":
        return exact_step(A, B, torch.tensor(step, dtype=A.real.dtype, device=A.device))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    implicit = {"forward": 0.0, "backward": 1.0, "bilinear": 0.5}[method]
    left, right = eye - implicit * step * A, eye + (1 - implicit) * step * A
    both = torch.linalg.solve(left, torch.cat((right, step * B[:, None]), dim=1))
    return both[:, :-1], both[:, -1]


def history_step(A: Tensor, B: Tensor, k: int, *, method: HistoryMethod = "exact") -> tuple[Tensor, Tensor]:
    r"""Matrices of step ``k -> k + 1`` of ``x' = (A x + B u) / t``, whatever the length of a step; ``k >= 1``.

    * ``exact``: that of ``x' = A x + B u`` over the time ``ln((k+1)/k)``;
    * ``bilinear``: ``(I - A / (2(k+1)))^{-1} ((I + A / (2k)) x + ln((k+1)/k) B u)``;
    * ``bilinear-post``: the same with ``1/k`` for the logarithm, as kexue.fm 10137 prints it. That first-order
      replacement dominates the error; here for comparison.

    At ``k = 0`` all forms are singular: the first state is the projection of a constant (`reconstruct` starts there).

    Args:
        A: ``(d, d)``.
        B: ``(d,)``.
        k: number of the step, from 1.
        method: one of the above.

    Returns:
        ``Abar`` ``(d, d)`` and ``Bbar`` ``(d,)``.

    Raises:
        ValueError: shapes that do not fit, ``k < 1``, an unknown method.
    """
    _check(A, B)
    integer("k", k)
    choice("method", method, get_args(HistoryMethod))
    if method == "exact":
        return discretize(A, B, math.log1p(1 / k))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    gain = math.log1p(1 / k) if method == "bilinear" else 1 / k
    both = torch.linalg.solve(eye - A / (2 * (k + 1)), torch.cat((eye + A / (2 * k), gain * B[:, None]), dim=1))
    return both[:, :-1], both[:, -1]


def legs_product(v: Tensor) -> Tensor:
    """``A v`` for the orthonormal `legs` matrix in ``O(d)``: ``n v - r cumsum(r v)``, ``r = sqrt(2n+1)``.

    Args:
        v: ``(..., d)``.

    >>> legs_product(torch.tensor([1.0, 0.0]))
    tensor([-1.0000, -1.7321])
    """
    n = torch.arange(v.shape[-1], dtype=v.dtype, device=v.device)
    r = (2 * n + 1).sqrt()
    return n * v - r * (r * v).cumsum(-1)


def legs_solve(v: Tensor, step: float) -> Tensor:
    """``(I - step A)^{-1} v`` for the orthonormal `legs` matrix in ``O(d)``.

    With ``S_n = sum_{k <= n} r_k z_k``: ``S_n = ((1 - step n) S_{n-1} + r_n v_n) / (1 + step (n + 1))``,
    ``z_n = (S_n - S_{n-1}) / r_n``.

    Args:
        v: ``(..., d)``.
        step: not negative.

    Raises:
        ValueError: a negative step.

    >>> legs_solve(torch.tensor([1.0, 0.0]), 0.5)
    tensor([ 0.6667, -0.2887])
    """
    if not (math.isfinite(step) and step >= 0):
        raise ValueError(f"step must be finite and not negative, got {step!r}")
    total, found = torch.zeros_like(v[..., 0]), []
    for n, v_n in enumerate(v.unbind(-1)):
        r = math.sqrt(2 * n + 1)
        # S_n - S_{n-1} without the cancellation of forming both: (r v_n - step (2n+1) S_{n-1}) / (1 + step (n+1)).
        gain = (r * v_n - step * (2 * n + 1) * total) / (1 + step * (n + 1))
        total = total + gain
        found.append(gain / r)
    return torch.stack(found, dim=-1)
