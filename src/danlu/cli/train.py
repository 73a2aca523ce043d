"""``danlu train``: a recipe, a file of your own or a saved configuration, with any of its options changed."""

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from danlu.cli.source import is_code
from danlu.recipes import REGISTRY

__all__ = ["ABOUT", "EXAMPLES", "USAGE", "Words", "add_arguments", "run", "separate"]

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
  torchrun --nproc-per-node 2 -m danlu train --out runs/two"""

# Options of the command itself, with the number of words each takes (None: all that follow).
_LISTS = ("--data.path",)
_OWN = {"--data": None, "--code": 1, "--config": 1, "--out": 1, "--help": 0, "-h": 0}


class Words(NamedTuple):
    """The words of a command line: for the command itself, for the configuration, and the recipe or None."""

    own: list[str]
    options: list[str]
    recipe: str | None


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
        "--out", metavar="DIR", help="the run folder to create, never overwritten (default: runs/RECIPE-N)"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this; with a recipe, all of its options")


def separate(words: Sequence[str]) -> Words:
    """Sort the words of the command line; the recipe may stand anywhere.

    Raises:
        ValueError: two recipes, or an option with a single hyphen.

    >>> separate(["--out", "here", "lm-dense", "--model.dim", "64"])
    Words(own=['--out', 'here'], options=['--model.dim', '64'], recipe='lm-dense')
    """
    from danlu.cli.overrides import is_option

    own, options, recipes = list[str](), list[str](), list[str]()
    name, more = "", 0.0  # the option before, and how many words it may still take
    for word in words:
        if is_option(word):
            name, equals, _ = word.partition("=")
            if not word.startswith("--") and word != "-h":
                raise ValueError(f"danlu train has no option {name} (see danlu train --help)")
            taken = _OWN.get(name)
            more = 0 if equals else float("inf") if taken is None else taken
            (own if name in _OWN else options).append(word)
        elif more <= 0:
            recipes.append(word)
        elif name in _OWN:
            own.append(word)
            more -= 1
        elif more < float("inf") and name not in _LISTS and _names_recipe(word):
            # The option before has its value, so that this word is one too many.
            recipes.append(word)
        else:
            options.append(word)
            more = 1e9
    if len(recipes) > 1:
        raise ValueError(
            f"danlu train takes one recipe, got {' and '.join(map(repr, recipes))}; data are given by --data"
        )
    return Words(own, options, recipes[0] if recipes else None)


def run(arguments: argparse.Namespace) -> int:
    """Train the configuration, then write samples and the report."""
    from danlu.cli.listing import table
    from danlu.cli.source import configure

    name, config, code = configure(arguments)
    if arguments.help:
        print(f"danlu train {name}: its options, with their defaults\n")
        print(*table(config), sep="\n")
        return 0
    from danlu.cli.finish import finish
    from danlu.train import run

    if arguments.out:
        folder = Path(arguments.out)
        return finish(folder, run.train(config, folder, code=code))
    first = not Path("runs").exists()
    folder = _own_folder(name)
    try:
        return finish(folder, run.train(config, folder, code=code))
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
