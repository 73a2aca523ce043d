"""Several sources of tokens as one stream, in given proportions: which comes next is computed, not drawn or stored."""

import heapq
from collections.abc import Sequence
from math import fsum

import numpy as np
from numpy.typing import NDArray

from danlu._validate import number
from danlu.data.loader import Batch, Loader, assemble
from danlu.data.position import Positioned
from danlu.data.shuffle import keys

__all__ = ["PERIOD", "MixedLoader", "Mixture"]

PERIOD = 10_000
"""Examples after which the order of the sources begins anew; weights are multiples of its inverse."""


class Mixture:
    """From which source each example of a stream is, and how many of that source came before it.

    In each beginning of the stream, every source has had its share to within less than one example; in a window
    anywhere, to within less than two (with more than two sources no order has one everywhere, for most weights).
    This is the earliest deadline first schedule of periodic tasks (Liu and Layland 1973; Baruah et al. 1996): the
    k-th example of a source with the share w is due from position (k - 1) / w on and before k / w.

    Args:
        weights: positive, in any unit; they become multiples of 1 / 10,000.
        seed: where in the period the stream begins.

    Raises:
        ValueError: a weight is not positive, or is too small a share.

    >>> mixture = Mixture([3, 1], seed=0)
    >>> mixture.counts
    (7500, 2500)
    >>> int((mixture.sources(range(10_007, 10_011)) == 0).sum())
    3
    """

    def __init__(self, weights: Sequence[float], *, seed: int = 0) -> None:
        for weight in weights:
            number("weights", weight, low=0, low_open=True)
        self.counts = _rounded(weights)
        self._offset = int(keys("mixture", seed)[0] % np.uint64(PERIOD))
        self._order = _order(self.counts)
        had = np.zeros((PERIOD + 1, len(self.counts)), dtype=np.int64)
        had[1:] = np.cumsum(self._order[:, None] == np.arange(len(self.counts)), axis=0)
        self._had = had

    def sources(self, numbers: range) -> NDArray[np.int64]:
        """Return the source of each of the examples with these numbers."""
        found: NDArray[np.int64] = self._order[(np.arange(numbers.start, numbers.stop) + self._offset) % PERIOD]
        return found

    def before(self, position: int) -> NDArray[np.int64]:
        """Return how many examples of each source come before a position."""
        periods, inside = divmod(position + self._offset, PERIOD)
        found: NDArray[np.int64] = periods * np.array(self.counts) + self._had[inside] - self._had[self._offset]
        return found


def _rounded(weights: Sequence[float]) -> tuple[int, ...]:
    """Shares in 10,000ths that add up to 10,000: rounded down, what is left to the largest remainders."""
    total = fsum(weights)
    exact = [PERIOD * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    nearest = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for n in nearest[: PERIOD - sum(counts)]:
        counts[n] += 1
    for weight, count in zip(weights, counts, strict=True):
        if not count:
            raise ValueError(f"weights: {weight} of {total} is less than one example in {PERIOD:,}")
    return tuple(counts)


def _order(counts: Sequence[int]) -> NDArray[np.int64]:
    """The sources of a period: of those that are due, the one whose time ends first."""
    order = np.empty(PERIOD, dtype=np.int64)
    done = [0] * len(counts)
    waiting: list[tuple[int, int]] = [(0, n) for n in range(len(counts))]  # by when they are due
    due: list[tuple[int, int]] = []  # by when their time ends
    for position in range(PERIOD):
        while waiting and waiting[0][0] <= position:
            _, n = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(done[n] + 1) * PERIOD // counts[n]), n))
        _, n = heapq.heappop(due)
        order[position] = n
        done[n] += 1
        heapq.heappush(waiting, (done[n] * PERIOD // counts[n], n))
    return order


class MixedLoader(Positioned):
    """An endless, deterministic stream of training batches out of several, each in its own shuffled order.

    Args:
        loaders: the sources, of one length and end token; only what they give at a position is used.
        weights: their proportions, see :class:`Mixture`.
        batch: windows in a batch over all ranks together.
        seed: selects the order.
        rank: this process, in ``range(world)``.
        world: number of processes.
        sha256: identity of the sources and their weights, checked on resume.
        pin: put batches in page-locked memory.

    >>> one, two = (Loader(np.full(50, n, dtype=np.uint16), end=0, length=3, batch=1) for n in (1, 2))
    >>> loader = MixedLoader([one, two], [1, 3], batch=8)
    >>> sorted(next(loader)["tokens"][:, 0].tolist())
    [1, 1, 2, 2, 2, 2, 2, 2]
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        weights: Sequence[float],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sha256: str = "",
        pin: bool = False,
    ) -> None:
        self.loaders, self.length, self.end = list(loaders), loaders[0].length, loaders[0].end
        identity: dict[str, int | str] = {"seed": seed, "length": self.length, "sha256": sha256}
        super().__init__(batch, rank=rank, world=world, identity=identity)
        self.mixture = Mixture(weights, seed=seed)
        self.sha256, self.pin = sha256, pin

    @property
    def windows(self) -> int:
        """Examples until some source has been gone through once."""
        counts = self.mixture.counts
        return min(loader.windows * PERIOD // count for loader, count in zip(self.loaders, counts, strict=True))

    def batch_at(self, numbers: range) -> Batch:
        """Return the windows with these numbers as a batch."""
        sources, first = self.mixture.sources(numbers), self.mixture.before(numbers.start)
        rows: NDArray[np.int64] = np.empty((len(numbers), self.length + 1), dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            rows[mine] = self.loaders[source].rows(int(first[source]), int(mine.sum()))
        return assemble(rows, self.end, pin=self.pin)
