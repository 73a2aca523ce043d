"""Random numbers for objectives: functions of the number of an example, the same however a run is divided.

The loop numbers the examples of a run (``batch["position"]``), and :func:`keys_of` gives a batch's numbers as keys for
:func:`uniform`, :func:`normal`, :func:`integers` and :func:`bernoulli`; :func:`derived` gives other keys for a second
draw of the same name. An objective that is used alone gets keys from torch's generator.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from danlu._draws import bernoulli, derived, fresh, integers, normal, start, uniform
from danlu.protocols import Batch

__all__ = ["bernoulli", "derived", "integers", "keys_of", "normal", "numbered", "uniform"]


def keys_of(batch: Batch, like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return one key for each row of ``like``, int64, on its device: ``batch["position"]``, else ones freshly drawn."""
    if "position" in batch:
        return batch["position"].to(like.device, non_blocking=True)
    return fresh(len(like), device=like.device, generator=generator)


def numbered(batches: Iterable[Batch], *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield batches of an evaluation with the numbers of their examples, where they have none.

    Each process is taken to have every ``world``-th row of each batch, from row ``rank`` on.

    >>> batches = [{"x": torch.zeros(2)}, {"x": torch.zeros(1)}]
    >>> places = [batch["position"] - start("validation", 0) for batch in numbered(batches, rank=1, world=2)]
    >>> [place.tolist() for place in places]
    [[1, 3], [5]]
    """
    first, seen = start("validation", 0) + rank, 0
    for batch in batches:
        value = next(iter(batch.values()))
        if "position" in batch:
            yield batch
            continue
        rows = len(value)
        yield {**batch, "position": first + world * torch.arange(seen, seen + rows, device=value.device)}
        seen += rows
