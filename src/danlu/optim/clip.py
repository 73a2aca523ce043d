"""Clipping by the global norm, by the predicted descent, and what to do when a gradient is not finite.

The default norm of 1 is no accident: near convergence the first-order drop of the loss per step, ``lr * ||g||^2`` for
gradient descent, is far below ``lr``, which puts ``||g||`` below 1 whatever the size of the model.
"""

import functools
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu._validate import integer, positive
from danlu.optim._common import is_dtensor

_log = logging.getLogger(__name__)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that exist, each parameter counted once."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif isinstance(parameters, (str, bytes, Mapping)) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {type(parameters).__name__}")
    found: dict[int, Tensor] = {}
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{index}] must be a tensor, got {type(parameter).__name__}")
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise TypeError(f"parameters[{index}] has a sparse gradient; accepted are dense gradients")
        found[id(parameter)] = grad
    return list(found.values())


def _norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of scalars that may live on several devices, on the device of the first."""
    device = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return total


def _local_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm over plain tensors, accumulated in float32 (float64 for float64 and where float32 overflows)."""
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault((grad.device, grad.dtype), []).append(grad)
    norms: list[Tensor] = []
    for (_, dtype), bucket in by_device.items():
        norms.extend(torch._foreach_norm(bucket, 2, dtype=torch.promote_types(dtype, torch.float32)))
    total = _norm_of_norms(norms)
    # Reading a value on the CPU waits for nothing; there the rare overflow of a sum of squares can be told from Inf.
    if total.device.type == "cpu" and not torch.compiler.is_compiling() and math.isinf(total):
        total = _norm_of_norms(torch._foreach_norm(list(grads), 2, dtype=torch.float64))
    return total


def _sharded_norm(grads: Sequence[Any]) -> Tensor:
    """Return the norm over DTensors of one mesh and placement: one all-reduce for each sharded dimension."""
    mesh, placements = grads[0].device_mesh, grads[0].placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError("gradients with a Partial placement must be reduced before their norm is taken")
    # Float64 whatever the process: its range holds every square, and a shard that overflowed cannot be told by others.
    squared = _local_norm([grad.to_local() for grad in grads]).double().square()
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            torch.distributed.all_reduce(squared, group=mesh.get_group(dimension))
    total = squared.sqrt()
    narrow = functools.reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)
    fits = total.device.type != "cpu" or torch.compiler.is_compiling() or math.isfinite(total.to(narrow))
    return total.to(narrow) if fits else total


def _total_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    plain = [grad for grad in grads if not is_dtensor(grad)]
    meshes: dict[Any, list[Any]] = {}
    sharded: list[Any] = [grad for grad in grads if is_dtensor(grad)]
    for grad in sharded:
        meshes.setdefault((grad.device_mesh, grad.placements), []).append(grad)
    norms = [_local_norm(plain)] if plain else []
    norms.extend(_sharded_norm(bucket) for bucket in meshes.values())
    return norms[0] if len(norms) == 1 else _norm_of_norms(norms)


@torch.no_grad()
def grad_norm(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Return the global Euclidean norm of the gradients as a 0-D tensor, without waiting for the device.

    Sums of squares run in float32 (float64 for float64 gradients). Shards of a DTensor count once, replicas once.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> grad_norm(weight)
    tensor(5.)
    """
    return _total_norm(_gradients(parameters))


def _scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient in place by a 0-D tensor."""
    tensors: list[Any] = list(grads)
    local: list[Tensor] = [grad.to_local() if is_dtensor(grad) else grad for grad in tensors]
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in local:
        by_device.setdefault(grad.device, []).append(grad)
    for device, bucket in by_device.items():
        if device.type == "cpu":
            for grad in bucket:  # on a CPU a loop stays in the cache, a foreach product does not
                grad.mul_(factor.to(device))
        else:
            torch._foreach_mul_(bucket, factor.to(device))


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float = 1.0) -> Tensor:
    """Scale all gradients by ``min(1, max_norm / ||g||)`` in place, with ||g|| the norm of all of them together.

    The direction is kept. A zero gradient stays zero. When the norm is not finite the gradients are left as they are,
    so that the culprit can still be named: see :class:`NonFiniteGuard`. On a CPU nothing is multiplied when nothing
    has to be clipped; on an accelerator nothing waits for the device.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: the threshold, 1 by default.

    Returns:
        The norm before clipping, a 0-D tensor (float32, or float64 if a gradient was).

    Raises:
        TypeError: an entry is no tensor, or a gradient is sparse.
        ValueError: ``max_norm`` is not a positive finite number.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))

    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063, algorithm 1.
    """
    positive("max_norm", max_norm)
    grads = _gradients(parameters)
    norm = _total_norm(grads)
    if norm.device.type == "cpu" and not torch.compiler.is_compiling():
        if max_norm < norm < math.inf:
            _scale_(grads, max_norm / norm)
        return norm
    factor = (max_norm / norm).clamp(max=1.0)
    _scale_(grads, torch.where(torch.isfinite(norm), factor, torch.ones_like(factor)))
    return norm


