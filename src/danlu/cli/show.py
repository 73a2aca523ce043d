"""``danlu show``: a recipe's whole configuration."""

import argparse

EXAMPLES = """\
  danlu show lm                       every option: what it accepts, its default, what it means
  danlu show my_recipe.py:smooth      of a recipe of your own
  danlu show lm --format json         a file for `danlu train --config`
  danlu show lm --format options      the same as words of a command line"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="lm", help="default: lm")
    parser.add_argument(
        "--format", choices=("table", "json", "options"), default="table", help="what to print (default: table)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a recipe's configuration."""
    import shlex

    from danlu.cli.listing import table
    from danlu.cli.overrides import options
    from danlu.cli.source import FIXED, recipe_of
    from danlu.config import dumps

    _, config, _ = recipe_of(arguments.recipe)
    if arguments.format == "json":
        print(dumps(config), end="")
    elif arguments.format == "options":
        print(*map(shlex.join, options(config, FIXED)), sep="\n")
    else:
        print(*table(config), sep="\n")
    return 0
