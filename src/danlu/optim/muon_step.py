"""The step of Muon as a function: which matrices are iterated together, and what is done with each stack."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu._roles import Split
from danlu._validate import choice, integer
from danlu.approx import Composition, optimal_composition, published
from danlu.linalg._newton_schulz import chunk_length, multiplications, orthogonalize
from danlu.optim._exchange import Bucket, step_alone, step_together
from danlu.optim._layout import Layout, layout, parts
from danlu.optim._sharded import Part, agreed_matmul_dtype

Hook = Callable[..., None] | None

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
    last, where its terms are small: before, they cancel to less than a 16-bit dtype can hold.
    """
    lower = 3.2e-3
    quintics = optimal_composition(lower, 4, cushion=0.02, safety=1.01)
    reached = 1 - quintics.errors[2]
    last = optimal_composition(reached, 1, degree=9, upper=2 - reached)
    return replace(quintics, coefficients=quintics.coefficients[:3] + last.coefficients, name="fast").on(lower)


def composition_of(method: str | Composition, steps: int | None) -> Composition:
    """Return the polynomials that ``method`` and ``steps`` name.

    ``auto`` is designed for [2e-3, 1] with the safety factor and cushion that the 16-bit dtypes need: with the tight
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


class Options(NamedTuple):
    """What a group says about its step, by the names of :class:`danlu.optim.Muon`; read anew every time."""

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    scale: str
    ema: bool = True
    maximize: bool = False


class Iteration(NamedTuple):
    """How an optimizer iterates, by the names of :class:`danlu.optim.Muon`."""

    composition: Composition
    dtype: torch.dtype | None = None
    chunk_bytes: int | None = None
    foreach: bool | None = None
    process_group: Any = None


class Key(NamedTuple):
    """What matrices have in common that are stepped together."""

    group: Any  # the processes among which they lie; None for those that concern this process alone
    replicas: bool
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    momentum_dtype: torch.dtype
    work: torch.dtype  # of the iteration


class Stack(NamedTuple):
    """Matrices that are stepped together."""

    key: Key
    members: list[int]  # places among all the parts of the group of parameters
    most: int  # matrices iterated at once
    cost: float  # of iterating one


class Plan(NamedTuple):
    """Which matrices are stepped together: a function of roles, shapes and dtypes, the same at every step."""

    iteration: Iteration
    layouts: list[Layout]  # of each parameter
    here: list[Stack]  # complete on this process, and nobody else's concern
    shared: list[Stack]
    loads: dict[Any, list[float]]  # of the processes of a group, by what each holds complete


def muon_plan(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    iteration: Iteration,
    *,
    role: str | None = None,
    split: Split = None,
    transposed: bool | None = None,
) -> Plan:
    """Classify parameters and sort their matrices into stacks.

    Args:
        params: of one group.
        momenta: of the same parameters.
        iteration: how they will be iterated.
        role, split, transposed: of all of them; None for what was declared of each, then what its shape suggests.

    Raises:
        ValueError: a parameter is nothing that Muon can update.
    """
    options = {"role": role, "split": split, "transposed": transposed}
    layouts = [layout(f"parameter {index}", parameter, options) for index, parameter in enumerate(params)]
    here: dict[Key, list[int]] = {}
    shared: dict[Key, list[int]] = {}
    loads: dict[Any, list[float]] = {}
    found = _parts(layouts, iteration.process_group, params, momenta, momenta)  # gradients lie as momenta do
    coefficients = iteration.composition.coefficients
    for place, part in enumerate(found):
        p, (m, n) = part.tensors[0], part.shape
        if not m * n:  # a matrix without entries has nothing to step, on whichever process
            continue
        work = iteration.dtype
        if work is None:
            work = torch.float64 if p.dtype == torch.float64 else agreed_matmul_dtype(p.device, part.group)
        alone = part.group is None or part.dim == 0
        group = None if alone else part.group
        key = Key(group, not alone and part.dim is None, m, n, p.device, p.dtype, part.tensors[2].dtype, work)
        if not alone:
            shared.setdefault(key, []).append(place)
        elif part.size:
            here.setdefault(key, []).append(place)
        if part.dim == 0:
            load = loads.setdefault(part.group, len(part.lengths) * [0.0])
            cost = multiplications(coefficients, m, n, work)
            loads[part.group] = [held + cost * count for held, count in zip(load, part.lengths)]

    # A graph can hold no subscripted type, hence the quotes.
    def stack(key: Key, members: "list[int]") -> Stack:
        length = chunk_length(key.rows, key.columns, key.work, key.device, iteration.chunk_bytes)
        most = max(1, min(length, sum(found[place].size for place in members)))
        return Stack(key, members, most, multiplications(coefficients, key.rows, key.columns, key.work))

    return Plan(
        iteration,
        layouts,
        [stack(key, members) for key, members in here.items()],
        [stack(key, members) for key, members in shared.items()],
        loads,
    )


def _parts(layouts: Sequence[Layout], group: Any, *tensors: Sequence[Tensor]) -> list[Part]:
    """Return all matrices of parameters, of which the first of ``tensors`` are, in the order that a plan counts."""
    return [
        part
        for index, (laid, views) in enumerate(zip(layouts, zip(*tensors)))
        for part in parts(f"parameter {index}", views, laid, group)
    ]


def muon_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    plan: Plan,
    options: Options,
    *slots: Sequence[Tensor],
    before: Hook = None,
    after: Hook = None,
) -> None:
    """Update parameters and momenta in place: the functional form of :class:`danlu.optim.Muon`.

    Args:
        params: of one group.
        grads: of the same parameters, left as they are.
        momenta: of the same parameters.
        plan: what :func:`muon_plan` returned for parameters and momenta of these shapes, dtypes and roles.
        options: of the group.
        slots: what else is kept for each parameter, as hooks take it: tensors of its shape, or with one column.
        before: called with matrices, their updates before the factor by shape, which it may change in place, and
            their slots, each ``(b, rows, columns)``.
        after: called in the same way when the weights have moved.
    """
    if options.maximize:
        grads = [-grad for grad in grads]
    found = _parts(plan.layouts, plan.iteration.process_group, params, grads, momenta, *slots)

    # A graph can hold no subscripted type, hence the quotes.
    def bucket(stack: "Stack") -> Bucket:
        key, (composition, _, _, foreach, _) = stack.key, plan.iteration
        fused = foreach if foreach is not None else key.device.type != "cpu"
        factor = shape_scale(options.scale, key.rows, key.columns)
        return Bucket(
            parts=[found[place] for place in stack.members],
            shape=(key.rows, key.columns),
            dtype=key.work,
            most=stack.most,
            cost=stack.cost,
            accumulate=partial(_accumulate, options=options, foreach=fused),
            iterate=partial(_orthogonal, composition=composition, scale=options.scale),
            apply=partial(_apply, options=options, factor=factor, foreach=fused, before=before, after=after),
        )

    own = [bucket(stack) for stack in plan.here]
    if plan.shared:
        step_together(map(bucket, plan.shared), own, plan.loads, bounded=plan.iteration.chunk_bytes is not None)
    else:
        for each in own:
            step_alone(each)


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
    options: Options,
    foreach: bool,
) -> None:
    """Add the gradients ``G`` to the momenta ``M`` and write the direction to follow into ``D``, unless it is None."""
    momentum, nesterov, ema = options.momentum, options.nesterov, options.ema
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


def _apply(
    parts: Sequence[Part],
    U: list[Tensor],
    *,
    options: Options,
    factor: float,
    foreach: bool,
    before: Hook,
    after: Hook,
) -> None:
    """Let the hooks at the updates ``U``, and move the weights along them."""
    if before is not None:
        for part, update in zip(parts, U):
            before(part.tensors[0], update, *part.tensors[3:])
    _move([part.tensors[0] for part in parts], U, options.lr, options.weight_decay, factor, foreach=foreach)
    if after is not None:
        for part, update in zip(parts, U):
            after(part.tensors[0], update, *part.tensors[3:])


def _move(P: list[Tensor], U: list[Tensor], lr: float | Tensor, decay: float, factor: float, *, foreach: bool) -> None:
    """Shrink the weights and take the step along ``U``; a learning rate that is a tensor is never read by the host."""
    if isinstance(lr, Tensor):
        # In the parameter's dtype: a product with a tensor of no dimensions would be rounded to the iteration's.
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
