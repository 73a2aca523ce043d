"""What the verbs do with a run that generates images: draw them, and measure them."""

import argparse
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu._validate import choice, integer

__all__ = ["measure", "sample", "write_samples"]

_COUNT = 64
# What a sampler that follows a differential equation needs; an objective that needs fewer says so itself.
_STEPS = 50


def steps_of(objective: Any, asked: int | None) -> int:
    """Return the number of steps to sample with: those asked for, or what the objective is made for."""
    if asked is None:
        return int(getattr(objective, "sampling_steps", _STEPS))
    integer("--steps", asked)
    return asked


def write_samples(folder: Path) -> str:
    """Write samples.png into a run's folder unless it is there; return options that draw more, or "" if it draws none.

    Of few classes each has a column.
    """
    from danlu.report import write_images
    from danlu.train import run
    from danlu.train.component import component

    if not hasattr(component(run.read_config(folder).objective), "sample"):
        return ""
    objective, config = run.load_objective(folder)
    steps = steps_of(objective, None)
    path = folder / "samples.png"
    if not path.exists():
        columns = config.model.num_classes if 1 < config.model.num_classes <= 16 else 8
        count = _COUNT // columns * columns
        images = _draw(objective, config.model, None, count, steps=steps, seed=config.train.seed)
        print(f"Samples: {write_images(path, images, columns=columns)}")
    return f"--steps {steps} --out samples.png"


def sample(arguments: argparse.Namespace) -> int:
    """Draw images and write them as one picture, or the way to them as an animation."""
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
    images = _draw(
        objective,
        config.model,
        chosen,
        arguments.count or _COUNT,
        steps=steps_of(objective, arguments.steps),
        seed=arguments.seed,
        guidance=arguments.guidance,
        trajectory=moving,
        **larger,
    )
    print(write_images(out, images))
    return 0


def class_names(folder: str | Path, count: int) -> list[str]:
    """Return the names of a run's classes, out of its manifest; numbers where it has none."""
    import json

    path = Path(folder) / "manifest.json"
    found = json.loads(path.read_text()).get("classes") if path.is_file() else None
    return [str(name) for name in found] if found else [str(number) for number in range(count)]


def _draw(
    objective: Any,
    model: Any,
    classes: Tensor | None,
    count: int,
    *,
    steps: int,
    seed: int | None,
    **options: Any,
) -> Tensor:
    """Draw images of ``classes`` in turn (None: of all); ``options`` are those of the objective's own ``sample``."""
    device = next(objective.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    labels = None
    if model.num_classes:
        labels = torch.arange(model.num_classes) if classes is None else classes
        labels = labels[torch.arange(count) % len(labels)].to(device)
    side = model.image_size * options.get("upsample", 1)
    shape = (count, model.channels, side, side)
    drawn: Tensor = objective.sample(shape, steps=steps, generator=generator, labels=labels, **options)
    return drawn


def measure(arguments: argparse.Namespace, parts: Any) -> None:
    """Print the distances between a run's images and the held-out ones of its data."""
    from danlu.recipes import load
    from danlu.report import generation
    from danlu.train import run

    objective, data = parts.objective, parts.data
    if not hasattr(objective, "sample"):
        return
    integer("--count", arguments.count, low=16)
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
        recipe = load("digits-classifier")
        # One classifier of these images, whatever the batches in which a generator saw them.
        images = replace(parts.config.data, augment=(), batch=recipe.data.batch)
        network = generation.feature_network(replace(recipe, data=images), sha256=data.manifest["sha256"])
    steps = steps_of(objective, arguments.steps)
    drawn = generation.draw(
        objective,
        tuple(data.held_out["images"].shape[1:]),
        data.held_out["labels"] if parts.config.model.num_classes else None,
        arguments.count,
        steps=steps,
        generator=torch.Generator(parts.policy.device).manual_seed(arguments.seed),
        guidance=arguments.guidance,
    )
    print(f"steps {steps}")
    device = parts.policy.device
    found = generation.measure(drawn, data, lambda images: network.features(images.to(device)))
    for name, value in found.items():
        print(f"{name} {value:.6g}")
