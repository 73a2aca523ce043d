"""``danlu doctor``: an examination of this machine."""

import argparse

EXAMPLES = """\
  danlu doctor"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the command has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the examination."""
    from danlu.cli.examination import examine

    examine()
    return 0
