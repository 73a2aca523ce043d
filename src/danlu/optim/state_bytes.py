"""The memory that an optimizer keeps between steps, known before the first one."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu._roles import ATTRIBUTES
from danlu.optim._base import MomentumOptimizer
from danlu.optim._sharded import local
from danlu.optim.combined import CombinedOptimizer


@functools.singledispatch
def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the state that this process keeps once every parameter has had a gradient.

    danlu's optimizers are asked for the state of each parameter, on the meta device. Any other one takes a step on
    copies of its parameters there, which needs no memory either.

    Args:
        optimizer: any; it is left as it is.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, or makes its state only after it has called a closure
            (LBFGS) or read a gradient.

    >>> weight = nn.Parameter(torch.zeros(10, 10))
    >>> state_bytes(torch.optim.SGD([weight])), state_bytes(torch.optim.AdamW([weight]))
    (0, 804)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    groups = [{**group, **_PLAIN, "params": _meta(group)} for group in optimizer.param_groups]
    twin = type(optimizer).__new__(type(optimizer))
    started = zip(_trained(optimizer.param_groups), _trained(groups))
    state = {copy: optimizer.state[parameter] for parameter, copy in started if parameter in optimizer.state}
    # Where there is a state already, as Adagrad has from the start, it is what will be held.
    fresh = [p for p in _trained(groups) if p not in state]
    twin.__setstate__({"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups})
    for parameter in fresh:
        parameter.grad = torch.empty_like(parameter)
    for group in groups:
        twin.param_groups = [group]
        try:
            twin.step()
        except (RuntimeError, TypeError) as error:  # it reads a value, which most do after making the state
            if not all(twin.state.get(p) for p in fresh if any(p is member for member in group["params"])):
                raise TypeError(f"{type(optimizer).__name__} does not tell its state before a step: {error}") from error
    return sum(_held(state)) + sum(_held({p: twin.state[p] for p in fresh}))


#: Options that choose an implementation, of which not all run on the meta device; the state is the same.
_PLAIN = {"foreach": False, "fused": False, "capturable": False}


@state_bytes.register
def _(optimizer: MomentumOptimizer) -> int:
    pairs = ((p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    slots = (optimizer.all_slots(_on_meta(parameter), group) for parameter, group in pairs)
    return sum(tensor.nbytes for slot in slots for tensor in slot.values())


@state_bytes.register
def _(optimizer: CombinedOptimizer) -> int:
    return sum(state_bytes(rule) for rule in optimizer.rules)


def _on_meta(parameter: Tensor) -> nn.Parameter:
    """Return what this process holds of a parameter, without memory."""
    here = local(parameter.detach())
    twin = nn.Parameter(torch.empty_like(here, device="meta"), requires_grad=parameter.requires_grad)
    for note in ATTRIBUTES:
        if hasattr(parameter, note):
            setattr(twin, note, getattr(parameter, note))
    return twin


def _meta(group: Mapping[str, Any]) -> list[nn.Parameter]:
    return [_on_meta(parameter) for parameter in group["params"]]


def _trained(groups: list[dict[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


def _held(state: Mapping[Any, Mapping[str, Any]]) -> list[int]:
    """Return the bytes of each tensor in a state."""
    return [local(t).nbytes for each in state.values() for t in each.values() if isinstance(t, Tensor)]
