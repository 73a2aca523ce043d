"""Batches, the loaders that yield them, and data sets."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from danlu.protocols.config import Config

__all__ = [
    "IGNORE",
    "Batch",
    "Data",
    "DataConfig",
    "ExpectsSizes",
    "KeepsFiles",
    "Loader",
    "ShowsBatch",
    "TakesTokenizer",
    "TokenData",
]


Batch: TypeAlias = Mapping[str, Tensor]
"""What a loader yields and an objective takes: tensors by name, the first dimension counting examples."""

IGNORE = -100
"""Target of a token that has none: it is part of no loss (the number is torch's own ``ignore_index``)."""


class Loader(Protocol):
    """An endless stream of batches whose position is a small state.

    The same position gives the same batches in every process: what is drawn depends on the seed and the position
    alone, so that a resumed run continues with the batch that would have come next.

    >>> import torch
    >>> class Zeros:
    ...     position = 0
    ...     def __next__(self) -> Batch:
    ...         self.position += 1
    ...         return {"x": torch.zeros(2, 3)}
    ...     def state_dict(self) -> Mapping[str, Any]:
    ...         return {"position": self.position}
    ...     def load_state_dict(self, state: Mapping[str, Any]) -> None:
    ...         self.position = state["position"]
    >>> loader: Loader = Zeros()
    >>> next(loader)["x"].shape, loader.state_dict()
    (torch.Size([2, 3]), {'position': 1})
    """

    def __next__(self) -> Batch:
        """Return the next batch: this process's rows of it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the position, in plain values."""

    def load_state_dict(self, state: Any) -> None:
        """Go to a position.

        Raises:
            ValueError: the position is one in other data.
        """


class Data(Protocol):
    """Data made ready for training; what ``DataConfig.open`` returns.

    >>> import torch
    >>> from collections.abc import Iterator
    >>> class Nothing:
    ...     train: Loader
    ...     manifest: Mapping[str, Any] = {"source": "nothing at all"}
    ...     sizes: Mapping[str, int] = {}
    ...     def validation(self, batches: int | None = None) -> Iterator[Batch]:
    ...         yield {"x": torch.zeros(2, 3)}
    >>> len(list(Nothing().validation()))
    1
    """

    @property
    def train(self) -> Loader:
        """Training batches."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the data are, in JSON types.

        Known keys, all optional: ``source`` (one line for people), ``sha256`` (of the content: a run is resumed on the
        same content only), ``bytes``, ``documents``, ``train_tokens`` or ``train_images`` (how many there are in one
        pass), ``warnings`` (sentences), ``classes`` (names).
        """

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes that a network of these data must have, by the name of the field of its configuration.

        They replace those in the model's configuration; a field that is 0 there is a choice and stays.
        """

    def validation(self, batches: int | None = None) -> Iterable[Batch]:
        """Go once through the held-out data, or through ``batches`` batches spread over them: this process's share."""


@runtime_checkable
class TokenData(Data, Protocol):
    """Data of tokens, which know how much text a token stands for."""

    @property
    def byte_lengths(self) -> Tensor | None:
        """int64 ``(vocab,)``: bytes of text that each token stands for; None where tokens are not text."""


@runtime_checkable
class KeepsFiles(Protocol):
    """Data of which a run keeps files, such as a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the files that reading the run's output needs into its folder."""


class DataConfig(Config, Protocol):
    """Configuration of a data set."""

    def open(self, *, seed: int, rank: int, world: int, **others: Any) -> Data:
        """Open the data for process ``rank`` of ``world``, in the order that ``seed`` selects.

        Raises:
            ValueError, OSError, ImportError: the data cannot be read.
        """


@runtime_checkable
class ShowsBatch(Protocol):
    """A configuration of data that knows the shapes of a batch before anything is read."""

    def example(self) -> Batch:
        """Return a batch over all processes, whose numbers mean nothing."""


@runtime_checkable
class ExpectsSizes(Protocol):
    """A configuration of data that knows before they are read what some of their ``sizes`` are going to be."""

    def expected_sizes(self) -> Mapping[str, int]:
        """Return the sizes known so far, by the name of the field of the model's configuration."""


@runtime_checkable
class TakesTokenizer(Protocol):
    """A configuration of text that can be encoded by a tokenizer of somebody else's; ``tokenizer`` is its file."""

    tokenizer: str | None

    def encoded_by(self, tokenizer: str) -> Any:
        """Return the configuration of the same text encoded by the tokenizer in this file."""
