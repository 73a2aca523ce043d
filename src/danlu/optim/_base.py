"""The base of danlu's optimizers: checking groups, making and restoring state, rounding, one loop over the groups."""

from collections.abc import Callable, Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.optim._common import is_dtensor, label, placed_like
from danlu.optim._sharded import missing_here
from danlu.optim.rounding import (
    SLOTS,
    Resolution,
    Rounded,
    check_rounded,
    check_rounding,
    rounding_slots,
    store_,
    stream,
    widened,
)

_OF_ROUNDING = frozenset(SLOTS.values())


def _of(position: int, group: Mapping[str, Any]) -> str:
    return f" (of {label(position, group, 0)})" if group["params"] else ""


class MomentumOptimizer(Optimizer):
    """An optimizer whose state is named tensors of fixed shape for each parameter: one momentum, unless it says else.

    A subclass sets ``slot``, what its momentum is called in the state, or :meth:`slots` for another state, and
    ``own``, the attributes that a copy has to keep, and implements :meth:`check_options` and :meth:`update`.
    """

    slot: ClassVar[str] = ""
    own: ClassVar[tuple[str, ...]] = ()
    momentum_dtype: torch.dtype | None = None
    #: Whether the processes that share a parameter exchange anything in a step.
    exchanges: ClassVar[bool] = True
    process_group: Any = None
    _absent: Set[int] = frozenset()
    _watch: Resolution | None = None

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        raise NotImplementedError

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if the optimizer cannot update a parameter."""

    def slots(self, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        kept = self.momentum_dtype or parameter.dtype
        return {self.slot: torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format)}

    def all_slots(self, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, with what its rounding keeps."""
        return {**self.slots(parameter, options), **rounding_slots(parameter, options)}

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
            check_rounding(f"group {position}: ", group)
            self.check_options(f"group {position}: ", group)
            seen: set[int] = set()
            for index, parameter in enumerate(group["params"]):
                name = label(position, group, index)
                if id(parameter) in seen:
                    raise ValueError(f"{name} is in its group twice")
                seen.add(id(parameter))
                if not parameter.is_floating_point():
                    raise TypeError(f"{name} must have a real floating-point dtype, got {parameter.dtype}")
                check_rounded(name, parameter, group)
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
                fresh = self.all_slots(parameter, {**group, **saved})
                held = {**{slot: fresh[slot] for slot in SLOTS.values() if slot in fresh}, **held}  # an older state
                if set(held) != set(fresh) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
                    names = f"it holds {', '.join(held) or 'nothing'}, expected {', '.join(fresh)}"
                    raise ValueError(f"{kind}: for {name} {names}")
                for slot, tensor in fresh.items():
                    if held[slot].shape != tensor.shape:
                        shapes = f"{tuple(held[slot].shape)}, expected {tuple(tensor.shape)}"
                        raise ValueError(f"{slot} of {name} in state_dict has shape {shapes}")
                found[parameter] = {
                    # Into memory that lies as the parameter's: a file keeps no strides, and updates go through views.
                    slot: tensor.copy_(placed_like(held[slot].to(tensor.device, tensor.dtype), tensor))
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
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        held: list[Tensor],
        rests: list[Tensor],
        keys: list[int | None],
    ) -> None:
        absent = self._absent
        position = next(position for position, other in enumerate(self.param_groups) if other is group)
        place = sum(len(other["params"]) for other in self.param_groups[:position])
        for index, parameter in enumerate(group["params"]):
            grad = parameter.grad
            if grad is None and place + index in absent:
                grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if grad is None:
                continue
            if grad.is_sparse:
                name = label(position, group, index)
                raise TypeError(f"{name} has a sparse gradient; accepted are dense gradients")
            state = self.state[parameter]
            if not state:
                state.update(self.all_slots(parameter, group))
            params.append(parameter)
            grads.append(grad)
            if _OF_ROUNDING.isdisjoint(state):
                held.extend(state.values())
                keys.append(None)
                continue
            held.extend(value for slot, value in state.items() if slot not in _OF_ROUNDING)
            rests.extend(value for slot, value in state.items() if slot in _OF_ROUNDING)
            keys.append(stream(type(self).__name__, group["rounding_seed"], place + index))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = (parameter for group in self.param_groups for parameter in group["params"])
        if self.exchanges and (self.process_group is not None or any(map(is_dtensor, everything))):
            self._agree()
        watch = None if torch.compiler.is_compiling() else self._watched()
        if watch is not None:
            watch.before(self.param_groups)
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            held: list[Tensor] = []
            rests: list[Tensor] = []
            keys: list[int | None] = []
            self._init_group(group, params, grads, held, rests, keys)
            rounded: list[Rounded] = []
            wide = list(params)
            for index, (parameter, key) in enumerate(zip(params, keys)):
                if key is not None:
                    slot = rests[len(rounded)]
                    wide[index] = widened(parameter, slot, group["rounding"])
                    rounded.append(Rounded(parameter, wide[index], slot, key))
            count = len(held) // max(1, len(params))
            self.update(group, wide, grads, *(held[slot::count] for slot in range(count)))
            store_(rounded, group["rounding"])
        if watch is not None:
            watch.after()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _agree(self) -> None:
        """Find out which shards have a gradient elsewhere only, which counts as zero here."""
        groups = list(enumerate(self.param_groups))
        params = [parameter for _, group in groups for parameter in group["params"]]
        names = [label(position, group, index) for position, group in groups for index in range(len(group["params"]))]
        self._absent = missing_here(params, names, self.process_group)

    def _watched(self) -> Resolution:
        if self._watch is None:
            self._watch = Resolution(type(self).__name__)
        return self._watch
