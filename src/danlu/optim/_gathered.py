"""Matrices sharded over two dimensions of a mesh, as by tensor parallelism and FSDP2 together.

For a step they are gathered over all dimensions of the mesh but one, which leaves shards that the exchanges know. Each
process keeps its own piece of the result.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from danlu._roles import ATTRIBUTES
from danlu.optim._common import is_dtensor
from danlu.optim._layout import layout


def once_sharded(name: str, parameter: Any, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return placements in which one dimension of the mesh shards the matrices of a parameter, the others none of them.

    None where that is so already, or where the parameter is a term of a sum. Of two ordinary shards the first stays,
    which the second has cut further; one that was made before its neighbour's (``_StridedShard``) cannot stay alone.
    """
    if not is_dtensor(parameter):
        return None
    stacked = parameter.ndim - 2 if layout(name, parameter, options).role == "experts" else 0
    mesh, placements = parameter.device_mesh, list(parameter.placements)
    cuts = [axis for axis, p in enumerate(placements) if mesh.size(axis) > 1 and not p.is_replicate()]
    if any(placements[axis].is_partial() for axis in cuts):
        return None
    inside = [axis for axis in cuts if placements[axis].dim >= stacked]
    plain = [axis for axis in inside if placements[axis].is_shard()]
    if len(inside) < 2 and plain == inside:
        return None
    from torch.distributed.tensor import Replicate

    for axis in inside:
        if axis not in plain[:1]:
            placements[axis] = Replicate()
    return tuple(placements)


@contextlib.contextmanager
def gathered(
    params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Sequence[Tensor]], options: Mapping[str, Any]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[list[Tensor]]]]:
    """Give parameters, gradients and state with no matrix sharded twice; what is written to them is kept.

    Each of these tensors is gathered by itself, over one dimension of the mesh.
    """
    placed = [once_sharded(f"parameter {index}", parameter, options) for index, parameter in enumerate(params)]
    taken = [index for index, placements in enumerate(placed) if placements is not None]
    if not taken:
        yield list(params), list(grads), [list(tensors) for tensors in slots]
        return
    kept = [params, *slots]
    wide: list[list[Any]] = [[_moved(t, p, place) for t, p, place in zip(tensors, params, placed)] for tensors in kept]
    yield wide[0], [_moved(t, p, place) for t, p, place in zip(grads, params, placed)], wide[1:]
    for tensors, results in zip(kept, wide):
        for index in taken:
            tensor: Any = tensors[index]
            tensor.to_local().copy_(results[index].redistribute(placements=tensor.placements).to_local())


def _moved(tensor: Any, parameter: Any, placements: tuple[Any, ...] | None) -> Any:
    """Return a tensor that belongs to a parameter in other placements, with what was declared of it."""
    if placements is None:
        return tensor
    # A gradient need not lie as its parameter does; it is placed so first.
    found = tensor.detach().redistribute(placements=parameter.placements).redistribute(placements=placements)
    for attribute in ATTRIBUTES:
        if hasattr(tensor, attribute):
            setattr(found, attribute, getattr(tensor, attribute))
    return found
