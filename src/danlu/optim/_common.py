"""What the optimizers share: naming parameters in errors, checking groups, restoring state, staying in cache."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu._validate import number

#: Elements of one piece of an elementwise update on a CPU: four float32 operands of this length (3 MiB) stay in cache.
PIECE = 3 << 16


def label(position: int, group: Mapping[str, Any], index: int) -> str:
    """Return what to call a parameter in an error: its name if it has one, always its group."""
    names = group.get("param_names")
    return f"parameter {names[index] if names else index} of group {position}"


def _of(position: int, group: Mapping[str, Any]) -> str:
    return f" (of {label(position, group, 0)})" if group["params"] else ""


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


def placed_like(tensor: Any, other: Any) -> Tensor:
    """Return a tensor sharded as another is: complete tensors are sharded, sharded ones gathered or sharded anew."""
    if not is_dtensor(other):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]
    mesh, placements = other.device_mesh, other.placements
    if is_dtensor(tensor):
        return tensor.redistribute(mesh, placements)  # type: ignore[no-any-return]
    # Every process has all of a plain tensor, so nothing has to be sent.
    return sys.modules["torch.distributed.tensor"].distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # type: ignore[no-any-return]


class MomentumOptimizer(Optimizer):
    """An optimizer whose state is named tensors of fixed shape for each parameter: one momentum, unless it says else.

    A subclass sets ``slot``, what its momentum is called in the state, or :meth:`slots` for another state, and
    ``own``, the attributes that a copy has to keep, and implements :meth:`check_options` and :meth:`update`.
    """

    slot: ClassVar[str] = ""
    own: ClassVar[tuple[str, ...]] = ()
    momentum_dtype: torch.dtype | None = None

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        raise NotImplementedError

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if the optimizer cannot update a parameter."""

    def slots(self, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        kept = self.momentum_dtype or parameter.dtype
        return {self.slot: torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format)}

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and state of a group in place.

        ``slots`` are lists in the order of :meth:`slots`; there are none where no parameter has a gradient.
        """
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
        """Restore state, in its own dtype, and options.

        Raises:
            ValueError: the state is of another optimizer, or of parameters of other shapes.
        """
        kind = f"state_dict is not of {type(self).__name__}"
        found: dict[Tensor, dict[str, Tensor]] = {}
        for position, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            for index, (parameter, key) in enumerate(zip(group["params"], saved["params"])):
                if key not in state_dict["state"]:
                    continue
                held, name = state_dict["state"][key], label(position, group, index)
                fresh = self.slots(parameter, {**group, **saved})
                if set(held) != set(fresh) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
                    names = f"it holds {', '.join(held) or 'nothing'}, expected {', '.join(fresh)}"
                    raise ValueError(f"{kind}: for {name} {names}")
                for slot, tensor in fresh.items():
                    if held[slot].shape != tensor.shape:
                        shapes = f"{tuple(held[slot].shape)}, expected {tuple(tensor.shape)}"
                        raise ValueError(f"{slot} of {name} in state_dict has shape {shapes}")
                found[parameter] = {
                    slot: placed_like(held[slot].to(tensor.device, tensor.dtype, copy=True), tensor)
                    for slot, tensor in fresh.items()
                }
            # Fewer options are those of an earlier version, more those of a scheduler or a later one.
            lost, strange = set(self.defaults) - set(saved), set(saved) - set(group) - {"initial_lr"}
            if lost and strange:
                options = f"has {', '.join(sorted(strange))}, expected {', '.join(sorted(lost))}"
                raise ValueError(f"{kind}: group {position}{_of(position, group)} {options}")
        known = dict(self.defaults)  # torch adds an option of its own to the defaults while it loads
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for option, value in known.items():
                group.setdefault(option, value)
        # torch casts state to the parameter's dtype on loading, which would round a wider momentum.
        for parameter, state in found.items():
            self.state[parameter].update(state)

    # torch.compile runs a method of this name outside the graph, so that making the state does not count as a change.
    # The lists are flat, since it finds the tensors of a list but not those of dictionaries in it.
    def _init_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], held: list[Tensor]) -> None:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                name = label(self.param_groups.index(group), group, index)
                raise TypeError(f"{name} has a sparse gradient; accepted are dense gradients")
            state = self.state[parameter]
            if not state:
                state.update(self.slots(parameter, group))
            params.append(parameter)
            grads.append(parameter.grad)
            held.extend(state.values())

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
            held: list[Tensor] = []
            self._init_group(group, params, grads, held)
            count = len(held) // max(1, len(params))
            self.update(group, params, grads, *(held[slot::count] for slot in range(count)))
        return loss


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
    for start in range(0, first.numel(), PIECE):
        yield tuple(t[start : start + PIECE] for t in flat)


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors cut alike into views of a few rows; one that has a single row comes whole with every piece."""
    first = tensors[0]
    if first.numel() <= PIECE or not on_cpu(first) or first.ndim == 0:
        yield tensors
        return
    rows = max(1, PIECE * first.shape[0] // first.numel())
    for start in range(0, first.shape[0], rows):
        yield tuple(t if t.shape[0] == 1 else t[start : start + rows] for t in tensors)


def on_cpu(tensor: Tensor) -> bool:
    """Say whether a tensor is complete, in the host's memory, and updated now rather than compiled."""
    return tensor.device.type == "cpu" and not is_dtensor(tensor) and not torch.compiler.is_compiling()


def all_finite(tensor: Tensor) -> Any:
    """Say whether every entry is finite: a bool on a CPU, elsewhere a tensor, without waiting for the device."""
    if on_cpu(tensor):  # if the sum is finite, all are; else it may have overflowed
        return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
    # The largest entry is not finite as soon as one is; a sum could overflow by itself.
    return torch.isfinite(torch.linalg.vector_norm(tensor, float("inf"))) if tensor.numel() else torch.tensor(True)


def finite_or_zero(grad: Tensor) -> Tensor:
    """Return a gradient whose entries that are not finite are zero: itself on a CPU where all are finite."""
    if on_cpu(grad) and all_finite(grad):
        return grad
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def fusable(*tensors: Tensor) -> bool:
    """Say whether the fused kernels of a CPU, which go through the memory of tensors of one dtype, can take these."""
    first = tensors[0]
    return on_cpu(first) and all(t.dtype == first.dtype and t.is_contiguous() for t in tensors)


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
