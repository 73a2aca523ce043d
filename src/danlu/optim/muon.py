"""Muon: momentum whose singular values are all set to one, for every linear map of a network.

    M <- mu M + (1 - mu) G
    O <- msign(mu M + (1 - mu) G)            (Nesterov; msign(M) without)
    W <- (1 - lr * weight_decay) W - lr * s(shape) * O

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable
for LLM Training", arXiv:2502.16982, section 2 (decay and the scale ``moonlight``); Amsel et al., "The Polar Express",
arXiv:2505.16932 (the iteration).
"""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu._roles import MATRIX_ROLES, Split
from danlu._validate import choice, integer, number
from danlu.approx import Composition, optimal_composition, published
from danlu.linalg._newton_schulz import chunk_length, multiplications, orthogonalize
from danlu.optim._common import MomentumOptimizer, check_rate, is_dtensor
from danlu.optim._layout import layout, parts
from danlu.optim._sharded import (
    Bucket,
    Part,
    agreed_matmul_dtype,
    local,
    sharing_group,
    step_alone,
    step_together,
)
from danlu.optim.decay import check_decay, decay_

SCALES = ("moonlight", "rms", "plain", "jordan", "mup")
#: Root mean square that an entry of AdamW's update has in practice, which ``moonlight`` and ``rms`` aim at.
ADAMW_RMS = 0.2
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


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


def _composition(method: str | Composition, steps: int | None) -> Composition:
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


