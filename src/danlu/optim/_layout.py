"""Which matrices a parameter consists of: role, split, orientation, layout in memory and place among processes."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from danlu._roles import MATRIX_ROLES, Split, check_layout, declared, normal_split, oriented, rows_of
from danlu.optim._sharded import Part, Shards, Views, local, sharding


class Layout(NamedTuple):
    """How the matrices of a parameter lie in it."""

    role: str
    split: Split = None
    transposed: bool = False  # inputs before outputs


def layout(name: str, parameter: Tensor, options: Mapping[str, Any]) -> Layout:
    """Return the layout that holds for a parameter; raise if it is nothing Muon can update."""
    own_role, own_split, own_transposed = declared(name, parameter)
    shape = tuple(parameter.shape)
    role = options["role"] or own_role or {2: "matrix", 3: "experts"}.get(parameter.ndim)
    if role is None or role not in MATRIX_ROLES:
        kind = f"is declared {role!r}" if role else f"has {parameter.ndim} dimension{'s' * (parameter.ndim != 1)}"
        hint = (
            "set the group's role to 'conv' to flatten it"
            if parameter.ndim > 3
            else "give it to AdamW, or build both by MuonConfig"
        )
        raise ValueError(f"{name} of shape {shape} {kind}; Muon takes matrices and stacks of them: {hint}")
    if parameter.ndim < (3 if role == "experts" else 2) or (role == "matrix" and parameter.ndim > 2):
        raise ValueError(f"{name} of shape {shape} cannot have the role {role!r}")
    transposed = own_transposed if options.get("transposed") is None else options["transposed"]
    split = options["split"] if options["split"] is not None else own_split
    split = tuple(split) if isinstance(split, list) else split
    check_layout(name, role, split, shape, transposed=bool(transposed))
    return Layout(role, normal_split(split), bool(transposed))


def blocks(tensor: Tensor, layout: Layout, *, channels_last: bool) -> list[Tensor]:
    """Return ``(b, m, n)`` views of the matrices in a parameter, one entry for each height that ``split`` asks for."""
    role, split, transposed = layout
    if role == "conv":
        # The order of the columns is free (msign commutes with permutations), so any dense layout has its own view.
        order = tensor.movedim(1, -1) if channels_last else tensor
        tensor = order.flatten(1)
    if role != "experts":
        tensor = tensor.unsqueeze(0)
    elif tensor.ndim > 3:
        tensor = tensor.flatten(0, -3)
    if transposed:
        tensor = tensor.mT
        if isinstance(split, int) and role == "experts":  # columns of one matrix after another have no common stride
            split = split * (tensor.shape[1] // split,)
    if split is None:
        return [tensor]
    if isinstance(split, int):
        return [tensor.unflatten(1, (split, tensor.shape[1] // split)).flatten(0, 1)]
    return list(torch.split(tensor, list(split), dim=1))


def parts(name: str, tensors: Views, layout: Layout, group: Any) -> Iterator[Part]:
    """Yield the matrices of a parameter and of the tensors shaped like it, as far as this process holds them.

    Args:
        name: what errors call the parameter.
        tensors: the parameter first, then its gradient, its momentum and what else is kept for it, plain or DTensors.
        layout: what the function :func:`layout` returned.
        group: the processes that hold a replica of what is not sharded; None for none.
    """
    role, split, transposed = layout
    whole = tensors[0]
    shard = sharding(name, whole, whole.ndim - 2 if role == "experts" else 0)
    held = [local(tensor, whole) for tensor in tensors]
    last = role == "conv" and not held[0].is_contiguous()
    if role == "conv" and transposed:
        yield _turned_kernel(name, [t.movedim(1, -1) if last else t for t in held], split, whole.shape, shard, group)
        return
    row_axis = (whole.ndim - 2 if role == "experts" else 0) + transposed
    rows_cut = shard is not None and shard[1] == row_axis
    # What is left of the rows of a shard need not be a multiple of anything: its blocks are cut further below.
    seen = layout._replace(split=None) if rows_cut else layout
    views = list(zip(*(blocks(t, seen, channels_last=last) for t in held)))
    if shard is None:
        yield from (Part(view, group) for view in views)
        return
    group, axis, lengths = shard
    if group is None:  # complete here, though others have more of the stack
        yield from (Part(view) for view in views)
    elif rows_cut:
        rows = rows_of(role, oriented(whole.shape, transposed))
        yield from _cut_rows(views[0], group, lengths, _heights(split, rows))
    elif role == "experts" and axis < whole.ndim - 2:
        joined = split if isinstance(split, int) and len(views) == 1 else 1
        inner = math.prod(whole.shape[:-2]) // whole.shape[axis] * joined
        yield from (Part(view, group, 0, tuple(inner * length for length in lengths)) for view in views)
    else:
        inner = 1 if role != "conv" else math.prod(whole.shape[1:]) // whole.shape[axis]
        yield from (Part(view, group, 2, tuple(inner * length for length in lengths)) for view in views)


def _turned_kernel(
    name: str, held: Sequence[Tensor], split: Any, shape: tuple[int, ...], shard: Shards | None, group: Any
) -> Part:
    """Return the maps in the kernel of a transposed convolution: inputs first, one group of them after another.

    The rows of a map are all other dimensions together, in whatever order: msign commutes with permutations.
    """
    each = shape[0] // (split or 1)
    if shard is not None and shard[0] is not None and split and not shard[1] and any(n % each for n in shard[2]):
        raise ValueError(
            f"{name} of shape {tuple(shape)} holds {split} maps of {each} inputs, sharded into {shard[2]}; accepted "
            "are whole maps on every process, or a shard of another dimension"
        )
    if split:
        view = tuple(t.flatten(1).unflatten(0, (t.shape[0] // each, each)).mT for t in held)
    else:
        view = tuple(t.flatten(1).unsqueeze(0).mT for t in held)
    if shard is None:
        return Part(view, group)
    group, axis, lengths = shard
    if group is None:
        return Part(view)
    if axis:
        inner = math.prod(shape[1:]) // shape[axis]
        return Part(view, group, 1, tuple(inner * length for length in lengths))
    if split:
        return Part(view, group, 0, tuple(length // each for length in lengths))
    return Part(view, group, 2, lengths)


def _heights(split: Split, rows: int) -> tuple[int, ...]:
    """Return the heights of all blocks."""
    return split if isinstance(split, tuple) else (split or 1) * (rows // (split or 1),)


def _cut_rows(view: Views, group: Any, lengths: tuple[int, ...], heights: tuple[int, ...]) -> Iterator[Part]:
    """Yield the blocks of matrices whose rows are sharded: one that lies on one process alone as complete there."""
    rank, start = dist.get_rank(group), 0
    ends = list(itertools.accumulate(lengths))
    begin = ends[rank] - lengths[rank]
    for height in heights:
        stop = start + height
        inside = tuple(max(0, min(stop, end) - max(start, end - size)) for end, size in zip(ends, lengths))
        offset = min(max(start - begin, 0), lengths[rank])
        held = tuple(tensor.narrow(1, offset, inside[rank]) for tensor in view)
        if max(inside) < height:
            yield Part(held, group, 1, inside)
        else:
            if not inside[rank]:  # no matrix, of the shape that the others see
                held = tuple(tensor.new_empty((0, height, tensor.shape[2])) for tensor in view)
            yield Part(held, group, 0, tuple(view[0].shape[0] * (size == height) for size in inside))
        start = stop
