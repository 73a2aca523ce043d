"""The verbs, their options and their help: standard library only, because ``--help`` must answer at once."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from danlu import __version__
from danlu._validate import choice, nearest

__all__ = ["VERBS", "parse"]

VERBS = {
    "train": "train a model from a recipe, on the embedded corpus or on your data",
    "resume": "continue an interrupted run exactly where its last checkpoint left it",
    "sample": "write text or images from a trained run",
    "eval": "measure a run on its validation data",
    "encode": "write images as the few bits that a trained generator needs to draw them again",
    "decode": "draw the images of such files",
    "report": "draw a run's loss and throughput and write its page",
    "recipes": "list the recipes",
    "show": "print a recipe's whole configuration",
    "doctor": "show versions, the kernels chosen here, and how fast this machine is",
    "verify": "measure the methods' published claims again, here",
}

_TRAIN = """\
danlu train [RECIPE] [--data PATH ...] [--out DIR] [--PATH.TO.LEAF VALUE ...]"""

_TRAIN_ABOUT = """\
Train a model. Without arguments: the recipe `lm` on the Python standard library's own source text.

Any leaf of the recipe's configuration can be set by its path, e.g. --model.dim 512;
`danlu show RECIPE` lists every leaf with the value it has."""

_EXAMPLES = {
    "train": """\
  danlu train                                          the main job, about ten minutes on two cores
  danlu train --data book.txt --train.steps 500        your own text: .txt, .jsonl, folders, globs
  danlu train lm --model.dim 512 --optim.lr 0.02       any leaf of the configuration, by its path
  danlu train lm-baseline --out runs/baseline --train.seed 1 --train.checkpoint_every 100
  torchrun --nproc-per-node 2 -m danlu train --out runs/two""",
    "resume": """\
  danlu resume runs/lm-1""",
    "sample": """\
  danlu sample runs/lm-1 --prompt "def main("
  danlu sample runs/lm-1 --prompt "import " --tokens 400 --temperature 0.7 --top-p 0.95
  danlu sample runs/lm-1 --prompt "class " --temperature 0 --tokens 100       the most likely text
  danlu sample runs/lm-1 --prompt "class " --count 3 --seed 7                 three, the same each time
  danlu sample runs/digits-1 --steps 1 --out x.png                            64 images, in one step each
  danlu sample runs/digits-flow-1 --steps 50 --out x.gif --classes 3 7        how they come about, of two classes""",
    "eval": """\
  danlu eval runs/lm-1                 all of its validation text
  danlu eval runs/lm-1 --batches 16    a part, spread evenly over it
  danlu eval runs/digits-1 --steps 2   a generator of images: its distance from the held-out ones, too""",
    "encode": """\
  danlu encode runs/digits-ddpm-1 photos/ --out codes              an image a file: codes/NAME.ddcm
  danlu encode runs/digits-flow-1 a.png b.png --steps 200 --codewords 1024
  danlu encode runs/digits-flow-1 photos/ --atoms 4 --gain-bits 3   more bits a step, less distortion""",
    "decode": """\
  danlu decode runs/digits-ddpm-1 codes --out pictures             codes/NAME.ddcm to pictures/NAME.png""",
    "report": """\
  danlu report runs/lm-1""",
    "recipes": """\
  danlu recipes""",
    "show": """\
  danlu show lm                    JSON, then every leaf as an option of `danlu train`
  danlu show lm --format json      JSON alone, for a program to read""",
    "doctor": """\
  danlu doctor""",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors raised instead of printed: `main` turns them into one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; its ``run`` attribute is the verb's function.

    ``danlu train`` keeps in ``overrides`` the words meant for the configuration, which is only known once the recipe
    is loaded. Every other verb refuses what it does not know.

    Raises:
        ValueError: an unknown verb or option, or a value that does not parse.

    >>> arguments = parse(["train", "lm", "--out", "here", "--model.dim", "64"])
    >>> arguments.recipe, arguments.out, arguments.overrides
    ('lm', 'here', ['--model.dim', '64'])
    """
    words = list(argv)
    if not words:
        words = ["--help"]
    if not words[0].startswith("-"):
        choice("verb", words[0], list(VERBS))
    if words[0] == "verify":
        # The claims have a command line of their own, which is also how they run without the front door.
        return argparse.Namespace(verb="verify", words=words[1:], run=_lazily("verify"))
    recipe = "lm"
    if words[0] == "train" and len(words) > 1 and not words[1].startswith("-"):
        recipe = words.pop(1)
    parser, verbs = _build()
    arguments, unknown = parser.parse_known_args(words)
    if arguments.verb == "train":
        arguments.recipe = recipe
        arguments.overrides = unknown
    elif unknown:
        _refuse(arguments.verb, unknown[0], verbs[arguments.verb])
    return arguments