def clip_groups_(groups: Iterable[Mapping[str, Any]], max_norm: float = 1.0) -> list[Tensor]:
    """Clip every parameter group to ``max_norm`` by itself; return the norms before clipping, one a group.

    >>> a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    >>> a.grad, b.grad = torch.tensor([4.0]), torch.tensor([0.5])
    >>> clip_groups_([{"params": [a]}, {"params": [b]}]), a.grad, b.grad
    ([tensor(4.), tensor(0.5000)], tensor([1.]), tensor([0.5000]))
    """
    return [clip_grad_norm_(group["params"], max_norm) for group in groups]


@torch.no_grad()
def descent_factor(updates: Sequence[Tensor], gradients: Sequence[Tensor], limit: float = 1.0) -> Tensor:
    """Return ``min(1, limit / <u, g>)``, the factor on the learning rate that caps the predicted drop of the loss.

    A step ``-lr * u`` lowers the loss by ``lr * <u, g>`` to first order. Clipping that product, instead of ``||g||``,
    keeps the predicted drop at most ``lr * limit`` for any optimizer. Where <u, g> is zero or negative the factor is 1.

    Args:
        updates: the update directions u, before the learning rate.
        gradients: the gradients g, same number and shapes.
        limit: cap on <u, g>. At 1, gradient descent (u = g) is clipped exactly where the norm exceeds 1.

    >>> descent_factor([torch.tensor([2.0])], [torch.tensor([4.0])])
    tensor(0.1250)
    """
    positive("limit", limit)
    if len(updates) != len(gradients):
        raise ValueError(f"updates and gradients must be as many, got {len(updates)} and {len(gradients)}")
    product = torch.zeros(())
    for index, (update, gradient) in enumerate(zip(updates, gradients)):
        if update.shape != gradient.shape:
            shapes = f"{tuple(update.shape)} and {tuple(gradient.shape)}"
            raise ValueError(f"updates[{index}] and gradients[{index}] must have one shape, got {shapes}")
        wide = torch.promote_types(update.dtype, torch.float32)
        product = product.to(update.device) + torch.sum(update.to(wide) * gradient.to(wide))
    return torch.where(product > limit, limit / product, torch.ones_like(product))


