"""What follows a training that is complete: samples, and the report."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.cli.common import is_text, printable
from danlu.usercode import code_words

if TYPE_CHECKING:
    from danlu.train.load import RunAt

__all__ = ["finish", "finishing"]

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


def finishing(folder: Path, train: Callable[[], int]) -> int:
    """Train, then write the samples and the report; of a run that diverged from its last finite checkpoint.

    Raises:
        FloatingPointError: the run diverged.
    """
    try:
        code = train()
    except FloatingPointError:
        _finish_diverged(folder)
        raise
    return finish(folder, code)


def _finish_diverged(folder: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    from danlu.report import write
    from danlu.train.load import RunAt, last_finite

    try:
        step = last_finite(folder)
        if step is not None:
            print(f"Samples of step {step}, the last whose weights are finite:")
            _write_samples(folder, RunAt(folder, step))
        print(f"Report: {write(folder)}")
    except (OSError, ValueError) as problem:
        print(f"No report: {problem}")


def _write_samples(folder: Path, at: "RunAt | None" = None) -> str:
    """Write what a complete run generates into its folder, unless it is there; return options that write more."""
    if not is_text(folder):
        return _write_images(folder, at)
    try:
        if not (folder / "samples.txt").exists():
            _write_texts(folder, at)
    except (ValueError, RuntimeError) as problem:
        # An encoder writes no text, and neither does a model whose weights are not finite: the report matters more.
        print(f"No samples: {problem}")
        return ""
    return '--prompt "..."'


def _write_texts(folder: Path, at: "RunAt | None") -> None:
    """Write a few texts, from nothing, to samples.txt and the terminal."""
    from danlu.data import load_tokenizer
    from danlu.evaluation import continuation
    from danlu.train import load

    model, config = load(at or folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    written = []
    for index in range(_SAMPLES):
        heading = f"--- sample {index + 1} of {_SAMPLES}"
        text = "".join(continuation(model, tokenizer, tokens=_SAMPLE_TOKENS, seed=config.train.seed + index))
        print(heading, printable(text), sep="\n", flush=True)
        written += [heading, text]
    (folder / "samples.txt").write_text("\n".join([*written, ""]), encoding="utf-8")


def _write_images(folder: Path, at: "RunAt | None") -> str:
    """Write samples.png into a run's folder unless it is there; return options that draw more, or "" if it draws none.

    Of few classes each has a column.
    """
    from danlu.evaluation import draw_classes, sampling_steps
    from danlu.protocols import Generator
    from danlu.report import write_images
    from danlu.train import load_objective

    objective, config = load_objective(at or folder)
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
