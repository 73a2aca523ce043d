"""Where image files come from: folders, CSV tables, tar shards and Hugging Face data sets; and how they are decoded.

Nothing that is read can run code: images are decoded by Pillow, tables and shards are read as text and bytes.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from danlu.data.paths import expand

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LARGEST = 178_956_970  # pixels; Pillow's own bound against files that unpack to fill the memory


class Picture(NamedTuple):
    """An encoded image: what it is called in messages, where its bytes are, and its class or None."""

    name: str
    data: bytes | Path
    label: str | None

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data


def find_pictures(paths: Sequence[str], *, image_field: str = "image", label_field: str = "label") -> Iterator[Picture]:
    """Yield the images behind ``paths``, in a fixed order, without decoding them.

    ====================================  ==========================================================================
    path                                  images and their classes
    ====================================  ==========================================================================
    a folder                              image files at every depth; the class is the folder at the first level
    a ``.csv`` file                       a row an image: its path (relative to the table) and its class
    a ``.tar`` file                       WebDataset: files of one name before the first dot are one sample, its
                                          class in ``.cls``, ``.txt`` or under ``label_field`` in ``.json``
    a ``.parquet`` file, or a folder      a Hugging Face data set, with the package datasets; the training split
    made by ``save_to_disk``              where there are several
    an image file, a glob                 that file; every file or folder that matches
    ====================================  ==========================================================================

    Args:
        paths: what to read.
        image_field, label_field: columns of a table or a data set, key of a JSON file.

    Raises:
        FileNotFoundError: a path does not exist, or a glob matches nothing.
        ValueError: no images, a table without those columns, or another kind of file.
        ImportError: a Hugging Face data set, and the package datasets is not installed.
    """
    for path, _ in expand(paths):
        yield from _open(path, image_field, label_field)


def _open(path: Path, image_field: str, label_field: str) -> Iterator[Picture]:
    suffix = path.suffix.lower()
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return _hugging_face(path, image_field, label_field)
        return _folder(path)
    if suffix == ".csv":
        return _table(path, image_field, label_field)
    if suffix == ".tar":
        return _shard(path, label_field)
    if suffix == ".parquet":
        return _hugging_face(path, image_field, label_field)
    if suffix in SUFFIXES:
        return iter([Picture(str(path), path, None)])
    raise ValueError(
        f"{path} is not a folder, an image ({', '.join(SUFFIXES)}), a .csv table, a .tar shard or a .parquet file"
    )


def _folder(root: Path) -> Iterator[Picture]:
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix.lower() in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in parts):
            yield Picture(str(path), path, parts[0] if len(parts) > 1 else None)


def empty_folders(paths: Sequence[str]) -> list[str]:
    """Return the class folders of the folders among ``paths`` that hold no image."""
    found = []
    for root in (Path(given).expanduser() for given in paths):
        if root.is_dir():
            folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
            found += [str(p) for p in folders if not any(file.suffix.lower() in SUFFIXES for file in p.rglob("*"))]
    return found


def _table(path: Path, image_field: str, label_field: str) -> Iterator[Picture]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        columns = list(rows.fieldnames or ())
        if image_field not in columns:
            raise ValueError(
                f"{path} has the columns {', '.join(columns) or '(none)'} and not {image_field!r}; set image_field "
                "(and label_field) to the ones that hold the file and its class"
            )
        for row in rows:
            if name := row[image_field]:
                yield Picture(f"{path}: {name}", path.parent / name, row.get(label_field) or None)


def _shard(path: Path, label_field: str) -> Iterator[Picture]:
    """Yield the samples of a WebDataset shard: consecutive members of one key, in their order."""

    def sample(key: str, parts: dict[str, bytes]) -> Iterator[Picture]:
        suffix = next((s for s in parts if f".{s}" in SUFFIXES), None)
        if suffix is not None:
            yield Picture(f"{path}: {key}.{suffix}", parts[suffix], _label(f"{path}: {key}", parts, label_field))

    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if f"{folder}/{stem}" != key:
                    yield from sample(key, parts)
                    key, parts = f"{folder}/{stem}", {}
                content = shard.extractfile(member)
                if content is not None:
                    parts[suffix.lower()] = content.read()
    except tarfile.TarError as problem:
        raise ValueError(f"{path} cannot be read as a tar file: {problem}") from None
    yield from sample(key, parts)


def _label(name: str, parts: dict[str, bytes], label_field: str) -> str | None:
    for suffix in ("cls", "txt"):
        if suffix in parts:
            return parts[suffix].decode("utf-8", "replace").strip()
    if "json" in parts:
        try:
            value = json.loads(parts["json"])[label_field]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{name}.json is no JSON object with the key {label_field!r}; set label_field") from None
        return str(value)
    return None


def _hugging_face(path: Path, image_field: str, label_field: str) -> Iterator[Picture]:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{path} is a Hugging Face data set: pip install 'danlu[datasets]'") from None
    if path.is_dir():
        rows: Any = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            rows = rows["train" if "train" in rows else next(iter(rows))]
    else:
        rows = datasets.Dataset.from_parquet(str(path))
    if image_field not in rows.column_names:
        raise ValueError(
            f"{path} has the columns {', '.join(rows.column_names)} and not {image_field!r}; set image_field "
            "(and label_field) to the ones that hold the image and its class"
        )
    # Bytes as they are stored, so that a bad one is reported like any other bad file.
    rows = rows.cast_column(image_field, datasets.Image(decode=False))
    labelled = label_field in rows.column_names
    names = getattr(rows.features.get(label_field), "names", None)
    for index, row in enumerate(rows):
        image, label = row[image_field], row[label_field] if labelled else None
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"])
        text = None if label is None else str(names[label] if names and isinstance(label, int) else label)
        yield Picture(f"{path}: row {index}", data, text)


def is_gray(data: bytes) -> bool | None:
    """Whether an image has no colours, by its header; None if it has no header that can be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
    except Exception:  # Pillow raises what its many decoders happen to raise
        return None


