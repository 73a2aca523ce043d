"""Where the matrices of a parameter lie among processes, and what the processes have to tell each other of it."""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from danlu.linalg._kernels import fast_matmul_dtype
from danlu.optim._common import is_dtensor

Views = tuple[Tensor, ...]
#: The processes among which a dimension lies, this dimension, and what each of them holds of it.
Shards = tuple[Any, int, tuple[int, ...]]


class Part(NamedTuple):
    """Matrices of one parameter, as far as this process holds them.

    Attributes:
        tensors: views ``(b, rows, columns)`` of the parameter, its gradient, its momentum, and of what else a variant
            keeps for it, which may have one column.
        group: the processes among which the matrices lie; None where they concern this process alone.
        dim: the sharded dimension of the views: 0 matrices, 1 rows, 2 columns. None for replicas.
        lengths: what each process of the group holds of that dimension.
    """

    tensors: Views
    group: Any = None
    dim: int | None = None
    lengths: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many matrices this process has a part of."""
        return self.tensors[0].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a complete matrix."""
        _, rows, columns = self.tensors[0].shape
        return sum(self.lengths) if self.dim == 1 else rows, sum(self.lengths) if self.dim == 2 else columns

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the shape of what a process of the group holds of these rows or columns."""
        shape = list(self.tensors[0].shape)
        if self.dim:
            shape[self.dim] = self.lengths[rank]
        return tuple(shape)

    def slice(self, start: int, length: int) -> "Part":
        """Return ``length`` of the matrices."""
        return self._replace(tensors=tuple(tensor.narrow(0, start, length) for tensor in self.tensors))


def sharing_group(group: Any) -> Any:
    """Return a process group if there is anything to share in it, else None.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("process_group must be a group that this process is in")
    return group if dist.get_world_size(group) > 1 else None


@functools.cache
def _decided_by_first(group: Any, device: torch.device) -> torch.dtype:
    fast = torch.tensor(int(fast_matmul_dtype(device) == torch.bfloat16))
    dist.broadcast(fast, group_src=0, group=group)
    return torch.bfloat16 if fast.item() else torch.float32


def agreed_matmul_dtype(device: torch.device, group: Any) -> torch.dtype:
    """Return :func:`fast_matmul_dtype`, the same in all processes of a group: CPUs measure, and may not agree."""
    if device.type != "cpu" or group is None:
        return fast_matmul_dtype(device)
    return _decided_by_first(group, device)


