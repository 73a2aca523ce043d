"""``danlu eval``: a run's measures on its validation data."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from danlu._validate import integer
from danlu.cli.common import add_run, is_text, open_run

EXAMPLES = """\
  danlu eval runs/lm-1                 all of its validation text
  danlu eval runs/lm-1 --batches 16    a part, spread evenly over it
  danlu eval runs/lm-1@best            its best checkpoint; @600 is that of step 600
  danlu eval runs/lm-1 --data b.txt    what of other data would be held out, by the run's tokenizer
  danlu eval runs/lm-1 --json          one JSON object
  danlu eval runs/digits-1 --steps 2   a generator of images: its distance from the held-out ones, too"""

_DRAWN = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument("--data", metavar="PATH", nargs="+", help="other data, or its own at another place")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--batches", type=int, metavar="N", help="validation batches to measure (default: all)")
    parser.add_argument("--count", type=int, metavar="N", help=f"images to draw (default: {_DRAWN})")
    parser.add_argument(
        "--features", metavar="RUN", help="the classifier to compare images by (default: one trained on the same)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the images drawn (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="images: steps of the sampler")
    parser.add_argument("--guidance", type=float, metavar="W", help="images: scale of guidance to the class")


def run(arguments: argparse.Namespace) -> int:
    """Print the run's measures."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # of several processes the first measures and prints
    at = open_run(arguments, "eval")
    for option, low in (("batches", 1), ("count", 16), ("seed", 0), ("steps", 1)):
        value = getattr(arguments, option)
        if value is not None:
            integer(f"--{option}", value, low=low, high=2**63 - 1 if option == "seed" else None)
    text = is_text(arguments.folder)
    for option in ("count", "features", "seed", "steps", "guidance"):
        if text and getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for runs on images; {arguments.folder} is a run on text")
    from danlu.cli.overrides import apply
    from danlu.train import read_config, run

    other = None
    if arguments.data:
        other = apply(read_config(at), ["--data.path", *arguments.data])
    parts = run.restore(at, config=other)
    print(_measured(arguments.batches, parts.config.train.eval_batches), file=sys.stderr, flush=True)
    found = run.evaluate(parts, batches=arguments.batches)
    if not arguments.json:
        _print(found)
    if not text:
        more = _measure(arguments, parts)
        found |= more
        if not arguments.json:
            _print(more)
    if arguments.json:
        # JSON has no word for what is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
        print(json.dumps({"run": str(at), "data": parts.data.manifest.get("source"), **finite}))
    return 0


def _print(found: Mapping[str, float]) -> None:
    for name, value in found.items():
        print(f"{name} {value:.6g}", flush=True)


def _measured(batches: int | None, trained: int | None) -> str:
    """Say which validation data are measured, and whether training measured others.

    >>> _measured(None, 16)
    'all of the validation data (training measured 16 batches of it)'
    """
    now, then = ("all" if n is None else f"{n} batch{'' if n == 1 else 'es'}" for n in (batches, trained))
    return f"{now} of the validation data" + ("" if now == then else f" (training measured {then} of it)")


def _measure(arguments: argparse.Namespace, parts: Any) -> dict[str, float]:
    """Return the distances between a run's images and the held-out ones of its data."""
    from danlu import recipes
    from danlu.evaluation import feature_network, measure_images, sampling_steps
    from danlu.protocols import Generator
    from danlu.train import load

    objective, data = parts.objective, parts.data
    if not isinstance(objective, Generator):
        return {}
    if arguments.features is not None:
        network: Any = load(arguments.features)[0]
        if not hasattr(network, "features"):
            raise ValueError(f"--features must be the run of a classifier of images, got {arguments.features}")
    elif not data.classes:
        raise ValueError(
            "these images have no classes to train a classifier on, by whose features they could be compared; "
            "give one with --features RUN"
        )
    else:
        print("comparing by a classifier of the same images (trained once, then kept) ...", file=sys.stderr, flush=True)
        network = feature_network(recipes.load("digits-classifier"), parts.config.data, sha256=data.manifest["sha256"])
    steps = sampling_steps(objective, arguments.steps)
    found = measure_images(
        objective,
        data,
        network,
        arguments.count or _DRAWN,
        steps=steps,
        seed=arguments.seed or 0,
        guidance=arguments.guidance,
    )
    return {"steps": steps, **found}
