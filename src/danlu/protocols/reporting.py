"""Where a run's numbers go."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

__all__ = ["Durable", "Record", "Reporter"]


Record: TypeAlias = Mapping[str, Any]
"""The numbers of one logged step: ``step`` and what the trainer and the objective measured, all plain values."""


class Reporter(Protocol):
    """Receives the record of every logged step in order, then is closed.

    >>> class Losses(list[float]):
    ...     def __call__(self, record: Record) -> None:
    ...         self.append(record["loss"])
    ...     def close(self) -> None:
    ...         pass
    >>> reporter: Reporter = Losses()
    >>> reporter({"step": 1, "loss": 2.5})
    """

    def __call__(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish: nothing is reported afterwards."""


@runtime_checkable
class Durable(Protocol):
    """A reporter whose records must be on the disk before the checkpoint that follows them."""

    def flush(self) -> None:
        """Have what was reported written to the disk."""
