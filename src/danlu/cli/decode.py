"""``danlu decode``: the images of ``.ddcm`` files, by the run that they were written with."""

import argparse
import sys

from danlu.cli.common import add_run, failures_code, generator_of, progress

EXAMPLES = """\
  danlu decode runs/digits-ddpm-1 codes --out pictures             codes/NAME.ddcm to pictures/NAME.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help=".ddcm files, or folders of them")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write; nothing is overwritten")


def run(arguments: argparse.Namespace) -> int:
    """Write a PNG for every ``.ddcm`` file; list those that could not be read at the end."""
    from danlu.data.codec_files import decode_files
    from danlu.diffusion import model_digest

    objective = generator_of(arguments, "decode")
    done = decode_files(
        arguments.files,
        arguments.out,
        objective.denoiser,
        objective.schedule,
        model=model_digest(objective.model.state_dict()),
        progress=progress("decoding"),
    )
    if done.written:
        same = "each bit for bit the encoder's"
        if done.differing:
            same = f"{done.differing} differ from the encoder's in a bit"
        print(f"{len(done.written)} images in {arguments.out}, {same}")
        if done.differing:
            print("The arithmetic of this machine is not that of the encoder's.", file=sys.stderr)
    return failures_code(done.failures, len(done.written))
