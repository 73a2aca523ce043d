"""What several commands have in common: a run's folder, and the user's code that it needs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danlu.train.load import RunAt

__all__ = ["add_run", "failures_code", "generator_of", "is_text", "open_run", "printable", "progress"]


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the folder of a run, and the option that gives its code again."""
    parser.add_argument(
        "folder",
        metavar="RUN",
        help="a run folder, e.g. runs/lm-1; runs/lm-1@600 is its checkpoint of step 600, @best and @last are others",
    )
    parser.add_argument(
        "--code",
        metavar="FILE",
        action="append",
        help="a file (my_recipe.py) or module of your own that the run was made with; it is run",
    )


def open_run(arguments: argparse.Namespace, command: str) -> "RunAt":
    """Return the run and the checkpoint that were named; ``arguments.folder`` becomes the folder alone.

    What ``--code`` names is loaded, before the run's configuration is read.

    Raises:
        ValueError: the run needs code that was not given, or what was named is no checkpoint.
    """
    from danlu.train.load import run_at
    from danlu.usercode import load_again

    at = run_at(arguments.folder)
    arguments.folder = str(at.folder)
    load_again(at.folder, arguments.code or (), command)
    return at


def is_text(folder: str | Path) -> bool:
    """Whether a run has a vocabulary to write with."""
    return (Path(folder) / "tokenizer.json").exists()


def printable(text: str) -> str:
    """Return ``text`` as a terminal may show it: a model can write escape sequences that would take the screen over."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def generator_of(arguments: argparse.Namespace, command: str) -> Any:
    """Return the objective of a run whose model denoises, on the processor."""
    at = open_run(arguments, command)
    from danlu.protocols import Denoises
    from danlu.train import load_objective

    objective = load_objective(at)[0].cpu()
    if not isinstance(objective, Denoises):
        kind = type(objective).__name__
        raise ValueError(f"{at.folder} is a run of {kind}, which has no denoiser; take digits-ddpm or digits-flow")
    return objective


def progress(what: str) -> Callable[[int, int, int], None] | None:
    """Return a function that shows how far the work on so many images is; None without a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(count: int, done: int, total: int) -> None:
        print(f"\r{what} {count} images: step {done} of {total}", end="\n" if done == total else "", file=sys.stderr)

    return show


def failures_code(failures: list[str], done: int) -> int:
    """List what could not be read and return the exit code.

    Raises:
        ValueError: nothing could be read.
    """
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    if not done:
        raise ValueError("nothing to do: no file could be read")
    return 1 if failures else 0
