"""Checks that components of somebody else's code have what the loop is going to ask of them, before it starts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.optim import check_partition
from danlu.protocols import Batch

__all__ = ["check_data", "check_first_batch", "check_objective", "check_optimizer"]

_OF_DATA = ("train", "manifest", "sizes", "validation")
_OF_A_LOADER = ("__next__", "state_dict", "load_state_dict")
_OF_AN_OBJECTIVE = ("unit", "labels", "denominator", "metrics", "evaluate")


def check_data(data: Any, config: object) -> None:
    """Raise TypeError unless ``data`` fits :class:`danlu.protocols.Data`; ``config`` is what opened them."""
    where = f"{type(config).__name__}.open()"
    _has(data, _OF_DATA, where, "Data")
    _has(data.train, _OF_A_LOADER, f"train of {type(data).__name__}", "Loader")
    for name in ("manifest", "sizes"):
        if not isinstance(getattr(data, name), Mapping):
            raise TypeError(f"{where}: {name} must be a mapping, got {type(getattr(data, name)).__name__}")
    if not callable(data.validation):
        raise TypeError(f"{where}: validation must be a method, got {type(data.validation).__name__}")


def check_objective(objective: Any, config: object) -> None:
    """Raise TypeError unless ``objective`` fits :class:`danlu.protocols.Objective` and is a module."""
    where = f"{type(config).__name__}.build()"
    if not isinstance(objective, nn.Module):
        raise TypeError(f"{where} must return a torch.nn.Module, got {type(objective).__name__}")
    _has(objective, _OF_AN_OBJECTIVE, where, "Objective")
    if not isinstance(objective.unit, str):
        raise TypeError(f"{where}: unit must be a word in the plural, got {objective.unit!r}")
    if not isinstance(objective.labels, Mapping):
        raise TypeError(f"{where}: labels must be a mapping, got {type(objective.labels).__name__}")


def check_optimizer(optimizer: Any, objective: nn.Module, config: object) -> None:
    """Raise unless ``optimizer`` is one of torch's that has every trained parameter exactly once."""
    where = f"{type(config).__name__}.build()"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{where} must return one torch.optim.Optimizer, got {type(optimizer).__name__}")
    try:
        check_partition(optimizer.param_groups, objective)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_first_batch(objective: Any, batch: Batch, loss: Any) -> None:
    """Raise unless what an objective makes of the first batch is what the loop can use."""
    kind = type(objective).__name__
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise TypeError(
            f"{kind} must return its loss as a floating-point tensor without dimensions, got {_shown(loss)}"
        )
    if not loss.requires_grad:
        raise ValueError(f"the loss of {kind} depends on no parameter: it has no gradient")
    items = objective.denominator(batch)
    if not isinstance(items, Tensor) or items.dim():
        raise TypeError(f"{kind}.denominator must return a tensor without dimensions, got {_shown(items)}")


def _has(value: Any, names: tuple[str, ...], where: str, protocol: str) -> None:
    lacking = [name for name in names if not hasattr(value, name)]
    if lacking:
        kind = type(value).__name__
        raise TypeError(f"{where} made a {kind}, which lacks {', '.join(lacking)} (see danlu.protocols.{protocol})")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"{value!r:.60} ({type(value).__name__})"
