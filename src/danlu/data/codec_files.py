"""Folders of images to ``.ddcm`` files and back: the codec of :mod:`danlu.diffusion.codec` on many files.

A file that cannot be read is named in the result and the others are done; nothing is overwritten. The network is asked
about one image at a time on one thread, so that the bits of an image depend neither on the others nor on the machine's
number of threads.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danlu.data.images import to_bytes, to_float
from danlu.data.paths import expand
from danlu.data.pictures import decode as read_picture
from danlu.data.pictures import find_pictures, to_png
from danlu.diffusion import CodecConfig, CodecFile, Codes, Denoiser, Schedule, image_digest, pack, unpack
from danlu.diffusion import decode as draw_codes
from danlu.diffusion import encode as find_codes

__all__ = ["Done", "decode_files", "encode_files"]

# Images whose codewords are chosen together: the codebook of a step is drawn once for all of them.
_TOGETHER = 64

Progress = Callable[[int, int, int], None]
"""Called with the number of images that are being worked on, the steps done and their number."""


@dataclass(frozen=True)
class Done:
    """What became of many files.

    Attributes:
        written: the files written, in the order of what they were made from.
        failures: a sentence for each file that was left out.
        differing: of decoded images, the number that differ from the encoder's in a bit: the arithmetic of this machine
            is then not that of the encoder's.
    """

    written: list[Path]
    failures: list[str]
    differing: int = 0


def encode_files(
    paths: Sequence[str],
    out: str | os.PathLike[str],
    denoiser: Callable[[Sequence[int]], Denoiser],
    schedule: Schedule,
    config: CodecConfig,
    *,
    size: int,
    channels: int,
    model: bytes,
    progress: Progress | None = None,
) -> Done:
    """Write a ``.ddcm`` file for every image, called as the image is.

    Args:
        paths: image files, folders, globs, as for :func:`danlu.data.pictures.find_pictures`.
        out: the folder to write to, made if it is not there.
        denoiser: ``(x, t) -> x0`` for images of a shape ``(1, C, H, W)``, such as the ``denoiser`` of an objective.
        schedule: of the model.
        config: sizes of the code.
        size, channels: that the model was trained on; images are cropped to them.
        model: 16 bytes that name the model, by :func:`danlu.diffusion.model_digest`.
        progress: called after every step of every portion of images.

    Raises:
        FileExistsError: a file that would be written is there.
        FileNotFoundError, ValueError: a path that does not exist or holds no images.
    """
    failures, names, pixels = list[str](), list[str](), list[Tensor]()
    for picture in find_pictures(paths):
        try:
            data = read_picture(picture.read(), size=size, channels=channels, fit="crop")
        except (OSError, ValueError) as problem:
            failures.append(f"{picture.name}: {problem}")
            continue
        names.append(Path(picture.name.rpartition(": ")[2]).stem)
        pixels.append(torch.from_numpy(data.copy()))
    targets = _targets(out, names, ".ddcm")
    with _repeatable():
        for start in range(0, len(pixels), _TOGETHER):
            batch = torch.stack(pixels[start : start + _TOGETHER])
            denoise = _one_by_one(denoiser, tuple(batch.shape[1:]))
            codes, drawn = find_codes(denoise, to_float(batch), schedule, config, progress=_of(progress, len(batch)))
            for index, image in enumerate(to_bytes(drawn)):
                one = Codes(codes.indices[index : index + 1], codes.gains[index : index + 1])
                file = CodecFile(one, config, (channels, size, size), model, image_digest(image))
                _write(targets[start + index], pack(file))
    return Done(targets, failures)


def decode_files(
    paths: Sequence[str],
    out: str | os.PathLike[str],
    denoiser: Callable[[Sequence[int]], Denoiser],
    schedule: Schedule,
    *,
    model: bytes,
    progress: Progress | None = None,
) -> Done:
    """Write a PNG for every ``.ddcm`` file, called as the file is.

    Args:
        paths: ``.ddcm`` files, folders of them at any depth, globs.
        out, denoiser, schedule, model, progress: as for :func:`encode_files`.

    Raises:
        FileExistsError: a file that would be written is there.
        FileNotFoundError: a path that does not exist.
    """
    failures, names, files = list[str](), list[str](), list[CodecFile]()
    for path in _ddcm_files(paths):
        try:
            file = unpack(path.read_bytes())
            if file.model != model:
                raise ValueError("made with another model")
        except (OSError, ValueError) as problem:
            failures.append(f"{path}: {problem}")
            continue
        files.append(file)
        names.append(path.stem)
    targets = _targets(out, names, ".png")
    groups: dict[tuple[CodecConfig, tuple[int, int, int]], list[int]] = {}
    for index, file in enumerate(files):
        groups.setdefault((file.config, file.shape), []).append(index)
    written, differing = set[int](), 0
    with _repeatable():
        for (config, shape), members in groups.items():
            for start in range(0, len(members), _TOGETHER):
                chosen = members[start : start + _TOGETHER]
                codes = Codes(*(torch.cat([getattr(files[i].codes, p) for i in chosen]) for p in ("indices", "gains")))
                try:
                    denoise = _one_by_one(denoiser, shape)
                    drawn = draw_codes(denoise, codes, shape, schedule, config, progress=_of(progress, len(chosen)))
                except ValueError as problem:
                    failures += [f"{names[i]}.ddcm: {problem}" for i in chosen]
                    continue
                for index, image in zip(chosen, to_bytes(drawn), strict=True):
                    differing += image_digest(image) != files[index].image
                    _write(targets[index], to_png(image))
                    written.add(index)
    return Done([targets[index] for index in sorted(written)], failures, differing)


def _one_by_one(denoiser: Callable[[Sequence[int]], Denoiser], shape: tuple[int, ...]) -> Denoiser:
    """The denoiser, asked about one image at a time: then no image's bits depend on the others."""
    one = denoiser((1, *shape))
    return lambda x, t: torch.cat([one(image, time) for image, time in zip(x.split(1), t.split(1), strict=True)])


@contextmanager
def _repeatable() -> Iterator[None]:
    """One thread: products are then summed in one order, whatever the number of threads around."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _of(progress: Progress | None, count: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(count, done, total)


def _ddcm_files(paths: Sequence[str]) -> Iterator[Path]:
    for path, _ in expand(paths):
        yield from sorted(path.rglob("*.ddcm")) if path.is_dir() else [path]


def _targets(out: str | os.PathLike[str], names: list[str], suffix: str) -> list[Path]:
    """A file in ``out`` for each name, two of one name told apart by a number; none of them exists."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    targets = dict[Path, None]()
    for name in names:
        numbered = (folder / f"{name}{'' if n == 1 else f'-{n}'}{suffix}" for n in itertools.count(1))
        targets[next(path for path in numbered if path not in targets)] = None
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists and is left as it is; choose another folder")
    return list(targets)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
