"""``danlu encode`` and ``danlu decode``: images as ``.ddcm`` files and back, by a run that generates images."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["decode", "encode"]


def encode(arguments: argparse.Namespace) -> int:
    """Write a ``.ddcm`` file for every image; list those that could not be read at the end."""
    from danlu.data.codec_files import encode_files
    from danlu.diffusion import CodecConfig, model_digest
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
    done = encode_files(
        arguments.images,
        arguments.out,
        objective.denoiser,
        objective.schedule,
        config,
        size=sizes.image_size,
        channels=sizes.channels,
        model=model_digest(objective.model.state_dict()),
        progress=_progress("encoding"),
    )
    if done.written:
        per_pixel = config.bits / sizes.image_size**2
        failed = f"; {len(done.failures)} failed" if done.failures else ""
        print(
            f"{len(done.written)} images in {arguments.out}: {config.bits} bits each, "
            f"{per_pixel:.3g} bits per pixel{failed}"
        )
    return _report(done.failures, len(done.written))


def decode(arguments: argparse.Namespace) -> int:
    """Write a PNG for every ``.ddcm`` file; list those that could not be read at the end."""
    from danlu.data.codec_files import decode_files
    from danlu.diffusion import model_digest

    objective = _objective(arguments.folder)
    done = decode_files(
        arguments.files,
        arguments.out,
        objective.denoiser,
        objective.schedule,
        model=model_digest(objective.model.state_dict()),
        progress=_progress("decoding"),
    )
    if done.written:
        same = "each bit for bit the encoder's"
        if done.differing:
            same = f"{done.differing} differ from the encoder's in a bit"
        print(f"{len(done.written)} images in {arguments.out}, {same}")
        if done.differing:
            print("The arithmetic of this machine is not that of the encoder's.", file=sys.stderr)
    return _report(done.failures, len(done.written))


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


def _progress(what: str) -> Callable[[int, int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(count: int, done: int, total: int) -> None:
        print(f"\r{what} {count} images: step {done} of {total}", end="\n" if done == total else "", file=sys.stderr)

    return show


def _report(failures: list[str], done: int) -> int:
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    if not done:
        raise ValueError("nothing to do: no file could be read")
    return 1 if failures else 0
