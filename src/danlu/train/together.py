"""Several processes that succeed or fail together.

What fails on one process has to end all of them, and be said once: the first process raises it and names the process
that it comes from, the others leave with ``SystemExit(2)``. In a world of one nothing is exchanged.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from danlu.train.distributed import lost, world

__all__ = ["agree", "everyone", "first"]

T = TypeVar("T")


def everyone(do: Callable[[], T], *, group: Any = None, error: type[Exception] = OSError) -> list[T]:
    """Call ``do`` on every process and return what it gave on each, in order of rank, on every process.

    Args:
        do: what each process does; it may use the process group itself.
        group: of the processes; None for all of them.
        error: raised by the first process for what another one raised.

    >>> everyone(lambda: 3)
    [3]
    """
    if world().size == 1:
        return [do()]
    try:
        mine: tuple[T | None, str | None, Exception | None] = do(), None, None
    except Exception as failure:
        mine = None, str(failure) or type(failure).__name__, failure
    received: list[Any] = [None] * dist.get_world_size(group)
    _connected(lambda: dist.all_gather_object(received, mine[:2], group=group), mine[2])
    failed = {rank: said for rank, (_, said) in enumerate(received) if said is not None}
    if not failed:
        return [value for value, _ in received]
    if not world().main:
        raise SystemExit(2) from mine[2]
    if mine[2] is not None:
        raise mine[2]
    raise error("; ".join(f"process {rank}: {said}" for rank, said in failed.items()))


def first(do: Callable[[], T], *, group: Any = None, error: type[Exception] = OSError) -> T:
    """Call ``do`` on the first process only, and return what it gave on every process.

    >>> first(lambda: 3)
    3
    """
    found: T | None = everyone(lambda: do() if world().main else None, group=group, error=error)[0]
    return found  # type: ignore[return-value]


def agree(facts: Mapping[str, str], *, group: Any = None) -> None:
    """Raise ValueError unless ``facts`` are the same on all processes, naming what differs and where.

    >>> agree({"seed": "3"})
    """
    if world().size == 1:
        return
    held = everyone(lambda: dict(facts), group=group)

    def compare() -> None:
        ours = held[0]
        for rank, theirs in enumerate(held):
            for name in {**ours, **theirs}:
                if ours.get(name) != theirs.get(name):
                    has = f"process 0 has {ours.get(name, 'none')}, process {rank} {theirs.get(name, 'none')}"
                    raise ValueError(f"the processes do not agree on {name}: {has}")

    first(compare, group=group)


def _connected(collective: Callable[[], object], failure: Exception | None) -> None:
    """Run a collective; that it fails means that another process has gone."""
    try:
        collective()
    except RuntimeError as error:
        if failure is not None:
            raise failure from error
        raise lost(error) or ConnectionError("another process has ended, or cannot be reached") from error
