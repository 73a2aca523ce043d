"""``danlu resume``: continue a run from its last checkpoint."""

import argparse
from pathlib import Path

from danlu.cli.common import add_run, load_code

__all__ = ["EXAMPLES", "OTHER_OPTIONS", "add_arguments", "run"]

OTHER_OPTIONS = "a resumed run keeps its configuration; options are set by danlu train"
EXAMPLES = """\
  danlu resume runs/lm-1
  danlu resume runs/smooth-1 --code my_recipe.py      a run of a recipe of your own"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resume the run, then write samples and the report."""
    load_code(arguments, "resume")
    from danlu.cli.finish import finish
    from danlu.train import run

    return finish(Path(arguments.folder), run.resume(arguments.folder))