def decode(data: bytes, *, size: int, channels: int, fit: str) -> NDArray[np.uint8]:
    """Return an image as ``(channels, size, size)``.

    Turned as its camera says, what is transparent on white, resampled by Lanczos' filter.

    Args:
        data: the bytes of a file.
        size: height and width.
        channels: 1 or 3.
        fit: "crop" keeps the middle square, "pad" adds white at the sides, "stretch" changes the proportions.

    Raises:
        ValueError: the bytes are no image that can be decoded; the message says what is wrong with them.
    """
    from PIL import Image, ImageOps

    mode = "L" if channels == 1 else "RGB"
    filtered = Image.Resampling.LANCZOS
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > _LARGEST:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow's own conversion would cut off everything above 255
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {image.mode}, which has no known white")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert(mode)
            if fit == "stretch" or image.size == (size, size):
                image = image.resize((size, size), filtered)
            elif fit == "crop":
                image = ImageOps.fit(image, (size, size), filtered)
            else:
                image = ImageOps.pad(image, (size, size), filtered, color="white")
    except Exception as problem:  # Pillow raises what its many decoders happen to raise
        said = " ".join(str(problem).split())
        raise ValueError("not an image that Pillow can identify" if "cannot identify" in said else said) from None
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels).transpose(2, 0, 1)


def to_pillow(pixels_chw: Tensor) -> Any:
    """Return bytes ``(1 or 3, h, w)``, uint8, as a ``PIL.Image``.

    >>> import torch
    >>> to_pillow(torch.zeros(3, 5, 7, dtype=torch.uint8)).size
    (7, 5)
    """
    from PIL import Image

    gray = len(pixels_chw) == 1
    return Image.fromarray((pixels_chw[0] if gray else pixels_chw.permute(1, 2, 0).contiguous()).numpy())


def to_png(pixels_chw: Tensor) -> bytes:
    """Return bytes ``(1 or 3, h, w)``, uint8, as the content of a PNG file."""
    buffer = io.BytesIO()
    to_pillow(pixels_chw).save(buffer, format="PNG")
    return buffer.getvalue()
