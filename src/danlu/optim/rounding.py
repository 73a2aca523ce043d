"""How a weight of 16 bits is rounded after a step, in one place for every optimizer.

bfloat16 keeps eight digits of a number, so that a step below 2^-9 of a weight rounds back to where it was. With
``rounding`` other than ``nearest`` an optimizer takes its step in float32 and the result is

- ``stochastic``: rounded up or down with the probabilities that make the mean of the rounded weight the float32 one.
  The noise is a function of seed, step, parameter and element (of the whole parameter, however it is sharded): a run
  that is resumed, or spread over other processes, draws the same.
- ``compensated``: rounded to nearest, and the 16 bits that are cut off are kept in the state. Weight and bits together
  are the float32 weight: the steps are those of float32 weights bit by bit, for two bytes a weight. It is Kahan's
  compensation, exact, since a bfloat16 number is the first half of a float32 one.

Sources: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551; Zamirai et al., "Revisiting
BFloat16 Training", arXiv:2010.06192.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu._draws import mixed32
from danlu._roles import ATTRIBUTES
from danlu._validate import choice, integer
from danlu.optim._common import is_dtensor, pieces
from danlu.optim._sharded import local

Rounding = Literal["nearest", "stochastic", "compensated"]
ROUNDINGS = ("nearest", "stochastic", "compensated")

#: What the state of a parameter holds under each rounding.
SLOTS = {"stochastic": "rounding_step", "compensated": "rounding_rest"}


def check_rounding(where: str, options: Mapping[str, Any]) -> None:
    """Raise unless rounding and its seed are in their range; ``where`` begins the message."""
    choice(f"{where}rounding", options["rounding"], ROUNDINGS)
    integer(f"{where}rounding_seed", options["rounding_seed"], low=0)


def check_rounded(name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
    """Raise if a parameter is of a dtype that only ``nearest`` rounds to."""
    if options["rounding"] != "nearest" and parameter.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        kept = f"{name} is {parameter.dtype}; rounding={options['rounding']!r} is for bfloat16 parameters"
        raise TypeError(f"{kept} (float32 and float64 ones are left as they are): cast it, or take rounding='nearest'")


def rounding_slots(parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is kept of a parameter for its rounding, before the first step; nothing for wider dtypes."""
    rounding = options.get("rounding", "nearest")
    if rounding == "nearest" or parameter.dtype != torch.bfloat16:
        return {}
    if rounding == "stochastic":
        return {SLOTS[rounding]: torch.zeros((), dtype=torch.int64, device=parameter.device)}
    rest = torch.zeros_like(parameter, dtype=torch.int16, memory_format=torch.preserve_format)
    return {SLOTS[rounding]: rest.requires_grad_(False)}


class Rounded(NamedTuple):
    """A parameter that is stepped in float32."""

    parameter: Tensor
    wide: Tensor
    slot: Tensor
    key: int


