"""What the commands do with a run that generates images: draw them, and measure them."""

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import torch

from danlu._validate import choice, integer

__all__ = ["measure", "sample", "write_samples"]

_COUNT = 64


def write_samples(folder: Path) -> str:
    """Write samples.png into a run's folder unless it is there; return options that draw more, or "" if it draws none.

    Of few classes each has a column.
    """
    from danlu.evaluation import draw_classes, sampling_steps
    from danlu.report import write_images
    from danlu.train import run
    from danlu.train.component import component

    if not hasattr(component(run.read_config(folder).objective), "sample"):
        return ""
    objective, config = run.load_objective(folder)
    steps = sampling_steps(objective)
    path = folder / "samples.png"
    if not path.exists():
        columns = config.model.num_classes if 1 < config.model.num_classes <= 16 else 8
        count = _COUNT // columns * columns
        images = draw_classes(objective, config.model, count, steps=steps, seed=config.train.seed)
        print(f"Samples: {write_images(path, images, columns=columns)}")
    return f"--steps {steps} --out samples.png"


def sample(arguments: argparse.Namespace) -> int:
    """Draw images and write them as one picture, or the way to them as an animation."""
    from danlu.evaluation import class_names, draw_classes, sampling_steps
    from danlu.report import write_images
    from danlu.train import run
    from danlu.train.component import component

    if arguments.prompt:
        raise ValueError(f"--prompt is for runs on text; {arguments.folder} has no tokenizer")
    kind = component(run.read_config(arguments.folder).objective)
    if not hasattr(kind, "sample"):
        raise ValueError(f"{arguments.folder} is a run of {kind.__name__}, which writes no text and draws no images")
    objective, config = run.load_objective(arguments.folder)
    out = Path(arguments.out or Path(arguments.folder) / "drawn.png")
    choice("--out, its suffix,", out.suffix.lower(), (".png", ".jpg", ".webp", ".gif"))
    moving = out.suffix.lower() in (".gif", ".webp")
    names = class_names(arguments.folder, config.model.num_classes)
    chosen = None
    if arguments.classes is not None:
        if not names:
            raise ValueError(f"--classes: {arguments.folder} was trained without classes")
        for name in arguments.classes:
            choice("--classes", name, names)
        chosen = torch.tensor([names.index(name) for name in arguments.classes])
    larger = {}
    if arguments.upsample is not None:
        integer("--upsample", arguments.upsample)
        if "upsample" not in inspect.signature(kind.sample).parameters:
            raise ValueError(
                f"--upsample is for runs that denoise or follow a velocity, not for one of {kind.__name__}"
            )
        larger = {"upsample": arguments.upsample}
    if arguments.steps is not None:
        integer("--steps", arguments.steps)
    images = draw_classes(
        objective,
        config.model,
        arguments.count or _COUNT,
        classes=chosen,
        steps=sampling_steps(objective, arguments.steps),
        seed=arguments.seed,
        guidance=arguments.guidance,
        trajectory=moving,
        **larger,
    )
    print(write_images(out, images))
    return 0


def measure(arguments: argparse.Namespace, parts: Any) -> None:
    """Print the distances between a run's images and the held-out ones of its data."""
    from danlu.evaluation import feature_network, measure_images, sampling_steps
    from danlu.recipes import load
    from danlu.train import run

    objective, data = parts.objective, parts.data
    if not hasattr(objective, "sample"):
        return
    integer("--count", arguments.count, low=16)
    if arguments.steps is not None:
        integer("--steps", arguments.steps)
    if arguments.features is not None:
        network: Any = run.load(arguments.features)[0]
        if not hasattr(network, "features"):
            raise ValueError(f"--features must be the run of a classifier of images, got {arguments.features}")
    elif not data.classes:
        raise ValueError(
            "these images have no classes to train a classifier on, by whose features they could be compared; "
            "give one with --features RUN"
        )
    else:
        print("comparing by a classifier of the same images (trained once, then kept) ...", file=sys.stderr, flush=True)
        network = feature_network(load("digits-classifier"), parts.config.data, sha256=data.manifest["sha256"])
    steps = sampling_steps(objective, arguments.steps)
    print(f"steps {steps}")
    found = measure_images(
        objective, data, network, arguments.count, steps=steps, seed=arguments.seed, guidance=arguments.guidance
    )
    for name, value in found.items():
        print(f"{name} {value:.6g}")