def _refuse(verb: str, word: str, parser: argparse.ArgumentParser) -> NoReturn:
    if not word.startswith("-"):
        raise ValueError(f"danlu {verb} takes no further argument {word!r} (see danlu {verb} --help)")
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    close = nearest(word.split("=")[0], known)
    hint = f"; did you mean {close}?" if close else f" (see danlu {verb} --help)"
    raise ValueError(f"danlu {verb} has no option {word.split('=')[0]}{hint}")


def _lazily(verb: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        function = getattr(importlib.import_module("danlu.cli.verbs"), verb)
        return int(function(arguments))

    return run


def _build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="danlu",
        description="Train, sample and measure models with the methods of danlu.",
        epilog="`danlu VERB --help` shows a verb's options with examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"danlu {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs: dict[str, argparse.ArgumentParser] = {}
    for verb, summary in VERBS.items():
        settings: dict[str, Any] = {"usage": _TRAIN, "description": _TRAIN_ABOUT} if verb == "train" else {}
        verbs[verb] = subparsers.add_parser(
            verb,
            help=summary,
            epilog=f"examples:\n{_EXAMPLES.get(verb, '')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **({"description": summary[0].upper() + summary[1:] + "."} | settings),
        )
        verbs[verb].set_defaults(run=_lazily(verb))
    _options(verbs)
    return parser, verbs


def _options(verbs: dict[str, argparse.ArgumentParser]) -> None:
    train = verbs["train"]
    train.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="what to train on: text (.txt, .jsonl) or images (folders, .csv, .tar, .parquet); sets data.path",
    )
    train.add_argument(
        "--out", metavar="DIR", help="the run folder to create, never overwritten (default: runs/RECIPE-N)"
    )
    for verb in ("resume", "sample", "eval", "report", "encode", "decode"):
        verbs[verb].add_argument("folder", metavar="RUN", help="a run folder, e.g. runs/lm-1")
    verbs["eval"].add_argument("--batches", type=int, metavar="N", help="validation batches to measure (default: all)")
    sample = verbs["sample"]
    sample.add_argument("--prompt", metavar="TEXT", default="", help="the text to continue (default: a new document)")
    sample.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default: 0.8)"
    )
    sample.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    sample.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest tokens that hold probability P (default: 1)"
    )
    sample.add_argument("--seed", type=int, metavar="S", help="draw the same text each time (default: another)")
    sample.add_argument("--count", type=int, metavar="N", help="how many to write (default: 1 text, 64 images)")
    sample.add_argument("--out", metavar="FILE", help="images: .png, or .gif or .webp for the way to them")
    sample.add_argument("--classes", metavar="NAME", nargs="+", help="images of these classes in turn (default: all)")
    sample.add_argument(
        "--upsample",
        type=int,
        metavar="S",
        help="images S times as high and wide as those trained on, without training",
    )
    verbs["eval"].add_argument("--count", type=int, default=500, metavar="N", help="images to draw (default: 500)")
    verbs["eval"].add_argument(
        "--features", metavar="RUN", help="the classifier to compare by (default: one trained on the same images)"
    )
    verbs["eval"].add_argument("--seed", type=int, default=0, metavar="S", help="of the images drawn (default: 0)")
    for verb in ("sample", "eval"):
        verbs[verb].add_argument("--steps", type=int, metavar="N", help="images: steps of the sampler")
        verbs[verb].add_argument("--guidance", type=float, metavar="W", help="images: scale of guidance to the class")
    encode = verbs["encode"]
    encode.add_argument(
        "images", metavar="PATH", nargs="+", help="image files, folders, globs, .csv tables, .tar shards"
    )
    encode.add_argument("--steps", type=int, default=100, metavar="T", help="evaluations of the network (default: 100)")
    encode.add_argument(
        "--codewords",
        type=int,
        default=256,
        metavar="K",
        help="to choose from in each step, a power of two (default: 256)",
    )
    encode.add_argument("--atoms", type=int, default=1, metavar="M", help="codewords mixed in each step (default: 1)")
    encode.add_argument(
        "--gain-bits",
        type=int,
        default=2,
        metavar="C",
        help="bits of the weight of each atom after the first (default: 2)",
    )
    encode.add_argument("--seed", type=int, default=0, metavar="S", help="of the codebooks (default: 0)")
    verbs["decode"].add_argument("files", metavar="FILE", nargs="+", help=".ddcm files, or folders of them")
    for verb in ("encode", "decode"):
        verbs[verb].add_argument("--out", metavar="DIR", required=True, help="where to write; nothing is overwritten")
    verbs["show"].add_argument("recipe", metavar="RECIPE", nargs="?", default="lm", help="default: lm")
    verbs["show"].add_argument(
        "--format", choices=("both", "json", "options"), default="both", help="what to print (default: both)"
    )