def sharding(name: str, parameter: Tensor, stacked: int = 0) -> Shards | None:
    """Return (group, dimension, length on each process) of a DTensor's shards; None where each process holds all of it.

    The first ``stacked`` dimensions count matrices. Where they are sharded besides the matrices themselves, the group
    holds the same of them, so that the shards of the matrices are all there is to exchange. Where they are sharded
    more than once, nothing is, and the group is None.

    Raises:
        ValueError: the matrices are sharded over more than one dimension of the mesh, or not into even chunks.
    """
    if not is_dtensor(parameter):
        return None
    tensor: Any = parameter
    mesh = tensor.device_mesh
    cuts = [(axis, p) for axis, p in enumerate(tensor.placements) if mesh.size(axis) > 1 and not p.is_replicate()]
    if not cuts:
        return None
    inside = [(axis, p) for axis, p in cuts if not p.is_shard() or p.dim >= stacked]
    if len(cuts) > 1 and not inside:
        return None, cuts[0][1].dim, ()
    axis, placement = (inside or cuts)[0]
    if len(inside) > 1 or not placement.is_shard():
        placed = f"{name} is placed as {tensor.placements}"
        raise ValueError(
            f"{placed}; accepted is one Shard of its matrices, any of a stack's first dimensions, Replicate"
        )
    world, whole = mesh.size(axis), tensor.shape[placement.dim]
    step = -(-whole // world)
    lengths = tuple(max(0, min(step, whole - rank * step)) for rank in range(world))
    held = tensor.to_local().shape[placement.dim]
    if held != lengths[mesh.get_local_rank(axis)]:
        raise ValueError(f"{name} is placed as {tensor.placements} with {held} of {whole} here; accepted are chunks")
    return mesh.get_group(axis), placement.dim, lengths


def local(tensor: Any, like: Any = None) -> Tensor:
    """Return what this process holds of a tensor, placed as ``like`` (a gradient as its parameter) if that is given."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    if is_dtensor(like) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sum_shards_(sums: Sequence[Tensor], tensors: Sequence[Any], axes: Sequence[Collection[int]]) -> None:
    """Add up, in place, what each process has found of its own shard: one all-reduce a process group for all of them.

    Args:
        sums: of each tensor; alike in shape on the processes.
        tensors: DTensors, or plain tensors, whose sums stay as they are.
        axes: the dimensions of each tensor that were summed over. The shards of the others have sums of their own.
    """
    cut: dict[Any, list[Tensor]] = {}
    for found, tensor, over in zip(sums, tensors, axes):
        for axis, placement in enumerate(tensor.placements if is_dtensor(tensor) else ()):
            if not placement.is_replicate() and placement.dim in over:
                cut.setdefault(tensor.device_mesh.get_group(axis), []).append(found)
    for group, members in cut.items():
        flat = torch.cat([found.flatten() for found in members])
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_(members, views_of(flat, [tuple(found.shape) for found in members]))


def _groups_of(parameter: Any, replicas: Any) -> list[Any]:
    """Return the process groups in which a parameter is exchanged: those of its shards, else that of its replicas."""
    placements = parameter.placements if is_dtensor(parameter) else ()
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    return [parameter.device_mesh.get_group(axis) for axis in cut] or ([] if replicas is None else [replicas])


@functools.cache
def _host_group(group: Any) -> Any:
    """Return a group of the same processes that carries tensors of the host, made by all at their first step."""
    if dist.get_backend(group) == "gloo" or any(device.type == "cpu" for device in group._device_types):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def missing_here(params: Sequence[Tensor], names: Sequence[str], replicas: Any) -> set[int]:
    """Return the places of sharded parameters that have a gradient on another process and none here.

    What each process steps decides what it sends, so that the processes have to know it of each other: one all-reduce
    of a few bytes between the hosts, for each group. A shard without a gradient has a zero one.

    Args:
        params: all the parameters of an optimizer that may be exchanged, the same on all processes.
        names: what errors call them.
        replicas: the processes that hold replicas of what is not sharded; None for none.

    Raises:
        ValueError: a replica has a gradient on some processes only; said on all of them.
    """
    members: dict[Any, list[int]] = {}
    for place, parameter in enumerate(params):
        for group in _groups_of(parameter, replicas):
            members.setdefault(group, []).append(place)
    found: set[int] = set()
    for group, places in members.items():
        have = torch.tensor([params[place].grad is not None or place in found for place in places], dtype=torch.int32)
        count = have.clone()
        dist.all_reduce(count, group=_host_group(group))
        world = dist.get_world_size(group)
        for place, here, there in zip(places, have.tolist(), count.tolist()):
            if not 0 < there < world:
                continue
            if group is replicas:
                raise ValueError(
                    f"{names[place]} has a gradient on {there} of {world} processes that hold replicas of it; accepted "
                    "is on all or none: average zeros where a process has none"
                )
            if not here:
                found.add(place)
    return found


def check_placement(name: str, parameter: Tensor) -> None:
    """Raise ValueError unless each process holds a shard or all of a parameter, and not a term of a sum."""
    placed: tuple[Any, ...] = getattr(parameter, "placements", ())
    if any(placement.is_partial() for placement in placed):
        raise ValueError(f"{name} is placed as {placed}; accepted are Shard and Replicate")


def views_of(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return consecutive views of a flat buffer."""
    sizes = [math.prod(shape) for shape in shapes]
    return [piece.view(shape) for piece, shape in zip(torch.split(flat, sizes), shapes)]
