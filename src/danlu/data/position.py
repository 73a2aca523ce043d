"""What every loader's position is: how many examples all processes together have taken, one integer."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from danlu._validate import integer
from danlu.protocols import Batch

__all__ = ["Positioned", "check_shares", "shares"]


class Positioned:
    """A loader whose position is one integer, saved with the identity of what it is a position in.

    A position counts the examples of all processes, so that any number of processes may go on from it. What the loader
    gives is a function of the position: a loader adds :meth:`batch_at`. Therefore the next batch can be made ahead, in
    a thread, while the one before is trained on: set ``prefetch``. The position stays that of the batches handed out.

    Args:
        batch: examples in a batch over all processes together; each takes ``batch // world`` of them.
        rank: this process, in ``range(world)``.
        world: number of processes.
        identity: what a saved position must agree in, by name; ``batch`` is added.

    Attributes:
        prefetch: whether one thread makes the next batch while this one is used. It must draw from no generator.

    >>> loader = Positioned(4, rank=1, world=2, identity={"seed": 7})
    >>> loader.take(), loader.take()
    (range(2, 4), range(6, 8))
    >>> loader.state_dict()
    {'position': 8, 'seed': 7, 'batch': 4}
    """

    def __init__(self, batch: int, *, rank: int, world: int, identity: Mapping[str, int | str]) -> None:
        check_shares(batch, rank, world)
        self.batch, self.rank, self.world = batch, rank, world
        self.position = 0
        self._identity = {**identity, "batch": batch}
        self.prefetch = False
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[range, Future[Batch]] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return this process's examples of the next batch."""
        mine = self.take()
        if not self.prefetch:
            return self.batch_at(mine)
        # The thread, which Python ends with the loader or the program, makes every batch: a loader may keep what it
        # computed for the last one.
        self._thread = self._thread or ThreadPoolExecutor(1, "danlu-data")
        if self._ahead is None or self._ahead[0] != mine:
            self._ahead = mine, self._thread.submit(self.batch_at, mine)
        batch = self._ahead[1].result()
        following = range(mine.start + self.batch, mine.stop + self.batch)
        self._ahead = following, self._thread.submit(self.batch_at, following)
        return batch

    def batch_at(self, numbers: range) -> Batch:
        """Return the examples with these numbers, which one batch takes for one process."""
        raise NotImplementedError(f"{type(self).__name__} must say what its examples are")

    def take(self) -> range:
        """Return the numbers of this process's examples of the next batch, and go past that batch."""
        share = self.batch // self.world
        first = self.position + self.rank * share
        self.position += self.batch
        return range(first, first + share)

    def state_dict(self) -> dict[str, int | str]:
        """Return the position and what it is a position in; plain integers and strings."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, at a cost that does not depend on where that was.

        The number of processes may differ.

        Raises:
            ValueError: the state is of other data, another seed or batch.
        """
        for name, here in self._identity.items():
            if state.get(name) != here:
                raise ValueError(f"cannot resume: {name} was {state.get(name)!r} when saved and is {here!r} now")
        integer("position", state.get("position"), low=0)
        self.position = state["position"]


def check_shares(batch: int, rank: int, world: int) -> None:
    """Raise unless ``batch`` can be shared among ``world`` processes of which ``rank`` is one."""
    integer("batch", batch)
    integer("world", world)
    integer("rank", rank, low=0, high=world - 1)
    if batch % world:
        raise ValueError(f"batch is shared among {world} processes and must be a multiple of {world}, got {batch}")


def shares(total: int, batch: int, rank: int, world: int) -> Iterator[range]:
    """Yield the examples that process ``rank`` of ``world`` has of each batch of a pass through ``range(total)``.

    Every ``world``-th, from ``rank`` on. All processes have as many batches, since each takes part in every forward
    pass: a rest of fewer examples than processes joins the batch before it.

    Raises:
        ValueError: fewer examples than processes.

    >>> list(shares(9, 4, 1, 2))
    [range(1, 4, 2), range(5, 9, 2)]
    """
    if total < world:
        raise ValueError(f"validation needs an example for each of {world} processes, got {total}")
    for first in range(0, total, batch):
        last = total - first - batch < world  # what is left after this batch is too little for a batch of its own
        yield range(first + rank, total if last else first + batch, world)
        if last:
            return
