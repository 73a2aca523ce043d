"""Batches of examples that fit in memory or in a memory map: an endless stream whose position is one integer."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._draws import start
from danlu.data.loader import Batch
from danlu.data.position import Positioned
from danlu.data.shuffle import keys, permute

Prepare = Callable[[Batch, Tensor], Batch]


class ExampleLoader(Positioned):
    """An endless, deterministic stream of batches of examples.

    An epoch visits every example once, in an order that is a function of ``(seed, epoch)``; the state is the number of
    examples taken by all ranks together.

    Args:
        examples: tensors with the same first dimension, by name.
        batch: examples in a batch over all ranks together; each rank takes ``batch // world`` of them.
        seed: selects the order.
        rank: this process, in ``range(world)``.
        world: number of processes.
        sha256: identity of the examples, checked on resume.
        pin: put batches in page-locked memory.
        prepare: called with the rows of a batch and a key for each, int64 ``(rows,)``, that is a function of seed and
            position, gives what the stream yields.

    >>> loader = ExampleLoader({"x": torch.arange(3)}, batch=3, seed=1)
    >>> sorted(next(loader)["x"].tolist())
    [0, 1, 2]
    """

    def __init__(
        self,
        examples: dict[str, Tensor],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sha256: str = "",
        pin: bool = False,
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__(batch, rank=rank, world=world, identity={"seed": seed, "sha256": sha256})
        sizes = {name: len(tensor) for name, tensor in examples.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"examples must be tensors with the same first dimension of at least 1, got {sizes}")
        self.examples, self.size = examples, next(iter(sizes.values()))
        self.seed, self.sha256, self.pin, self.prepare = seed, sha256, pin, prepare

    def batch_at(self, numbers: range) -> Batch:
        """Return the examples with these numbers as a batch."""
        rows = torch.from_numpy(self._rows(numbers.start, len(numbers)))
        batch = {name: tensor[rows] for name, tensor in self.examples.items()}
        if self.prepare is not None:
            batch = self.prepare(batch, start("prepare", self.seed) + torch.arange(numbers.start, numbers.stop))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, all ranks together."""
        return self.position / self.size

    def _rows(self, position: int, count: int) -> NDArray[np.int64]:
        epoch, index = np.divmod(np.arange(position, position + count), self.size)
        parts = [
            permute(index[epoch == e], self.size, keys("examples", self.seed, e)) for e in np.unique(epoch).tolist()
        ]
        return np.concatenate(parts)
