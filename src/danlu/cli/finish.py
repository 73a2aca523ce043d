"""What follows a training that is complete: samples, and the report."""

import os
import shlex
from pathlib import Path
from typing import Any

from danlu.cli.common import is_text, printable
from danlu.usercode import code_words

__all__ = ["finish"]

_SAMPLES = 3
_SAMPLE_TOKENS = 160
_IMAGES = 64


def finish(folder: Path, code: int) -> int:
    """Write the samples and the report of a run that is complete; return ``code``."""
    if code == 0 and os.environ.get("RANK", "0") == "0":
        more = _write_samples(folder)
        from danlu.report import write

        print(f"Report: {write(folder)}")
        if more:
            print(f"More: danlu sample {shlex.join([str(folder), *code_words(folder)])} {more}")
    return code


def _write_samples(folder: Path) -> str:
    """Write what a complete run generates into its folder, unless it is there; return options that write more."""
    if not is_text(folder):
        return _write_images(folder)
    try:
        if not (folder / "samples.txt").exists():
            _write_texts(folder)
    except (ValueError, RuntimeError) as problem:
        # An encoder writes no text, and neither does a model whose weights are not finite: the report matters more.
        print(f"No samples: {problem}")
        return ""
    return '--prompt "..."'


def _write_texts(folder: Path) -> None:
    """Write a few texts, from nothing, to samples.txt and the terminal."""
    from danlu.data import load_tokenizer
    from danlu.evaluation import continuation
    from danlu.train import load

    model, config = load(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    written = []
    for index in range(_SAMPLES):
        heading = f"--- sample {index + 1} of {_SAMPLES}"
        text = "".join(continuation(model, tokenizer, tokens=_SAMPLE_TOKENS, seed=config.train.seed + index))
        print(heading, printable(text), sep="\n", flush=True)
        written += [heading, text]
    (folder / "samples.txt").write_text("\n".join([*written, ""]), encoding="utf-8")


def _write_images(folder: Path) -> str:
    """Write samples.png into a run's folder unless it is there; return options that draw more, or "" if it draws none.

    Of few classes each has a column.
    """
    from danlu.evaluation import draw_classes, sampling_steps
    from danlu.protocols import Generator
    from danlu.report import write_images
    from danlu.train import load_objective

    objective, config = load_objective(folder)
    model: Any = config.model
    if not isinstance(objective, Generator):
        return ""
    steps = sampling_steps(objective)
    path = folder / "samples.png"
    if not path.exists():
        columns = model.num_classes if 1 < model.num_classes <= 16 else 8
        count = _IMAGES // columns * columns
        images = draw_classes(objective, model, count, steps=steps, seed=config.train.seed)
        print(f"Samples: {write_images(path, images, columns=columns)}")
    return f"--steps {steps} --out samples.png"