class Muon(MomentumOptimizer):
    """Momentum orthogonalised by matrix products, for matrices, stacks of expert matrices and convolutions.

    Embeddings, heads, gains and biases are no linear maps between activations: give them to AdamW
    (:func:`danlu.optim.build_optimizers` does). Equal shapes are stacked and iterated together. Nothing in ``step``
    waits for the device, gradients are left unmodified, and the result does not depend on the scale of the loss.

    Args:
        params: parameters, named parameters or groups. A group may carry, besides every option below,
            ``role`` (``matrix``; ``experts``: leading dimensions count matrices; ``conv``: trailing dimensions are
            flattened) and ``split`` (rows orthogonalised apart: a number of equal blocks or a tuple of heights).
            Where it does not, the parameter's ``danlu_role`` and ``danlu_split`` hold, then its shape: 2-D is a
            matrix, 3-D a stack.
        lr: learning rate, a number or a one-element tensor.
        momentum: decay of the momentum, in [0, 1).
        nesterov: look one step ahead.
        weight_decay: decoupled decay; the weights shrink by ``lr * weight_decay`` each step. It bounds the spectral
            norm of the weights by about ``s(shape) / weight_decay``.
        decay: what ``weight_decay`` shrinks: ``decoupled`` all singular values, ``spectral`` the largest one,
            ``clipped`` what they have above ``decay_bound`` (see :func:`danlu.optim.decay_`). The latter two act on
            each matrix by itself, need whole parameters and wait for the device; ``clipped`` costs an
            eigendecomposition a matrix.
        decay_bound: of ``clipped``: singular values up to it are left alone.
        scale: factor by shape, see :func:`shape_scale`. ``rms`` makes the root mean square of every update 0.2
            exactly, whatever the iteration leaves of the smallest singular values; ``moonlight`` gives
            0.2 for an exact polar factor and a few per cent less for a real one.
        ema: average gradients (True) or sum them (False). The step is the same as long as ``momentum`` is.
        maximize: climb instead of descending.
        method: ``auto``; ``fast``, a tenth quicker at about twice the error, which is still below that of Jordan's
            five steps; a name of :func:`danlu.approx.published`; or any :class:`danlu.approx.Composition`.
        steps: number of polynomials; None for what ``method`` is made for (5 for ``auto``).
        dtype: format of the iteration. None: float64 for float64 parameters, otherwise the faster of bfloat16 and
            float32 on the device. In bfloat16 the update has a relative error of about 1e-2.
        momentum_dtype: format of the momentum; None for the parameter's own.
        chunk_bytes: bytes of one stack in the iteration, which needs up to about fifteen times as much for square
            matrices. None: 4 MiB on a CPU, where a stack should stay in cache, and unlimited
            elsewhere. Where it is given, each process also sends and receives about that much at a time.
        foreach: update momenta and weights by fused multi-tensor calls. None: not on a CPU, where a loop is faster.
        process_group: processes that hold replicas of the parameters and their gradients, as under
            DistributedDataParallel: each then iterates a share of the matrices. None: this process does all.
            DTensors (FSDP2) need no group: their matrices are collected, iterated once and scattered in the mesh they
            lie in, and the momentum is cut as its parameter is. They may be cut over one dimension of the mesh.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.eye(2, 3))
    >>> optimizer = Muon([("weight", weight)], lr=0.1, weight_decay=0.0, scale="plain")
    >>> weight.grad = torch.tensor([[5.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> optimizer.step()
    >>> torch.allclose(weight, 0.9 * torch.eye(2, 3), atol=2e-2)
    True
    """

    slot = "momentum_buffer"
    own = ("composition", "dtype", "momentum_dtype", "chunk_bytes", "foreach", "process_group")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        decay: str = "decoupled",
        decay_bound: float | None = None,
        scale: str = "moonlight",
        ema: bool = True,
        maximize: bool = False,
        method: str | Composition = "auto",
        steps: int | None = None,
        dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        chunk_bytes: int | None = None,
        foreach: bool | None = None,
        process_group: Any = None,
    ) -> None:
        for name, value in (("dtype", dtype), ("momentum_dtype", momentum_dtype)):
            if value is not None:
                choice(name, value, _DTYPES)
        if chunk_bytes is not None:
            integer("chunk_bytes", chunk_bytes)
        self.composition = _composition(method, steps)
        self.dtype, self.momentum_dtype, self.chunk_bytes, self.foreach = dtype, momentum_dtype, chunk_bytes, foreach
        self.process_group = sharing_group(process_group)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decay": decay,
            "decay_bound": decay_bound,
            "scale": scale,
            "ema": ema,
            "maximize": maximize,
            "role": None,
            "split": None,
        }
        self.check_options("", defaults)
        super().__init__(params, defaults)

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        check_rate(where, options["lr"])
        number(f"{where}momentum", options["momentum"], low=0, high=1, high_open=True)
        number(f"{where}weight_decay", options["weight_decay"], low=0)
        check_decay(where, options["decay"], options["decay_bound"])
        choice(f"{where}scale", options["scale"], SCALES)
        if options["role"] is not None:
            choice(f"{where}role", options["role"], MATRIX_ROLES)

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if a parameter is no linear map, or its memory has no view as a stack of matrices."""
        role, split = layout(name, parameter, options)
        whole = parameter.detach()
        storage = local(whole).untyped_storage().data_ptr()
        found = list(parts(name, (whole, whole, whole), role, split, None))
        if options.get("decay", "decoupled") != "decoupled" and any(part.dim for part in found):
            placed = getattr(parameter, "placements", None)
            raise ValueError(f"{name} is placed as {placed}; its matrices being cut, decay must be 'decoupled'")
        views = [part.tensors[0] for part in found]
        if any(view.numel() and view.untyped_storage().data_ptr() != storage for view in views):
            raise ValueError(f"{name} has strides {parameter.stride()} without a view as a stack of matrices")

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and momenta of a group in place."""
        if not params:
            return
        (momenta,) = slots
        options = {key: value for key, value in group.items() if key in _OPTIONS}
        if group.get("decay", "decoupled") != "decoupled":  # a state saved before there was a choice has no key
            self._decay(group, params)
            options["weight_decay"] = 0.0
        together = self.process_group is not None or any(map(is_dtensor, params))
        step = _uncompiled if together else muon_  # an exchange that overlaps with work has no place in a graph
        step(
            params,
            grads,
            momenta,
            composition=self.composition,
            dtype=self.dtype,
            chunk_bytes=self.chunk_bytes,
            foreach=self.foreach,
            process_group=self.process_group,
            **options,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decay(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply the decays that need the singular values of each matrix."""
        amount = float(group["lr"] * group["weight_decay"])
        for index, parameter in enumerate(params):
            name = f"parameter {index}"
            for part in parts(name, (parameter,) * 3, *layout(name, parameter, group), None):
                if part.size:
                    decay_(part.tensors[0], amount, group["decay"], group["decay_bound"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Muon":
        memo[id(self.process_group)] = self.process_group  # the same processes
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", "scale", "ema", "maximize", "role", "split")


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


_uncompiled = torch.compiler.disable(muon_)


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
