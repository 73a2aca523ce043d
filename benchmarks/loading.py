"""Loading: what a batch costs, alone and in a training step, and how tokenizing scales with processes.

Parts: ``batch`` (16 windows of 256 tokens out of one array, out of a folder of tokens whose blocks are checked, and
out of two folders mixed by weight), ``text`` and ``images`` (a training step of `lm-dense` and of `digits-flow` with
one batch over and over, with the next batch made by the loop, and by a thread), ``workers`` (`danlu tokenize` of 48 MB
of lines with a vocabulary that is given, by one process and by two).
"""

import json
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from danlu import recipes
from danlu.data import TextConfig, open_text, tokenize
from danlu.data.loader import Loader
from danlu.train import assemble

PARTS = ("batch", "text", "images", "workers")


def lines(path: Path, megabytes: float) -> None:
    """Write lines of JSON whose texts are parts of the standard library's source."""
    texts = [p.read_text(errors="replace") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    with path.open("w") as file:
        n = 0
        while file.tell() < megabytes * 1e6:
            text = texts[n % len(texts)]
            start = n * 4001 % max(1, len(text) - 4000)
            file.write(json.dumps({"text": f"{n}\n" + text[start : start + 4000]}) + "\n")
            n += 1


def batches(place: Path, options: harness.Options) -> harness.Comparison:
    """One batch, from each kind of data."""
    for name in ("one", "two"):
        lines(place / f"{name}.jsonl", 4)
    tokenize([str(place / "one.jsonl")], place / "one")
    tokenize([str(place / "two.jsonl")], place / "two", tokenizer=place / "one" / "tokenizer.json")
    one = open_text(TextConfig(path=(str(place / "one"),)))
    array = one.train.tokens
    plain = np.concatenate([part[0 : len(part)] for part in array.parts])  # type: ignore[union-attr]
    loaders = {
        "array": Loader(plain, end=0, length=256, batch=16),
        "folder of tokens": one.train,
        "two folders, by weight": open_text(
            TextConfig(path=(str(place / "one"), str(place / "two")), weights=(0.7, 0.3))
        ).train,
    }
    runs: dict[str, Callable[[], object]] = {name: loader.__next__ for name, loader in loaders.items()}
    return harness.compare("16 windows of 256 tokens", runs, base="array", options=options)


def steps(recipe: str, options: harness.Options) -> harness.Comparison:
    """A training step of a recipe."""

    def step(prefetch: bool | None) -> Callable[[], object]:
        parts = assemble(recipes.load(recipe))
        loader: Any = parts.data.train
        loader.prefetch = prefetch is True
        fixed = next(loader)

        def run() -> None:
            batch = fixed if prefetch is None else next(loader)
            batch = {**batch, "position": torch.arange(len(next(iter(batch.values()))))}
            parts.objective(batch).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()

        return run

    runs = {"one batch": step(None), "made by the loop": step(False), "made by a thread": step(True)}
    return harness.compare(f"a step of {recipe}", runs, base="one batch", options=options)


def workers(place: Path, options: harness.Options) -> harness.Comparison:
    """Tokenizing by one and two processes."""
    lines(place / "few.jsonl", 1)
    lines(place / "many.jsonl", 16 if options.quick else 48)
    tokenize([str(place / "few.jsonl")], place / "few")

    def run(count: int) -> Callable[[], object]:
        def one() -> None:
            shutil.rmtree(place / "out", ignore_errors=True)
            tokenize(
                [str(place / "many.jsonl")], place / "out", workers=count, tokenizer=place / "few" / "tokenizer.json"
            )

        return one

    runs = {f"{count} process{'es' if count > 1 else ''}": run(count) for count in (1, 2)}
    return harness.compare("danlu tokenize", runs, base="1 process", options=options)


def main() -> None:
    """Run the parts that were asked for."""
    options = harness.options(__doc__, parts=PARTS)
    with tempfile.TemporaryDirectory() as place:
        made = {
            "batch": lambda: batches(Path(place), options),
            "text": lambda: steps("lm-dense", options),
            "images": lambda: steps("digits-flow", options),
            "workers": lambda: workers(Path(place), options),
        }
        harness.write("loading", __doc__, [made[part]() for part in options.parts or PARTS], options)


if __name__ == "__main__":
    main()
