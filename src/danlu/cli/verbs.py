"""What each verb does. Every function imports the rooms it needs when it runs, and no others."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu._validate import integer, number

__all__ = ["decode", "doctor", "encode", "eval", "recipes", "report", "resume", "sample", "show", "train", "verify"]

# The recipe's name says where a configuration comes from; the first word of `danlu train` chooses it.
_FIXED = ("recipe",)

_SAMPLES = 3
_SAMPLE_TOKENS = 160


def train(arguments: argparse.Namespace) -> int:
    """Train a recipe with the given leaves changed, then write samples and the report."""
    from danlu.recipes import load

    recipe = load(arguments.recipe)
    from danlu.cli.overrides import apply
    from danlu.train import run

    # Absolute, so that the run can be resumed from any folder.
    data = [os.path.abspath(path) for path in arguments.data or ()]
    words = [*(["--data.path", *data] if data else []), *arguments.overrides]
    config = apply(recipe, words, fixed=_FIXED)
    # Several processes may count differently while the first of them makes its folder: its answer holds for all.
    folder = Path(arguments.out) if arguments.out else _free_folder(arguments.recipe)
    return _finish(folder, run.train(config, folder))


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run, then write samples and the report."""
    from danlu.train import run

    return _finish(Path(arguments.folder), run.resume(arguments.folder))


def _finish(folder: Path, code: int) -> int:
    """Write the samples and the report of a run that is complete; return ``code``."""
    if code == 0 and os.environ.get("RANK", "0") == "0":
        more = _write_samples(folder)
        from danlu.report import write

        print(f"Report: {write(folder)}")
        if more:
            print(f"More: danlu sample {shlex.quote(str(folder))} {more}")
    return code


def _write_samples(folder: Path) -> str:
    """Write what a complete run generates into its folder, unless it is there; return options that write more."""
    from danlu.cli import images

    if not _is_text(folder):
        return images.write_samples(folder)
    if not (folder / "samples.txt").exists():
        _write_texts(folder)
    return '--prompt "..."'


def _write_texts(folder: Path) -> None:
    """Write a few texts, from nothing, to samples.txt and the terminal."""
    from danlu.evaluation import continuation
    from danlu.train import run

    model, tokenizer, config = run.load(folder)
    with open(folder / "samples.txt", "w", encoding="utf-8") as file:
        for index in range(_SAMPLES):
            heading = f"--- sample {index + 1} of {_SAMPLES}"
            text = "".join(continuation(model, tokenizer, tokens=_SAMPLE_TOKENS, seed=config.train.seed + index))
            print(heading, _shown(text), sep="\n", flush=True)
            print(heading, text, sep="\n", file=file)


def _is_text(folder: str | Path) -> bool:
    """Whether a run has a vocabulary to write with."""
    return (Path(folder) / "tokenizer.json").exists()


def sample(arguments: argparse.Namespace) -> int:
    """Continue a prompt and print the text while it is written; or draw images."""
    if arguments.count is not None:
        integer("--count", arguments.count)
    if arguments.seed is not None:
        integer("--seed", arguments.seed, low=0)
    if not _is_text(arguments.folder):
        from danlu.cli import images

        return images.sample(arguments)
    for option in ("steps", "guidance", "out", "classes", "upsample"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for runs on images; {arguments.folder} is a run on text")
    arguments.count = arguments.count or 1
    integer("--tokens", arguments.tokens)
    number("--temperature", arguments.temperature, low=0)
    if arguments.top_k is not None:
        integer("--top-k", arguments.top_k)
    if arguments.top_p is not None:
        number("--top-p", arguments.top_p, low=0, high=1, low_open=True)
    from danlu.evaluation import continuation
    from danlu.train import run

    model, tokenizer, _ = run.load(arguments.folder)
    for index in range(arguments.count):
        if arguments.count > 1:
            print(f"--- {index + 1} of {arguments.count}")
        print(arguments.prompt, end="", flush=True)
        pieces = continuation(
            model,
            tokenizer,
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=None if arguments.seed is None else arguments.seed + index,
        )
        for piece in pieces:
            print(_shown(piece), end="", flush=True)
        print()
    return 0


def _shown(text: str) -> str:
    """Return ``text`` as a terminal may show it: a model can write escape sequences that would take the screen over."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def eval(arguments: argparse.Namespace) -> int:
    """Print a run's measures on its validation data."""
    if arguments.batches is not None:
        integer("--batches", arguments.batches)
    from danlu.train import run

    parts = run.restore(arguments.folder)
    for name, value in run.evaluate(parts, batches=arguments.batches).items():
        print(f"{name} {value:.6g}", flush=True)
    if not _is_text(arguments.folder):
        from danlu.cli import images

        images.measure(arguments, parts)
    return 0


def recipes(arguments: argparse.Namespace) -> int:
    """List the recipes."""
    from danlu.recipes import REGISTRY

    width = max(map(len, REGISTRY))
    for name, recipe in REGISTRY.items():
        print(f"{name:{width}}  {recipe.summary}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print a recipe's configuration as JSON and as options of `danlu train`."""
    from danlu.config import dumps
    from danlu.recipes import load

    config = load(arguments.recipe)
    if arguments.format != "options":
        print(dumps(config), end="")
    if arguments.format == "both":
        print(f"\nThe same as options of `danlu train {arguments.recipe}`:")
    if arguments.format != "json":
        print(*_options(config), sep="\n")
    return 0


def _options(config: Any) -> Iterator[str]:
    from danlu.cli.overrides import leaves

    for path, value in leaves(config):
        if path not in _FIXED:
            values = value if isinstance(value, (tuple, list)) else [value]
            yield shlex.join([f"--{path}", *map(str, values)])


def report(arguments: argparse.Namespace) -> int:
    """Write a run's plots and page, and say where they are."""
    from danlu.report import write

    print(write(arguments.folder))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Print the examination of this machine."""
    from danlu.cli.doctor import examine

    examine()
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Measure claims again."""
    from danlu.claims import main

    return main(arguments.words)


def _free_folder(recipe: str) -> Path:
    """Return the first of runs/RECIPE-1, runs/RECIPE-2, ... that is not there."""
    number = 1
    while (folder := Path("runs") / f"{recipe}-{number}").exists():
        number += 1
    return folder


def encode(arguments: argparse.Namespace) -> int:
    """Write images as codes."""
    from danlu.cli import codec

    return codec.encode(arguments)


def decode(arguments: argparse.Namespace) -> int:
    """Draw the images of codes."""
    from danlu.cli import codec

    return codec.decode(arguments)
