"""Upsample guidance on digits: 28 pixels from a model that was trained at 14, beside what one would do without it.

A flow-matching model learns the digits at 14 x 14. Then images of 28 x 28 come (a) from the same network asked for the
large size, (b) from its small samples, enlarged bicubically, (c) from upsample guidance at several weights; all are
compared with the held-out digits at 28 pixels by the Frechet distance on the features of ``digits-classifier``.
A finished training is not done again.

    python -m benchmarks.upsample_guidance --runs runs/upsample --steps 800
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.data import open_images
from danlu.diffusion import euler, prior, time_grid, upsample_guidance
from danlu.evaluation import feature_network, measure
from danlu.recipes import load
from danlu.report import write_images
from danlu.train import RunConfig, load_objective, resume, train

WEIGHTS = (1.0, 1.2, 1.5)
PORTION = 64


def configuration(seed: int, steps: int) -> RunConfig:
    """``digits-flow`` at half the size: one network level less in pixels, trained on one thread."""
    config = load("digits-flow")
    loop = replace(
        config.train, steps=steps, seed=seed, eval_every=None, threads=1, tensorboard=False, precision="float32"
    )
    model = replace(config.model, patch=1, widths=(32, 64), blocks=(2, 3))
    return replace(config, data=replace(config.data, size=14), model=model, train=loop)


def drawn(objective: Any, labels: Tensor, side: int, steps: int, weight: float = 0.0) -> Tensor:
    """Images of ``labels`` at ``side`` pixels, guided by the small model if there is a weight."""
    generator = torch.Generator().manual_seed(0)
    schedule, parts = objective.schedule, []
    for part in labels.split(PORTION):
        shape = (len(part), 1, side, side)
        denoise = objective.denoiser(shape, labels=part)
        if weight:
            denoise = upsample_guidance(denoise, schedule, 2, weight=weight)
        x = prior(shape, schedule, generator=generator)
        with torch.no_grad():
            parts.append(euler(denoise, x, schedule, time_grid(schedule, steps)))
    return torch.cat(parts)


def main() -> None:
    """Train, draw, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/upsample"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--sampling", type=int, default=25, help="steps of the sampler")
    parser.add_argument("--count", type=int, default=500, help="images compared")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = open_images(load("digits-flow").data, seed=0)
    classifier = load("digits-classifier")
    classifier = replace(classifier, train=replace(classifier.train, threads=1))
    network: Any = feature_network(classifier, sha256=data.manifest["sha256"])
    known = data.held_out["labels"]  # in the order of the classes
    labels = known[torch.linspace(0, len(known) - 1, arguments.count).long()]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"digits14-{seed}"
        config = configuration(seed, arguments.steps)
        if (folder / "config.json").exists():
            resume(folder, quiet=True)
        else:
            train(config, folder, quiet=True)
        objective = load_objective(folder)[0]
        small = drawn(objective, labels, 14, arguments.sampling)
        images = {
            "the same network at 28 pixels": drawn(objective, labels, 28, arguments.sampling),
            "14 pixels, enlarged bicubically": interpolate(small, scale_factor=2, mode="bicubic"),
        }
        for weight in WEIGHTS:
            images[f"upsample guidance, weight {weight:g}"] = drawn(objective, labels, 28, arguments.sampling, weight)
        for name, picture in images.items():
            found.setdefault(name, {})[seed] = measure(picture, data, network.features)
            write_images(
                folder / f"{name.replace(' ', '-').replace(',', '')}.png",
                picture[torch.linspace(0, len(picture) - 1, 40).long()],
                columns=10,
            )
    table = Table(title="Frechet distance to held-out digits, 28 x 28")
    for column in ("", *(f"seed {seed}" for seed in arguments.seeds), "precision, recall (first seed)"):
        table.add_column(column)
    for name, by_seed in found.items():
        first = by_seed[arguments.seeds[0]]
        distances = [f"{by_seed[seed]['frechet_distance']:.1f}" for seed in arguments.seeds]
        table.add_row(name, *distances, f"{first['precision']:.2f}, {first['recall']:.2f}")
    Console().print(table)
    floors = [found["the same network at 28 pixels"][seed]["frechet_floor"] for seed in arguments.seeds]
    print("training images beside the held-out ones:", floors)
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": describe(), "arguments": {k: str(v) for k, v in vars(arguments).items()}, "found": found}
    (RESULTS / "upsample_guidance.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
