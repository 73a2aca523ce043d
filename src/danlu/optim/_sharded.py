"""Matrices shared by several processes: who iterates which, and the exchanges before and after.

Two layouts need more than one process. **Replicas** (data parallelism): every process holds every matrix, each
iterates a share of them, and one all-gather gives all the updates to all. **Cut** matrices (FSDP2, tensor
parallelism): an all-to-all brings the pieces of a matrix to the one process that iterates it, and a second one takes
the pieces of the update back. Matrices of one shape travel together in a bucket, so a bucket costs one collective
or two, whatever the number of its matrices; the sizes may differ from process to process, so that a shard may be
small or empty. While one bucket is iterated, the pieces of the next are on their way in and those of the last on
their way back.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from danlu.linalg._kernels import fast_matmul_dtype
from danlu.optim._common import is_dtensor

Views = tuple[Tensor, ...]


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


class Bucket(NamedTuple):
    """Parts of matrices of one shape and dtype, and the three stages of a step."""

    parts: Sequence[Part]
    shape: tuple[int, int]
    dtype: torch.dtype  # of the iteration, and of what is sent
    most: int  # matrices iterated at once
    cost: float  # of iterating one matrix
    accumulate: Callable[[list[Tensor], list[Tensor], list[Tensor] | None], None]  # momenta, gradients -> directions
    iterate: Callable[[Tensor], Tensor]  # directions -> updates
    apply: Callable[[Sequence[Part], list[Tensor]], None]  # parts, their updates

    @property
    def size(self) -> int:
        """How many matrices it holds."""
        return sum(part.size for part in self.parts)

    def empty(self, *shape: int) -> Tensor:
        """Return memory for directions or updates."""
        return torch.empty(shape, dtype=self.dtype, device=self.parts[0].tensors[0].device)


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


def sharding(name: str, parameter: Tensor, stacked: int = 0) -> tuple[Any, int, tuple[int, ...]] | None:
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
def sum_shards_(sums: Sequence[Tensor], tensors: Sequence[Any], kept: Sequence[int]) -> None:
    """Add up, in place, what each process has found of its own shard: one all-reduce a process group for all of them.

    Args:
        sums: for each tensor, over its dimensions from the ``kept`` first ones on; alike in shape on the processes.
        tensors: DTensors, or plain tensors, whose sums stay as they are.
        kept: how many dimensions of each tensor were not summed over, so that their shards have sums of their own.
    """
    cut: dict[Any, list[Tensor]] = {}
    for found, tensor, first in zip(sums, tensors, kept):
        for axis, placement in enumerate(tensor.placements if is_dtensor(tensor) else ()):
            if not placement.is_replicate() and placement.dim >= first:
                cut.setdefault(tensor.device_mesh.get_group(axis), []).append(found)
    for group, members in cut.items():
        flat = torch.cat([found.flatten() for found in members])
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_(members, _views(flat, [tuple(found.shape) for found in members]))


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


@functools.lru_cache(maxsize=256)
def balance(work: tuple[tuple[int, float], ...], loads: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    """Share out equal matrices so that no process has much more to do than another.

    Args:
        work: for each bucket the number of its matrices and the cost of one.
        loads: what each process has to do anyway.

    Returns:
        For each bucket, how many matrices each process takes. The dearest are given first, each to whoever has least,
        so the largest load exceeds the mean by less than one matrix unless it did so before.

    >>> balance(((3, 1.0), (1, 2.0)), (0.0, 0.0))
    ((1, 2), (1, 0))
    """
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    counts = [[0] * len(loads) for _ in work]
    for index in sorted(range(len(work)), key=lambda i: -work[i][1]):
        number, cost = work[index]
        for _ in range(number):
            load, rank = heap[0]
            counts[index][rank] += 1
            heapq.heapreplace(heap, (load + cost, rank))
    return tuple(map(tuple, counts))


def runs(parts: Iterable[Part], counts: Sequence[int]) -> list[list[Part]]:
    """Cut the matrices of ``parts`` in their order into runs of ``counts`` matrices.

    >>> made = runs([Part((torch.zeros(3, 1, 1),) * 3), Part((torch.zeros(2, 1, 1),) * 3)], (1, 0, 4))
    >>> [[len(part.tensors[0]) for part in run] for run in made]
    [[1], [], [2, 2]]
    """
    found: list[list[Part]] = [[] for _ in counts]
    index, room = 0, counts[0]
    for part in parts:
        start, count = 0, part.size
        while start < count:
            while not room:
                index += 1
                room = counts[index]
            take = min(room, count - start)
            found[index].append(part if take == count else part.slice(start, take))
            start, room = start + take, room - take
    return found


def _even(count: int, most: int) -> list[int]:
    """Return ``count`` as a sum of numbers of at most ``most``."""
    return [*(count // most * [most]), *([count % most] if count % most else [])]


def _columns(parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients and the momenta of parts."""
    return [part.tensors[1] for part in parts], [part.tensors[2] for part in parts]


