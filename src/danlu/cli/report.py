"""``danlu report``: a run's page."""

import argparse

from danlu.cli.common import add_run, open_run

EXAMPLES = """\
  danlu report runs/lm-1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write a run's plots and page, and say where they are."""
    from danlu.train.load import run_at

    arguments.folder = str(run_at(arguments.folder).folder)
    if arguments.code:
        open_run(arguments, "report")
    from danlu.report import write

    print(write(arguments.folder))
    return 0
