"""``danlu encode`` and ``danlu decode``: images as ``.ddcm`` files and back, by a run that generates images."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["decode", "encode"]

# Images whose codewords are chosen together: the codebook of a step is drawn once for all of them.
_TOGETHER = 64


def encode(arguments: argparse.Namespace) -> int:
    """Write a ``.ddcm`` file for every image; list those that could not be read at the end."""
    from danlu.data import to_bytes, to_float
    from danlu.data.pictures import decode as read
    from danlu.data.pictures import find_pictures
    from danlu.diffusion import CodecConfig, CodecFile, Codes, image_digest, model_digest, pack
    from danlu.diffusion import encode as encoded
    from danlu.train import run

    config = CodecConfig(
        steps=arguments.steps,
        codewords=arguments.codewords,
        atoms=arguments.atoms,
        gain_bits=arguments.gain_bits,
        seed=arguments.seed,
    )
    objective = _objective(arguments.folder)
    sizes = run.read_config(arguments.folder).model
    digest = model_digest(objective.model.state_dict())
    out = _folder(arguments.out)
    failures, names, pixels = list[str](), list[str](), list[Tensor]()
    for picture in find_pictures(arguments.images):
        try:
            data = read(picture.read(), size=sizes.image_size, channels=sizes.channels, fit="crop")
        except (OSError, ValueError) as problem:
            failures.append(f"{picture.name}: {problem}")
            continue
        names.append(Path(picture.name.rpartition(": ")[2]).stem)
        pixels.append(torch.from_numpy(data.copy()))
    targets = _targets(out, names, ".ddcm")
    with _repeatable():
        for start in range(0, len(pixels), _TOGETHER):
            batch = torch.stack(pixels[start : start + _TOGETHER])
            denoise = _one_by_one(objective, tuple(batch.shape[1:]))
            codes, drawn = encoded(
                denoise, to_float(batch), objective.schedule, config, progress=_progress("encoding", len(batch))
            )
            for index, image in enumerate(to_bytes(drawn)):
                one = Codes(codes.indices[index : index + 1], codes.gains[index : index + 1])
                channels, height, width = image.shape
                file = CodecFile(one, config, (channels, height, width), digest, image_digest(image))
                _write(targets[start + index], pack(file))
    if pixels:
        rate = config.bits / pixels[0][0].numel()
        error = f"; {len(failures)} failed" if failures else ""
        print(f"{len(pixels)} images in {out}: {config.bits} bits each, {rate:.3g} bits a pixel{error}")
    return _report(failures, len(pixels))


def decode(arguments: argparse.Namespace) -> int:
    """Write a PNG for every ``.ddcm`` file; list those that could not be read at the end."""
    from danlu.data import to_bytes
    from danlu.diffusion import Codes, image_digest, model_digest, unpack
    from danlu.diffusion import decode as decoded

    objective = _objective(arguments.folder)
    digest = model_digest(objective.model.state_dict())
    out = _folder(arguments.out)
    failures, files = list[str](), list[Any]()
    names: list[str] = []
    for path in _ddcm_files(arguments.files):
        try:
            file = unpack(path.read_bytes())
            if file.model != digest:
                raise ValueError(f"made by another model than that of {arguments.folder}")
        except (OSError, ValueError) as problem:
            failures.append(f"{path}: {problem}")
            continue
        files.append(file)
        names.append(path.stem)
    targets = _targets(out, names, ".png")
    differing = 0
    groups: dict[Any, list[int]] = {}
    for index, file in enumerate(files):
        groups.setdefault((file.config, file.shape), []).append(index)
    with _repeatable():
        for (config, shape), members in groups.items():
            for start in range(0, len(members), _TOGETHER):
                chosen = members[start : start + _TOGETHER]
                codes = Codes(*(torch.cat([getattr(files[i].codes, p) for i in chosen]) for p in ("indices", "gains")))
                try:
                    denoise = _one_by_one(objective, shape)
                    drawn = decoded(
                        denoise, codes, shape, objective.schedule, config, progress=_progress("decoding", len(chosen))
                    )
                except ValueError as problem:
                    failures += [f"{names[i]}.ddcm: {problem}" for i in chosen]
                    continue
                for index, image in zip(chosen, to_bytes(drawn), strict=True):
                    differing += image_digest(image) != files[index].image
                    _write(targets[index], _png(image))
    if files:
        exact = "each bit for bit the encoder's" if not differing else f"{differing} differ from the encoder's in a bit"
        print(f"{len(files)} images in {out}, {exact}")
        if differing:
            print("The arithmetic of this machine is not that of the encoder's.", file=sys.stderr)
    return _report(failures, len(files))


def _objective(folder: str) -> Any:
    """The objective of a run whose model denoises."""
    from danlu.train import run
    from danlu.train.component import component

    kind = component(run.read_config(folder).objective)
    if not hasattr(kind, "denoiser"):
        raise ValueError(
            f"{folder} is a run of {kind.__name__}, which has no denoiser; take one of digits-ddpm or -flow"
        )
    return run.load_objective(folder)[0].cpu().eval()


def _one_by_one(objective: Any, shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's denoiser, asked about one image at a time: then no image's bits depend on the others."""
    one = objective.denoiser((1, *shape))
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


def _progress(what: str, count: int) -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{what} {count} images: step {done} of {total}", end="\n" if done == total else "", file=sys.stderr)

    return show


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _ddcm_files(paths: list[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(path.rglob("*.ddcm"))
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"no file or folder is called {path}")


def _targets(folder: Path, names: list[str], suffix: str) -> list[Path]:
    """A file for each name, two of one name told apart by a number; none of them exists."""
    targets = dict[Path, None]()
    for name in names:
        numbered = (folder / f"{name}{'' if n == 1 else f'-{n}'}{suffix}" for n in itertools.count(1))
        targets[next(path for path in numbered if path not in targets)] = None
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists and is left as it is; choose another folder with --out")
    return list(targets)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _png(image: Tensor) -> bytes:
    import io

    from danlu.report.grid import picture

    buffer = io.BytesIO()
    picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _report(failures: list[str], done: int) -> int:
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    if not done:
        raise ValueError("nothing to do: no file could be read")
    return 1 if failures else 0
