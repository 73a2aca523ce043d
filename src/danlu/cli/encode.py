"""``danlu encode``: images as ``.ddcm`` files, by a run that generates images."""

import argparse
from typing import Any

from danlu.cli.common import add_run, failures_code, generator_of, progress

EXAMPLES = """\
  danlu encode runs/digits-ddpm-1 photos/ --out codes              an image a file: codes/NAME.ddcm
  danlu encode runs/digits-flow-1 a.png b.png --steps 200 --codewords 1024
  danlu encode runs/digits-flow-1 photos/ --atoms 4 --gain-bits 3   more bits a step, less distortion"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument(
        "images", metavar="PATH", nargs="+", help="image files, folders, globs, .csv tables, .tar shards"
    )
    for option, default, metavar, text in (
        ("--steps", 100, "T", "evaluations of the network"),
        ("--codewords", 256, "K", "to choose from in each step, a power of two"),
        ("--atoms", 1, "M", "codewords mixed in each step"),
        ("--gain-bits", 2, "C", "bits of the weight of each atom after the first"),
        ("--seed", 0, "S", "of the codebooks"),
    ):
        parser.add_argument(option, type=int, default=default, metavar=metavar, help=f"{text} (default: {default})")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write; nothing is overwritten")


def run(arguments: argparse.Namespace) -> int:
    """Write a ``.ddcm`` file for every image; list those that could not be read at the end."""
    from danlu.data.codec_files import encode_files
    from danlu.diffusion import CodecConfig, model_digest
    from danlu.train import read_config

    config = CodecConfig(
        steps=arguments.steps,
        codewords=arguments.codewords,
        atoms=arguments.atoms,
        gain_bits=arguments.gain_bits,
        seed=arguments.seed,
    )
    objective = generator_of(arguments, "encode")
    sizes: Any = read_config(arguments.folder).model
    done = encode_files(
        arguments.images,
        arguments.out,
        objective.denoiser,
        objective.schedule,
        config,
        size=sizes.image_size,
        channels=sizes.channels,
        model=model_digest(objective.model.state_dict()),
        progress=progress("encoding"),
    )
    if done.written:
        per_pixel = config.bits / sizes.image_size**2
        failed = f"; {len(done.failures)} failed" if done.failures else ""
        print(
            f"{len(done.written)} images in {arguments.out}: {config.bits} bits each, "
            f"{per_pixel:.3g} bits per pixel{failed}"
        )
    return failures_code(done.failures, len(done.written))
