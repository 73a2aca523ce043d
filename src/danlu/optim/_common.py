"""What the optimizers share: naming parameters in errors, placing tensors, staying in cache, finite gradients."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from danlu._validate import number
from danlu.linalg._matrix import is_finite

#: Elements, for each thread, of one piece of an elementwise update on a CPU: four float32 operands of this length
#: (2 MiB) stay in the cache of a core.
PIECE = 2 << 16

_PLAIN = (Tensor, torch.nn.Parameter)


def label(position: int, group: Mapping[str, Any], index: int) -> str:
    """Return what to call a parameter in an error: its name if it has one, always its group."""
    names = group.get("param_names")
    return f"parameter {names[index] if names else index} of group {position}"


def check_rate(where: str, lr: Any) -> None:
    """Raise unless ``lr`` is a number of at least zero or a one-element tensor."""
    if not isinstance(lr, Tensor):
        number(f"{where}lr", lr, low=0)
    elif lr.numel() != 1:
        raise ValueError(f"{where}lr as a tensor must have one element, got shape {tuple(lr.shape)}")


def is_dtensor(tensor: Any) -> bool:
    """Say whether ``tensor`` is a DTensor, without importing their module: until someone has, none exists."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_like(tensor: Any, other: Any) -> Tensor:
    """Return a tensor sharded as another is: complete tensors are sharded, sharded ones gathered or sharded anew."""
    if not is_dtensor(other):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]
    mesh, placements = other.device_mesh, other.placements
    if is_dtensor(tensor):
        return tensor.redistribute(mesh, placements)  # type: ignore[no-any-return]
    # Every process has all of a plain tensor, so nothing has to be sent.
    return sys.modules["torch.distributed.tensor"].distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # type: ignore[no-any-return]


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors cut alike into short one-dimensional views, whole where they are not all contiguous.

    An elementwise update of several passes over one piece reads memory once; over a whole tensor, once a pass. A
    compiler makes one pass of them by itself, and would take a thousand pieces for a program of a thousand parts.
    """
    first = tensors[0]
    if first.numel() <= PIECE or not on_cpu(first) or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    length = PIECE * torch.get_num_threads()
    for start in range(0, first.numel(), length):
        yield tuple(t[start : start + length] for t in flat)


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors cut alike into views of a few rows; one that has a single row comes whole with every piece."""
    first = tensors[0]
    if first.numel() <= PIECE or not on_cpu(first) or first.ndim == 0:
        yield tensors
        return
    rows = max(1, PIECE * torch.get_num_threads() * first.shape[0] // first.numel())
    for start in range(0, first.shape[0], rows):
        yield tuple(t if t.shape[0] == 1 else t[start : start + rows] for t in tensors)


def on_cpu(tensor: Tensor) -> bool:
    """Say whether a tensor is complete, in the host's memory, and updated now rather than compiled."""
    return tensor.is_cpu and not is_dtensor(tensor) and not torch.compiler.is_compiling()


def all_finite(tensor: Tensor) -> Any:
    """Say whether every entry is finite: a bool on a CPU, elsewhere a tensor, without waiting for the device."""
    if on_cpu(tensor):
        return is_finite(tensor)
    # The largest entry is not finite as soon as one is; a sum could overflow by itself.
    return torch.isfinite(torch.linalg.vector_norm(tensor, float("inf"))) if tensor.numel() else torch.tensor(True)


def finite_or_zero(grad: Tensor) -> Tensor:
    """Return a gradient whose entries that are not finite are zero: itself on a CPU where all are finite."""
    if on_cpu(grad) and all_finite(grad):
        return grad
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def fusable(*tensors: Tensor) -> bool:
    """Say whether the fused kernels of a CPU, which go through the memory of tensors of one dtype, can take these.

    In 16 bits ``torch._fused_sgd_`` leaves parameters as they were, whatever the learning rate (torch 2.13).
    """
    first = tensors[0]
    wide = first.dtype in (torch.float32, torch.float64)
    if not wide or not on_cpu(first):
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as a small update
        if tensor.dtype != first.dtype or not tensor.is_contiguous():
            return False
    return True


def descend_(parameter: Tensor, direction: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """Subtract ``lr * (direction + weight_decay * parameter)`` in place; ``direction`` may be overwritten.

    On a CPU one pass of the kernel behind ``torch.optim.SGD(fused=True)`` where it applies, which sees no strides: a
    decay and a step by themselves read and write the weights twice.
    """
    if isinstance(lr, Tensor):
        if weight_decay:
            parameter.mul_(1.0 - lr * weight_decay)
        parameter.sub_(direction.mul_(lr))
    elif not fusable(parameter, direction):
        if weight_decay:
            parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(direction, alpha=-lr)
    else:
        torch._fused_sgd_(
            [parameter],
            [direction],
            [],
            lr=lr,
            weight_decay=weight_decay,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
