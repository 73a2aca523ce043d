"""The commands and their help: standard library only, because ``--help`` must answer at once.

A command is a file of this folder with ``EXAMPLES``, ``add_arguments(parser)`` and ``run(arguments)``, and a line in
:data:`COMMANDS`. Only the file of the command that was asked for is imported.
"""

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from danlu import __version__
from danlu._validate import choice, nearest

__all__ = ["COMMANDS", "parse"]

COMMANDS = {
    "train": "train a model from a recipe, on the embedded corpus or on your data",
    "resume": "continue a run exactly where a checkpoint left it, also for more steps",
    "branch": "decay from a checkpoint of a run's stable phase, in a new run",
    "plan": "say what a run needs and takes on so many devices, before anything is trained or allocated",
    "tokenize": "write text as tokens that a training opens at once, by all cores",
    "sample": "write text or images from a trained run",
    "eval": "measure a run on its validation data",
    "encode": "write images as the few bits that a trained generator needs to draw them again",
    "decode": "draw the images of such files",
    "report": "draw a run's loss and throughput and write its page",
    "recipes": "list the recipes",
    "show": "list a recipe's options with what they mean, or print it as JSON",
    "doctor": "show versions, the kernels chosen here, and how fast this machine is",
    "verify": "measure the methods' published claims again, here",
}
"""Every command with what it does; its file has its name."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors raised instead of printed: `main` turns them into one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; its ``run`` attribute is the command's function.

    Raises:
        ValueError: an unknown command or option, or a value that does not parse.

    >>> arguments = parse(["sample", "runs/lm-1", "--tokens", "20"])
    >>> arguments.folder, arguments.tokens
    ('runs/lm-1', 20)
    """
    words = list(argv)
    if not words or words[0].startswith("-"):
        _top().parse_args(words or ["--help"])
    command, *rest = words
    choice("command", command, list(COMMANDS))
    module = importlib.import_module(f"danlu.cli.{command}")
    if command == "verify":
        # The claims have a command line of their own, which also works without this one.
        return argparse.Namespace(words=rest, run=module.run)
    parser = _parser(command, module)
    if command == "plan":
        arguments: argparse.Namespace = module.parsed(parser, rest)
        arguments.run = module.run
        return arguments
    if command in ("train", "resume"):
        # Their other options are those of the configuration, which is only known when the recipe has been loaded.
        found = module.separate(rest)
        arguments = parser.parse_args(found.own)
        arguments.overrides = found.options
        if command == "train":
            arguments.recipe = found.first
        if command == "train" and arguments.help and arguments.recipe is None:
            parser.print_help()
            raise SystemExit(0)
    else:
        arguments, unknown = parser.parse_known_args(rest)
        if unknown:
            _reject(command, unknown[0], parser, getattr(module, "OTHER_OPTIONS", ""))
    arguments.run = module.run
    return arguments


def _top() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = _Parser(
        prog="danlu",
        usage="danlu COMMAND ...",
        description=f"Train, sample and measure models with the methods of danlu.\n\ncommands:\n{listed}",
        epilog="`danlu COMMAND --help` shows a command's options with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"danlu {__version__}")
    return parser


def _parser(command: str, module: ModuleType) -> argparse.ArgumentParser:
    summary = COMMANDS[command]
    parser = _Parser(
        prog=f"danlu {command}",
        usage=getattr(module, "USAGE", None),
        description=getattr(module, "ABOUT", f"{summary[0].upper()}{summary[1:]}."),
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=command not in ("plan", "train"),
    )
    module.add_arguments(parser)
    return parser


def _reject(command: str, word: str, parser: argparse.ArgumentParser, others: str) -> NoReturn:
    if not word.startswith("-"):
        raise ValueError(f"danlu {command} takes no further argument {word!r} (see danlu {command} --help)")
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    close = nearest(word.split("=")[0], known)
    hint = f"; did you mean {close}?" if close else f" (see danlu {command} --help)"
    if others:
        hint = f": {others}"
    raise ValueError(f"danlu {command} has no option {word.split('=')[0]}{hint}")