def _by_part(stack: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the views of a stack that belong to each part."""
    return list(torch.split(stack, [part.size for part in parts]))


def _iterate_(stack: Tensor, bucket: Bucket) -> None:
    """Replace directions by updates, ``bucket.most`` at a time."""
    for chunk in torch.split(stack, bucket.most):
        chunk.copy_(bucket.iterate(chunk))


def step_alone(bucket: Bucket) -> None:
    """Step matrices that are complete here, ``bucket.most`` at a time."""
    for run in runs(bucket.parts, _even(bucket.size, bucket.most)):
        G, M = _columns(run)
        direction = bucket.empty(sum(part.size for part in run), *bucket.shape)
        bucket.accumulate(M, G, _by_part(direction, run))
        bucket.apply(run, _by_part(bucket.iterate(direction), run))


def step_replicas(bucket: Bucket, counts: Sequence[int]) -> Iterator[None]:
    """Step matrices that every process holds, each process iterating its count; yields during the all-gather."""
    group, most = bucket.parts[0].group, max(counts)
    rank = dist.get_rank(group)
    shares = [(owner, share, *_columns(share)) for owner, share in enumerate(runs(bucket.parts, counts)) if share]
    stack = bucket.empty(most, *bucket.shape)
    for owner, share, G, M in shares:
        if owner == rank:
            bucket.accumulate(M, G, _by_part(stack[: counts[rank]], share))
        else:  # momenta are replicas too, so that any one process can write a checkpoint
            bucket.accumulate(M, G, None)
    _iterate_(stack[: counts[rank]], bucket)
    gathered = bucket.empty(len(counts) * most, *bucket.shape)
    sending = dist.all_gather_single(gathered, stack, group=group, async_op=True)
    yield
    sending.wait()
    for owner, share, _, _ in shares:
        bucket.apply(share, _by_part(gathered.narrow(0, owner * most, counts[owner]), share))


def step_cut(bucket: Bucket, counts: Sequence[int]) -> Iterator[None]:
    """Step sharded matrices, each process iterating its count; yields during both all-to-alls."""
    group = bucket.parts[0].group
    rank = dist.get_rank(group)
    shares = runs(bucket.parts, counts)
    here, own = list(itertools.chain(*shares)), shares[rank]
    # What this process sends is ordered by the owner of the matrices, what it receives by the process it comes from.
    out = [sum(math.prod(part.held_by(rank)) for part in share) for share in shares]
    back = [sum(math.prod(part.held_by(source)) for part in own) for source in range(len(counts))]
    outside, inside = bucket.empty(sum(out)), bucket.empty(sum(back))
    G, M = _columns(here)
    mine = _views(outside, [part.held_by(rank) for part in here])
    bucket.accumulate(M, G, mine)
    collecting = dist.all_to_all_single(inside, outside, back, out, group=group, async_op=True)
    yield
    collecting.wait()
    stack = bucket.empty(counts[rank], *bucket.shape)
    pieces = [  # of each part, by the process they come from
        _views(flat, [part.held_by(source) for part in own]) for source, flat in enumerate(torch.split(inside, back))
    ]
    for part, matrices, parted in zip(own, _by_part(stack, own), zip(*pieces)):
        assert part.dim is not None
        torch.cat(parted, dim=part.dim, out=matrices)
    _iterate_(stack, bucket)
    for part, matrices, parted in zip(own, _by_part(stack, own), zip(*pieces)):
        assert part.dim is not None
        torch._foreach_copy_(parted, torch.split(matrices, list(part.lengths), dim=part.dim))
    returning = dist.all_to_all_single(outside, inside, out, back, group=group, async_op=True)
    yield
    returning.wait()
    bucket.apply(here, mine)


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return consecutive views of a flat buffer."""
    sizes = [math.prod(shape) for shape in shapes]
    return [piece.view(shape) for piece, shape in zip(torch.split(flat, sizes), shapes)]


def step_together(
    shared: Iterable[Bucket], own: Iterable[Bucket], loads: Mapping[Any, Sequence[float]], *, bounded: bool
) -> None:
    """Step buckets whose matrices lie among processes, and those that are complete here.

    Args:
        shared: stepped in this order by all the processes of a group.
        own: stepped while exchanges are under way.
        loads: for a group, the cost of what each of its processes holds complete.
        bounded: exchange no more than each process may iterate at once.
    """
    by_group: dict[Any, list[Bucket]] = {}
    for bucket in shared:
        world = dist.get_world_size(bucket.parts[0].group)
        cuts = _even(bucket.size, world * bucket.most) if bounded else [bucket.size]
        members = by_group.setdefault(bucket.parts[0].group, [])
        members.extend(bucket._replace(parts=run) for run in runs(bucket.parts, cuts))
    steps: list[Iterator[None]] = []
    for group, buckets in by_group.items():
        load = tuple(loads.get(group) or dist.get_world_size(group) * [0.0])
        counts = balance(tuple((bucket.size, bucket.cost) for bucket in buckets), load)
        for bucket, count in zip(buckets, counts):
            steps.append((step_replicas if bucket.parts[0].dim is None else step_cut)(bucket, count))
    overlapped([*steps, *(_without_exchange(bucket) for bucket in own)])


def _without_exchange(bucket: Bucket) -> Iterator[None]:
    step_alone(bucket)
    yield from ()


def overlapped(steps: Iterable[Iterator[None]]) -> None:
    """Run steps that yield at their exchanges so that up to three are under way at once.

    The newest begins before the older ones go on, so its exchange runs while they compute. All processes of a group
    have to bring the same steps in the same order.
    """
    running: list[Iterator[None]] = []
    waiting, done = iter(steps), object()
    while True:
        new = next(waiting, None)
        running = ([] if new is None else [new]) + running
        if not running:
            return
        running = [step for step in running if next(step, done) is not done]
