"""State of parameters that are divided among processes: where it belongs before it is read, and after."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = ["optimizer_state", "placed"]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with a tensor for everything that it keeps of parameters that are DTensors.

    An optimizer makes its state in its first step. One that has taken none takes it here, with gradients of zero and a
    learning rate of zero; weights and state are to be overwritten by what is read. Parameters that are no DTensors
    need nothing of this: what is read is taken as it is.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if optimizer.state or not any(isinstance(parameter, DTensor) for parameter in parameters):
        return optimizer.state_dict()
    rates = [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for group in groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return optimizer.state_dict()


def placed(state: Any, like: Any) -> Any:
    """Return ``state`` with whole tensors divided as those at the same place of ``like`` are; no process sends any.

    >>> placed({"a": 1, "b": [torch.ones(2)]}, {"a": 2, "b": [torch.zeros(2)]})
    {'a': 1, 'b': [tensor([1., 1.])]}
    """
    if isinstance(state, Mapping):
        there = like if isinstance(like, Mapping) else {}
        return {key: placed(item, there.get(key)) for key, item in state.items()}
    if isinstance(state, list):
        others = like if isinstance(like, list) and len(like) == len(state) else [None] * len(state)
        return [placed(item, other) for item, other in zip(state, others)]
    if isinstance(like, DTensor) and isinstance(state, Tensor) and not isinstance(state, DTensor):
        return distribute_tensor(state.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return state
