"""``danlu train``: a recipe, a file of your own or a saved configuration, with any of its options changed."""

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from danlu.cli.source import is_code
from danlu.cli.words import Words, sort_words
from danlu.recipes import REGISTRY

__all__ = ["ABOUT", "EXAMPLES", "USAGE", "add_arguments", "run", "separate"]

USAGE = "danlu train [RECIPE] [--data PATH ...] [--config FILE] [--out DIR] [--PATH.TO.OPTION VALUE ...]"

ABOUT = """\
Train a model. Without arguments: the recipe `lm` on the Python standard library's own source text.

RECIPE is a name of `danlu recipes`, a file (my_recipe.py, my_recipe.py:function) or a module (package.module:function)
with a function that returns a RunConfig. Any option of its configuration can be set by its path, e.g. --model.dim 512,
and a component be chosen by its name, e.g. --optim adamw; `danlu train RECIPE --help` lists them all.
Short: --steps, --minutes and --seed stand for --train.steps and so on, --lr for --optim.lr, --batch-size for
--data.batch."""

EXAMPLES = """\
  danlu train                                          the main job, eight minutes
  danlu train --data book.txt --steps 500              your own text: .txt, .jsonl, folders, globs
  danlu train lm --model.dim 512 --optim.lr 0.02       any option of the configuration, by its path
  danlu train lm --model.attention gqa --model.experts none --optim adamw --optim.lr 3e-4
  danlu train my_recipe.py:smooth --out runs/smooth    a recipe of your own
  danlu train --config runs/lm-1/config.json --seed 1  another run's configuration; a part of one with a recipe
  danlu train lm-baseline --out runs/baseline --train.seed 1 --train.checkpoint_every 100
  danlu train lm --init runs/lm-1 --data other.txt     with the weights of another run
  danlu train lm --out runs/job --resume               start it, or continue it: the same line after any restart
  torchrun --nproc-per-node 2 -m danlu train --out runs/two"""

# Options of the command itself, with the number of words each takes (None: all that follow).
_OWN = {"--data": None, "--code": 1, "--config": 1, "--init": 1, "--out": 1, "--resume": 0, "--help": 0, "-h": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="what to train on: text (.txt, .md, .jsonl, ...) or images (folders, .csv, .tar, .parquet): data.path",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a run's config.json, or a part of one that changes the recipe"
    )
    parser.add_argument(
        "--code", metavar="FILE", action="append", help="a file or module of your own that --config names"
    )
    parser.add_argument(
        "--init",
        metavar="RUN",
        help="another run, or a checkpoint RUN@600 of it, whose weights this one begins with",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run if --out holds it already, else start it"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="the run folder to create, never overwritten (default: runs/RECIPE-N)"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this; with a recipe, all of its options")


def separate(words: Sequence[str]) -> Words:
    """Sort the words of the command line; the recipe may stand anywhere.

    Raises:
        ValueError: two recipes, or an option with a single hyphen.

    >>> separate(["--out", "here", "lm-dense", "--model.dim", "64"])
    Words(own=['--out', 'here'], options=['--model.dim', '64'], first='lm-dense')
    """
    return sort_words(words, _OWN, "train", stray=_names_recipe, what="recipe")


def run(arguments: argparse.Namespace) -> int:
    """Train the configuration, then write samples and the report."""
    from danlu.cli.listing import table
    from danlu.cli.source import configure

    name, config, code = configure(arguments)
    if arguments.help:
        print(f"danlu train {name}: its options, with their defaults\n")
        print(*table(config), sep="\n")
        return 0
    from danlu.cli.finish import finishing
    from danlu.train import run

    if arguments.resume and not arguments.out:
        raise ValueError("--resume needs --out: the folder that is continued if it holds the run already")

    def train(folder: Path) -> int:
        options = {"code": code, "init": arguments.init, "restartable": arguments.resume}
        return finishing(folder, lambda: run.train(config, folder, **options))

    if arguments.out:
        return train(Path(arguments.out))
    first = not Path("runs").exists()
    folder = _own_folder(name)
    try:
        return train(folder)
    finally:
        with contextlib.suppress(OSError):  # what is empty: nothing came of it
            folder.rmdir()
            if first:
                folder.parent.rmdir()


def _names_recipe(word: str) -> bool:
    return word in REGISTRY or is_code(word)


def _own_folder(recipe: str) -> Path:
    """Make the first of runs/RECIPE-1, runs/RECIPE-2, ... that nobody has."""
    from danlu.train.folder import new_folder

    name = re.sub(r"[^\w.-]+", "-", recipe).strip(".-") or "run"
    if os.environ.get("RANK", "0") != "0":
        return Path("runs") / name  # the first of several processes makes the folder, and tells the others
    return new_folder(Path("runs"), name)