def stream(kind: str, seed: int, place: int) -> int:
    """Return the 64 bits that tell one parameter's noise from another's."""
    digest = hashlib.blake2b(f"{kind} {seed} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def widened(parameter: Tensor, slot: Tensor, rounding: str) -> Tensor:
    """Return the float32 value of a bfloat16 parameter, placed and declared as it is."""
    wide = parameter.detach().float()
    if rounding == "compensated":
        for kept, rest, out in pieces(local(parameter.detach()), local(slot), local(wide)):
            # A weight that somebody has set to zero since has no neighbour below to which its rest could belong.
            rest = torch.where(kept == 0, rest.clamp(min=0), rest)
            out.copy_((_bits(kept.float()) + rest).view(torch.float32))
    for note in ATTRIBUTES:
        if hasattr(parameter, note):
            setattr(wide, note, getattr(parameter, note))
    return wide


def store_(rounded: Sequence[Rounded], rounding: str) -> None:
    """Round what an update has made of the float32 values into the parameters."""
    for one in rounded:
        kept, wide = local(one.parameter.detach()), local(one.wide)
        if rounding == "compensated":
            for p, w, rest in pieces(kept, wide, local(one.slot)):
                bits = _bits(w)
                top = (bits + 0x8000) & -0x10000
                rest.copy_(torch.where(torch.isfinite(w), bits - top, 0))
                p.copy_(torch.where(torch.isfinite(w), top.view(torch.float32), w))
            continue
        one.slot.add_(1)
        start, places = _places(one.parameter)
        keys = _keys(one.key, one.slot)
        for p, w, *own in pieces(kept, wide, *places):
            index = own[0] if own else _range(start, p)
            top = (_bits(w) + (_noise(index, *keys) & 0xFFFF)) & -0x10000
            p.copy_(torch.where(torch.isfinite(w), top.view(torch.float32), w))
            start += p.numel()


def _bits(wide: Tensor) -> Tensor:
    return wide.view(torch.int32)


def _range(start: int, like: Tensor) -> Tensor:
    """Return the numbers of the elements of ``like``, in rows, when the first one has the number ``start``."""
    # Beyond 2^32 elements the numbers, and the noise with them, begin again.
    kind = torch.int32 if start + like.numel() < 2**31 else torch.int64
    return torch.arange(start, start + like.numel(), dtype=kind, device=like.device).to(torch.int32).view(like.shape)


def _places(parameter: Any) -> tuple[int, list[Tensor]]:
    """Return the number of the first element that this process holds, or, where they do not follow, all numbers."""
    if not is_dtensor(parameter):
        return 0, []
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    strides = [math.prod(parameter.shape[axis + 1 :]) for axis in range(parameter.ndim)]
    start = sum(offset * stride for offset, stride in zip(offsets, strides))
    if tuple(held[1:]) == tuple(parameter.shape[1:]):
        return start, []
    found = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for size, offset, stride in zip(held, offsets, strides):
        found = found.unsqueeze(-1) + (torch.arange(size, device=found.device) + offset) * stride
    return 0, [found.to(torch.int32)]


def _keys(key: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a parameter's stream and step contribute to the noise, without reading the step."""
    low, high = (part - 2**32 if part >= 2**31 else part for part in (key & 0xFFFFFFFF, key >> 32))
    first = mixed32(step.to(torch.int32) ^ low)
    return first, mixed32(first ^ high)


def _noise(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return 32 random bits for each element's number."""
    return mixed32(index ^ first, second)


class Resolution:
    """Warns, once, when most of the 16-bit weights that have a gradient are not changed by a step.

    It looks at a few thousand entries of each parameter in the first steps. On a device it reads its count when that
    has arrived, so that nothing waits.
    """

    STEPS, ENTRIES = 4, 4096

    def __init__(self, name: str) -> None:
        self.name, self.left = name, self.STEPS
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._arriving: list[tuple[Any, Tensor]] = []

    def before(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember some entries of the parameters that are about to be rounded to nearest."""
        self._seen = []
        for group in groups if self.left > 0 else ():
            resting = group.get("accumulate", 1) - 1 != group.get("micro_step", 0)  # weights that stay on purpose
            still = not isinstance(group["lr"], Tensor) and group["lr"] == 0
            if resting or still or group.get("rounding", "nearest") != "nearest":
                continue
            for parameter in group["params"]:
                if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.grad is not None:
                    entries, grads = self._some(parameter), self._some(parameter.grad)
                    if len(entries) == len(grads):  # sharded alike
                        self._seen.append((parameter, entries.clone(), grads != 0))
        self.left -= bool(self._seen)

    def after(self) -> None:
        """Compare, and warn if most entries have stayed."""
        if self._seen:
            moving = [(self._some(p) != entries) & trained for p, entries, trained in self._seen]
            device = moving[0].device
            counts = [(m.sum().to(device), t.sum().to(device)) for m, (_, _, t) in zip(moving, self._seen)]
            found = torch.stack([torch.stack(column).sum() for column in zip(*counts)])
            self._seen = []
            if device.type == "cuda":
                there = torch.empty(2, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._arriving.append((event, there))
            else:
                self._judge(found)
        while self._arriving and self._arriving[0][0].query():
            self._judge(self._arriving.pop(0)[1])

    def _some(self, tensor: Any) -> Tensor:
        flat = local(tensor.detach()).reshape(-1)
        return flat[:: max(1, flat.numel() // self.ENTRIES)]

    def _judge(self, counts: Tensor) -> None:
        moved, trained = counts.tolist()
        if self.left >= 0 and 2 * moved < trained:
            self.left = -1
            self._arriving = []
            warnings.warn(
                f"a step of {self.name} changed {moved / trained:.0%} of the 16-bit weights that have a gradient: the "
                "updates of the others are below the resolution of their dtype and are lost. Take rounding="
                "'stochastic' or 'compensated', a larger learning rate, or weights in float32",
                stacklevel=5,
            )


def watch_resolution(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], name: str) -> None:
    """Let an optimizer of torch's, or one that steps it, warn as danlu's own do."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for group in groups for p in group["params"]):
        watch = Resolution(name)
        optimizer.register_step_pre_hook(lambda *_: None if torch.compiler.is_compiling() else watch.before(groups))
        optimizer.register_step_post_hook(lambda *_: None if torch.compiler.is_compiling() else watch.after())
