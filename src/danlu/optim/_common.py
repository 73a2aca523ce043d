"""What the optimizers share: naming parameters in errors, checking groups, restoring state, staying in cache."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu._validate import number

#: Elements of one piece of an elementwise update on a CPU: four float32 operands of this length stay in a 1 MiB cache.
PIECE = 1 << 16


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
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_like(tensor: Any, parameter: Any) -> Tensor:
    """Return a tensor cut over processes as a parameter is: whole tensors are cut, cut ones made whole or cut anew."""
    if not is_dtensor(parameter):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]
    mesh, placements = parameter.device_mesh, parameter.placements
    if is_dtensor(tensor):
        return tensor.redistribute(mesh, placements)  # type: ignore[no-any-return]
    # Every process has the whole of a plain tensor, so nothing has to be sent.
    return sys.modules["torch.distributed.tensor"].distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # type: ignore[no-any-return]


class MomentumOptimizer(Optimizer):
    """An optimizer whose only state is one momentum a parameter, in a format of its own choice.

    A subclass sets ``slot``, what its momentum is called in the state, and ``own``, the attributes that a copy has to
    keep, and implements :meth:`check_options` and :meth:`update`.
    """

    slot: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()
    momentum_dtype: torch.dtype | None = None

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        raise NotImplementedError

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if the optimizer cannot update a parameter."""

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        """Update parameters and momenta of a group in place."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and every parameter in it."""
        super().add_param_group(param_group)
        position, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            self.check_options(f"group {position}: ", group)
            seen: set[int] = set()
            for index, parameter in enumerate(group["params"]):
                name = label(position, group, index)
                if id(parameter) in seen:
                    raise ValueError(f"{name} is in its group twice")
                seen.add(id(parameter))
                if not parameter.is_floating_point():
                    raise TypeError(f"{name} must have a real floating-point dtype, got {parameter.dtype}")
                self.check_parameter(name, parameter, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momenta, in their own format, and options.

        Raises:
            ValueError: the state is of another optimizer, or a momentum has another shape than its parameter.
        """
        members = [
            (parameter, label(position, group, index))
            for position, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
        ]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        momenta: dict[Tensor, Tensor] = {}
        for key, (parameter, name) in zip(keys, members):
            if key not in state_dict["state"]:
                continue
            held = state_dict["state"][key]
            if set(held) != {self.slot} or not isinstance(held[self.slot], Tensor):
                found, kind = ", ".join(held) or "nothing", type(self).__name__
                raise ValueError(f"state_dict is not of {kind}: for {name} it holds {found}, expected {self.slot}")
            if held[self.slot].shape != parameter.shape:
                shapes = f"{tuple(held[self.slot].shape)}, the parameter has {tuple(parameter.shape)}"
                raise ValueError(f"{self.slot} of {name} in state_dict has shape {shapes}")
            momenta[parameter] = held[self.slot]
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's format on loading, which would round a wider momentum.
        for parameter, momentum in momenta.items():
            kept = self.momentum_dtype or parameter.dtype
            moved = momentum.to(parameter.device, kept, copy=True)
            self.state[parameter][self.slot] = placed_like(moved, parameter)

    # torch.compile runs a method of this name outside the graph, so that making the state does not count as a change.
    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                name = label(self.param_groups.index(group), group, index)
                raise TypeError(f"{name} has a sparse gradient; accepted are dense gradients")
            state = self.state[parameter]
            if self.slot not in state:
                kept = self.momentum_dtype or parameter.dtype
                state[self.slot] = torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format)
            params.append(parameter)
            grads.append(parameter.grad)
            momenta.append(state[self.slot])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)
            self.update(group, params, grads, momenta)
        return loss


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors cut alike into short one-dimensional views, whole where they are not all contiguous.

    An elementwise update of several passes over one piece reads memory once; over a whole tensor, once a pass.
    """
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= PIECE or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, first.numel(), PIECE):
        yield tuple(t[start : start + PIECE] for t in flat)
