"""The step of Muon as a function: which matrices are iterated together, and what is done with each stack."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu._roles import Split
from danlu._validate import choice, integer
from danlu.approx import Composition, optimal_composition, published
from danlu.linalg._newton_schulz import chunk_length, multiplications, orthogonalize
from danlu.optim._layout import layout, parts
from danlu.optim._sharded import Bucket, Part, agreed_matmul_dtype, step_alone, step_together

SCALES = ("moonlight", "rms", "plain", "jordan", "mup")
#: Root mean square that an entry of AdamW's update has in practice, which ``moonlight`` and ``rms`` aim at.
ADAMW_RMS = 0.2


def shape_scale(scale: str, rows: int, columns: int) -> float:
    """Return the factor on the orthogonal update of a ``(rows, columns)`` matrix that maps columns to rows.

    ``plain`` 1; ``jordan`` sqrt(max(1, rows/columns)); ``mup`` sqrt(rows/columns); ``moonlight``
    0.2 sqrt(max(rows, columns)), with which the rates and decays of AdamW carry over. ``rms`` is ``moonlight`` for an
    update that is exactly orthogonal; :class:`Muon` then corrects it by the norm that the update really has.

    >>> [round(shape_scale(scale, 400, 100), 3) for scale in SCALES]
    [4.0, 4.0, 1.0, 2.0, 2.0]
    """
    choice("scale", scale, SCALES)
    if scale == "plain":
        return 1.0
    if scale == "jordan":
        return math.sqrt(max(1.0, rows / columns))
    if scale == "mup":
        return math.sqrt(rows / columns)
    return ADAMW_RMS * math.sqrt(max(rows, columns))


@functools.cache
def _fast_composition() -> Composition:
    """Return what ``fast`` iterates: three steps of degree 5 and one of degree 9, designed for [3.2e-3, 1].

    The step of degree 9 costs one small product more than one of degree 5 and does nearly the work of two. It comes
    last, where its terms are small: before, they cancel to less than a half format can hold.
    """
    lower = 3.2e-3
    quintics = optimal_composition(lower, 4, cushion=0.02, safety=1.01)
    reached = 1 - quintics.errors[2]
    last = optimal_composition(reached, 1, degree=9, upper=2 - reached)
    return replace(quintics, coefficients=quintics.coefficients[:3] + last.coefficients, name="fast").on(lower)


def composition_of(method: str | Composition, steps: int | None) -> Composition:
    """Return the polynomials that ``method`` and ``steps`` name.

    ``auto`` is designed for [2e-3, 1] with the safety factor and cushion that the half formats need: with the tight
    scale of :func:`~danlu.linalg._newton_schulz.orthogonalize` five such steps have a smaller error on every spectrum
    than five of Jordan's or of the published Polar Express, which start from the Frobenius norm.
    """
    if steps is not None and not isinstance(method, Composition):
        integer("steps", steps, high=100)
    if method == "fast":
        method = _fast_composition()
    if isinstance(method, Composition):
        if steps is not None and steps != method.steps:
            raise ValueError(f"steps must be None or the composition's own {method.steps}, got {steps}")
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a danlu.approx.Composition, got {type(method).__name__}")
    if method == "auto":
        return optimal_composition(2e-3, steps or 5, cushion=0.04, safety=1.01)
    return published(method, steps)


def muon_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    composition: Composition,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    scale: str,
    ema: bool = True,
    maximize: bool = False,
    role: str | None = None,
    split: Split = None,
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    foreach: bool | None = None,
    process_group: Any = None,
) -> None:
    """Update parameters and momenta in place: the functional form of :class:`Muon`, which documents the arguments."""
    here: dict[Any, list[Part]] = {}  # matrices that are whole here and nobody else's concern
    shared: dict[Any, list[Part]] = {}
    loads: dict[Any, list[float]] = {}  # of the processes of a group, by what each holds whole
    for index, (parameter, grad, buffer) in enumerate(zip(params, grads, momenta)):
        name = f"parameter {index}"
        kind, rows = layout(name, parameter, {"role": role, "split": split})
        for part in parts(name, (parameter, -grad if maximize else grad, buffer), kind, rows, process_group):
            p, (m, n) = part.tensors[0], part.shape
            alone = part.group is None or part.dim == 0
            work = dtype or (torch.float64 if p.dtype == torch.float64 else agreed_matmul_dtype(p.device, part.group))
            key = (part.group, part.dim is None, m, n, p.device, p.dtype, buffer.dtype, work)
            if not alone:
                shared.setdefault(key, []).append(part)
            elif part.size:
                here.setdefault(key[2:], []).append(part)
            if part.dim == 0:
                load = loads.setdefault(part.group, len(part.lengths) * [0.0])
                cost = multiplications(composition.coefficients, m, n, work)
                loads[part.group] = [held + cost * count for held, count in zip(load, part.lengths)]

    # A graph can hold no subscripted type, hence the quotes.
    def bucket(held: "Sequence[Part]", m: int, n: int, device: torch.device, work: torch.dtype) -> Bucket:
        fused = foreach if foreach is not None else device.type != "cpu"
        return Bucket(
            parts=held,
            shape=(m, n),
            dtype=work,
            most=max(1, min(chunk_length(m, n, work, device, chunk_bytes), sum(part.size for part in held))),
            cost=multiplications(composition.coefficients, m, n, work),
            accumulate=partial(_accumulate, momentum=momentum, nesterov=nesterov, ema=ema, foreach=fused),
            iterate=partial(_orthogonal, composition=composition, scale=scale),
            apply=partial(_apply, lr=lr, decay=weight_decay, factor=shape_scale(scale, m, n), foreach=fused),
        )

    own = [bucket(held, m, n, device, work) for (m, n, device, *_, work), held in here.items()]
    if shared:
        exchanged = [bucket(held, m, n, device, work) for (*_, m, n, device, _, _, work), held in shared.items()]
        step_together(exchanged, own, loads, bounded=chunk_bytes is not None)
    else:
        for each in own:
            step_alone(each)


muon_uncompiled_ = torch.compiler.disable(muon_)


def _orthogonal(stack_bmn: Tensor, *, composition: Composition, scale: str) -> Tensor:
    """Return the updates along a stack of directions, before the factor by shape."""
    update = orthogonalize(stack_bmn, composition, chunk_bytes=stack_bmn.nbytes)
    if scale == "rms":
        wide = torch.promote_types(update.dtype, torch.float32)
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True, dtype=wide)
        update.mul_(torch.where(norm > 0, math.sqrt(min(update.shape[1:])) / norm, norm))
    return update


def _accumulate(
    M: list[Tensor],
    G: list[Tensor],
    D: list[Tensor] | None,
    *,
    momentum: float,
    nesterov: bool,
    ema: bool,
    foreach: bool,
) -> None:
    """Add the gradients ``G`` to the momenta ``M`` and write the direction to follow into ``D``, unless it is None."""
    weight = 1.0 - momentum if ema else 1.0
    if foreach:
        torch._foreach_mul_(M, momentum)
        torch._foreach_add_(M, G, alpha=weight)
        if D is not None:
            look = torch._foreach_add(torch._foreach_mul(G, weight), M, alpha=momentum) if nesterov else M
            torch._foreach_copy_(D, look)
        return
    for buffer, grad, direction in zip(M, G, [None] * len(M) if D is None else D):
        if ema and buffer.dtype == grad.dtype:
            buffer.lerp_(grad, weight)
        else:
            buffer.mul_(momentum).add_(grad, alpha=weight)
        if direction is None:
            continue
        if not nesterov:
            direction.copy_(buffer)
        elif ema and buffer.dtype == grad.dtype == direction.dtype:
            torch.lerp(grad, buffer, momentum, out=direction)
        elif ema and buffer.dtype == grad.dtype:  # rounded once
            direction.copy_(torch.lerp(grad, buffer, momentum))
        else:
            direction.copy_(buffer).mul_(momentum).add_(grad, alpha=weight)


def _apply(P: list[Tensor], U: list[Tensor], *, lr: float | Tensor, decay: float, factor: float, foreach: bool) -> None:
    """Shrink the weights and take the step along ``U``; a learning rate that is a tensor is never read by the host."""
    if isinstance(lr, Tensor):
        # In the parameter's format: a product with a tensor of no dimensions would be rounded to the iteration's.
        U, alpha = list(torch._foreach_mul([u.to(p.dtype) for p, u in zip(P, U)], lr * factor)), -1.0
    else:
        alpha = -lr * factor
    if foreach:
        if decay:
            torch._foreach_mul_(P, 1.0 - lr * decay)
        torch._foreach_add_(P, U, alpha=alpha)
        return
    for parameter, update in zip(P, U):
        if decay:
            parameter.mul_(1.0 - lr * decay)
        parameter.add_(update, alpha=alpha)
