"""Several processes as one trainer: set-up under ``torchrun`` and small collectives.

A process started by hand is a world of one, in which every function here is free.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "barrier", "broadcast", "gather", "group", "init_distributed", "sum_over_ranks", "world"]


@dataclass(frozen=True)
class World:
    """This process's place: ``rank`` of ``size``, and ``local_rank`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def world() -> World:
    """Return this process's place in the process group that was joined, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    return World()


def group() -> Any:
    """Return the process group that was joined; None in a world of one."""
    return dist.group.WORLD if world().size > 1 else None


@contextlib.contextmanager
def init_distributed(device: str = "auto") -> Iterator[World]:
    """Join the processes that ``torchrun`` started (nccl on GPUs, gloo on CPUs) for the length of a block.

    Outside ``torchrun`` this joins nothing. A group that was joined before is used and left as it is.
    """
    if dist.is_available() and not dist.is_initialized() and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield world()
        finally:
            dist.destroy_process_group()
    else:
        yield world()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return ``values`` summed over ranks (a new tensor, or ``values`` itself in a world of one)."""
    if world().size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """Return every rank's ``value`` (any Python object) in order of rank; only rank 0 receives them."""
    place = world()
    if place.size == 1:
        return [value]
    received: list[Any] | None = [None] * place.size if place.main else None
    dist.gather_object(value, received)
    return received or []


def broadcast(value: str) -> str:
    """Return rank 0's ``value`` on every rank."""
    if world().size == 1:
        return value
    carried = [value]
    dist.broadcast_object_list(carried)
    return carried[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world().size > 1:
        dist.barrier()
