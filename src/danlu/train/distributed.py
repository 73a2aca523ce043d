"""Several processes as one trainer: set-up under ``torchrun`` and small collectives.

A process started by hand is a world of one, in which every function here is free.

What ends one process has to end all of them, and be said once: by the first process where it fails too, else by one
that knows why. A process that another one waits for in vain is given up after ``DANLU_TIMEOUT`` seconds.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

__all__ = [
    "World",
    "barrier",
    "broadcast",
    "gather",
    "group",
    "init_distributed",
    "joined",
    "lost",
    "sum_over_ranks",
    "time_limit",
    "world",
]

_DISCONNECTED = re.compile(r"gloo|nccl|c10d|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)
_joined = False


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

    Raises:
        ConnectionError: another process has ended, or has not answered for as long as :func:`time_limit` says.
        ValueError: ``DANLU_TIMEOUT`` is no number of seconds.
    """
    global _joined
    if dist.is_available() and not dist.is_initialized() and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        limit = time_limit()
        try:
            store, rank, size = next(rendezvous("env://", timeout=limit))
            # torchrun may keep its store when it starts processes again: what the ones before said there is not meant.
            attempt = f"danlu {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
        except RuntimeError as error:  # torch.distributed's own errors are among them
            raise ConnectionError(
                f"not all processes could be reached within {limit.total_seconds():g} s: {error}"
            ) from error
        _joined = True
        try:
            yield world()
        except Exception as error:
            said = _said_once(error, store)
            if said is error:
                raise
            raise said from error
        finally:
            dist.destroy_process_group()
    else:
        yield world()


def time_limit() -> timedelta:
    """Return how long a process waits for the others: ``DANLU_TIMEOUT`` seconds, ten minutes where it is not set.

    >>> time_limit()
    datetime.timedelta(seconds=600)
    """
    said = os.environ.get("DANLU_TIMEOUT", "600")
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 10**7:
        raise ValueError(f"DANLU_TIMEOUT must be a number of seconds from 1 to 10000000, got {said!r}")
    return timedelta(seconds=seconds)


def joined() -> bool:
    """Whether this process has been one of several: then what it raises is for people, and it is the only one."""
    return _joined


def _said_once(error: Exception, store: Any) -> BaseException:
    """Return what this process raises for ``error``: a sentence, or nothing where another one has said it."""
    place = world()
    gone = lost(error)
    # Who knows why comes first, and of these the first process; who has only lost another one comes last.
    time.sleep(2.0 * (gone is not None) + 1.0 * (not place.main))
    try:
        speaks = store.add("danlu: said", 1) == 1
        ended, until = store.add("danlu: ended", 1), time.monotonic() + 4.0
        if place.main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            while ended < place.size and time.monotonic() < until:  # the others ask this process, which keeps the store
                time.sleep(0.05)
                ended = store.add("danlu: ended", 0)
    except RuntimeError:  # the store has gone with the process that kept it
        speaks = True
    if not speaks:
        return SystemExit(2)
    if not place.main:
        (gone or error).add_note(f"on process {place.rank}")
    return gone or error


def lost(error: BaseException) -> ConnectionError | None:
    """Return what to say if an error means that another process does not answer; None for another error.

    >>> lost(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    ConnectionError('another process has ended, or cannot be reached; its own message says why, if it had one')
    """
    if isinstance(error, ConnectionError):
        return error
    said = str(error)
    if not isinstance(error, RuntimeError) or not _DISCONNECTED.search(said):
        return None
    if _LATE.search(said):
        return ConnectionError(
            f"another process has not answered in {time_limit().total_seconds():g} s (DANLU_TIMEOUT)"
        )
    return ConnectionError("another process has ended, or cannot be reached; its own message says why, if it had one")


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
