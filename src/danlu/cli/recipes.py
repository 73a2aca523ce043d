"""``danlu recipes``: the list of recipes."""

import argparse

EXAMPLES = """\
  danlu recipes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the command has no options."""


def run(arguments: argparse.Namespace) -> int:
    """List the recipes of danlu and of installed packages."""
    from danlu.recipes import REGISTRY, installed

    found = REGISTRY | installed()
    width = max(map(len, found))
    for name, recipe in found.items():
        print(f"{name:{width}}  {recipe.summary}")
    return 0