@torch.no_grad()
def limited_step(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Take a step of any optimizer, made shorter where it would lower the loss by more than ``limit`` times its rate.

    The update u is what the optimizer did to the weights, decay included, over its group's learning rate; the step is
    multiplied by `descent_factor` and the optimizer's state is that of the whole step. It needs a copy of the weights.

    Args:
        optimizer: with gradients; of parameters that each process holds whole.
        limit: cap on <u, g> over all parameters.

    Returns:
        The factor, a scalar on the parameters' device.

    Raises:
        ValueError: a parameter is divided among processes, or ``limit`` is not positive.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> limited_step(torch.optim.SGD([weight], lr=0.1), 1.0), weight.data
    (tensor(0.0400), tensor([-0.0120, -0.0160]))
    """
    positive("limit", limit)
    moved = [
        (parameter, group["lr"], parameter.grad, parameter.detach().clone())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and float(group["lr"]) > 0
    ]
    if any(is_dtensor(parameter) for parameter, *_ in moved):
        raise ValueError("limit must be left out where parameters are divided among processes: <u, g> is over all")
    optimizer.step()
    updates = []
    for parameter, lr, _, before in moved:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        updates.append((before.to(wide) - parameter.to(wide)) / lr)
    factor = descent_factor(updates, [gradient for _, _, gradient, _ in moved], limit)
    for parameter, _, _, before in moved:
        parameter.copy_(before.lerp_(parameter, factor.to(parameter.dtype)))
    return factor


@torch.no_grad()
def nonfinite_gradients(named_parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the parameters whose gradient holds a NaN or an infinity.

    A shard counts for its whole parameter: all the processes of its mesh have to ask, and get the same answer.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([1.0, float("nan")])
    >>> nonfinite_gradients([("weight", weight)])
    ['weight']
    """
    found = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    return [name for name, grad in found if not _is_finite(grad)]


def _is_finite(grad: Any) -> bool:
    """Say whether all entries of a gradient are finite, on whichever process they lie."""
    local = grad.to_local() if is_dtensor(grad) else grad
    bad = (~torch.isfinite(local)).any().int()
    if is_dtensor(grad):
        for dimension, placement in enumerate(grad.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(bad, group=grad.device_mesh.get_group(dimension))
    return not bool(bad)


class NonFiniteGuard:
    """Decides after the backward pass whether a step may be taken, so that no NaN ever reaches weights or state.

    Args:
        patience: steps skipped one after another before the run is stopped with an error.

    Attributes:
        skipped: steps skipped so far.
        consecutive: steps skipped since the last finite one.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer, guard = torch.optim.SGD([weight], lr=1.0), NonFiniteGuard()
    >>> weight.grad = torch.tensor([float("inf")])
    >>> norm = clip_grad_norm_([weight])
    >>> if guard.allows(norm, [("weight", weight)]):
    ...     optimizer.step()
    >>> weight.item(), guard.skipped
    (0.0, 1)
    """

    def __init__(self, patience: int = 10) -> None:
        integer("patience", patience)
        self.patience = patience
        self.skipped = 0
        self.consecutive = 0
        self._names: list[str] = []
        self._culprits: deque[Tensor] = deque()  # of the steps whose norm nobody has read yet

    def allows(self, norm: Tensor, named_parameters: Iterable[tuple[str, Tensor]]) -> bool:
        """Return True if ``norm`` is finite; otherwise count, log the culprits by name and return False.

        Reads one scalar from the device. The gradients are searched only when the norm is not finite.

        Raises:
            FloatingPointError: more than ``patience`` steps in a row were not finite; the message names the parameters.
        """
        if math.isfinite(norm):
            self.consecutive = 0
            return True
        self._refuse(nonfinite_gradients(named_parameters))
        return False

    def _refuse(self, names: Sequence[str]) -> None:
        """Count a step that is not finite, and say in which parameters."""
        self.skipped += 1
        self.consecutive += 1
        blame = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = f"in {blame}" if names else "in their sum (every gradient by itself is finite)"
        if self.consecutive > self.patience:
            raise FloatingPointError(f"gradients were not finite for {self.consecutive} steps in a row, {where}")
        _log.warning("step skipped, the %d. so far: a gradient is not finite %s", self.skipped, where)

    def state_dict(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts of :meth:`state_dict`."""
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])

    @torch.no_grad()
    def screen(self, norm: Tensor, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Put zeros in the place of all gradients if ``norm`` is not finite, without anybody waiting for the device.

        For accelerators, in the place of `allows`: the step is then taken in any case, and what a momentum remembers
        moves the weights on. Which parameters had such a gradient stays on the device until `settle` asks.
        """
        found = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
        if not found:
            return
        grads: list[Any] = [grad for _, grad in found]
        local: list[Tensor] = [grad.to_local() if is_dtensor(grad) else grad for grad in grads]
        bad = ~torch.isfinite(norm)
        sizes = torch.stack([size.to(norm.device) for size in torch._foreach_norm(local, torch.inf)])
        self._names, culprits = [name for name, _ in found], ~torch.isfinite(sizes)
        self._culprits.append(culprits)
        for grad in local:
            grad.masked_fill_(bad.to(grad.device), 0)

    def settle(self, norm: float) -> None:
        """Count a step that was screened, in the order of steps, now that its norm has been read.

        Raises:
            FloatingPointError: as `allows`.
        """
        culprits = self._culprits.popleft() if self._culprits else None
        if math.isfinite(norm):
            self.consecutive = 0
            return
        marked = [] if culprits is None else culprits.tolist()
        self._refuse([name for name, is_bad in zip(self._names, marked) if is_bad])
