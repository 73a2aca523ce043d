"""``danlu resume``: continue a run from a checkpoint, also a finished one for more steps."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from danlu.cli.common import add_run, open_run
from danlu.cli.words import Words, sort_words

__all__ = ["ABOUT", "EXAMPLES", "USAGE", "add_arguments", "run", "separate"]

USAGE = "danlu resume RUN [--data PATH ...] [--code FILE] [--train.steps N] [--PATH.TO.OPTION VALUE ...]"

ABOUT = """\
Continue a run exactly where its last checkpoint left it, or from another one: RUN@STEP. What came after that is moved
to RUN/earlier/N, a run folder of its own.

With --train.steps (short: --steps) or --train.minutes the run becomes longer, also a finished one. A schedule with a
stable phase goes on from its last checkpoint before the decay, if there is one; of any other the rest is laid out anew,
and a sentence says so. Options that change no number (log_every, eval_every, checkpoint_every, keep, threads, ...) can
be given, too. For other data or another optimizer begin a run with the weights of this one:
danlu train RECIPE --init RUN."""

EXAMPLES = """\
  danlu resume runs/lm-1
  danlu resume runs/lm-1 --train.steps 2000           more steps
  danlu resume runs/lm-1@400                          once more from step 400
  danlu resume runs/lm-1 --data /new/place            the same data, elsewhere now
  danlu resume runs/smooth-1 --code my_recipe.py      a run of a recipe of your own"""

_OWN = {"--data": None, "--code": 1, "--help": 0, "-h": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument("--data", metavar="PATH", nargs="+", help="where the same data are now")


def separate(words: Sequence[str]) -> Words:
    """Sort the words of the command line into the command's own and options of the configuration.

    >>> separate(["runs/lm-1", "--train.steps", "300"])
    Words(own=['runs/lm-1'], options=['--train.steps', '300'], first='runs/lm-1')
    """
    found = sort_words(words, _OWN, "resume")
    return found._replace(own=[*([] if found.first is None else [found.first]), *found.own])


def run(arguments: argparse.Namespace) -> int:
    """Resume the run, then write samples and the report."""
    at = open_run(arguments, "resume")
    from danlu.cli.finish import finishing
    from danlu.cli.overrides import apply
    from danlu.cli.source import FIXED
    from danlu.train import read_config, run

    config = None
    data = ["--data.path", *arguments.data] if arguments.data else []
    if data or arguments.overrides:
        config = apply(read_config(at), [*data, *arguments.overrides], fixed=FIXED)
    folder = Path(arguments.folder)
    return finishing(folder, lambda: run.resume(at, config=config))
