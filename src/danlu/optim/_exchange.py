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

from danlu.optim._sharded import Part, views_of


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
    mine = views_of(outside, [part.held_by(rank) for part in here])
    bucket.accumulate(M, G, mine)
    collecting = dist.all_to_all_single(inside, outside, back, out, group=group, async_op=True)
    yield
    collecting.wait()
    stack = bucket.empty(counts[rank], *bucket.shape)
    pieces = [  # of each part, by the process they come from
        views_of(flat, [part.held_by(source) for part in own]) for source, flat in enumerate(torch.split(inside, back))
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
