"""What every loader's position is: how many examples all processes together have taken, one integer."""

from collections.abc import Mapping
from typing import Any, Self

from danlu._validate import integer

__all__ = ["Positioned", "check_shares"]


class Positioned:
    """A loader whose position is one integer, saved with the identity of what it is a position in.

    A position counts the examples of all processes, so that any number of processes may go on from it. What the loader
    gives is a function of the position: a loader adds ``__next__``, which begins with :meth:`take`.

    Args:
        batch: examples in a batch over all processes together; each takes ``batch // world`` of them.
        rank: this process, in ``range(world)``.
        world: number of processes.
        identity: what a saved position must agree in, by name; ``batch`` is added.

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

    def __iter__(self) -> Self:
        return self

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
