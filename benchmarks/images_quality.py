"""Frechet distance after equal processor time: flow matching with danlu's U-Net and with diffusers' UNet2DModel.

Everything but the network is the recipe ``digits-flow``: data, batches, objective, AdamW, a rate that falls over the
second half, averaged weights; float32 for both.

    python -m benchmarks.images_quality --minutes 2.5
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from danlu.data import open_images
from danlu.evaluation import draw, feature_network, measure
from danlu.models import UNet
from danlu.objectives import FlowMatching
from danlu.recipes import load

RESULTS = Path(__file__).parent / "results"


class Peer(nn.Module):
    """diffusers' U-Net of 32, 64 and 96 channels, one layer a block, with classes, called as danlu's networks are."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            norm_num_groups=8,
            num_class_embeds=self.num_classes + 1,
        )

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """The velocity."""
        y: Tensor = self.unet(x, 1000 * t, class_labels=classes).sample
        return y


def trained(network: nn.Module, data: Any, seconds: float, rate: float) -> tuple[FlowMatching, int]:
    """Averaged weights after so much processor time, and the number of steps."""
    objective = FlowMatching(network)
    average = copy.deepcopy(objective).eval()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start, steps = time.process_time(), 0
    while (progress := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (steps + 1) / 100, 2 * (1 - progress))
        batch = next(data.train)
        optimizer.zero_grad(set_to_none=True)
        (objective(batch) / len(batch["images"])).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        steps += 1
        with torch.no_grad():
            keep = min(0.999, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(average.parameters()), list(objective.parameters()), 1 - keep)
    return average, steps


def main() -> None:
    """Train and measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="one thread's processor time of a training")
    parser.add_argument("--steps", type=int, default=16, help="of Euler's method")
    parser.add_argument("--count", type=int, default=500, help="images drawn")
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe, classifier = load("digits-flow"), load("digits-classifier")
    found: dict[str, dict[str, float]] = {}
    for name, network in {"danlu": UNet(recipe.model), "diffusers": Peer()}.items():  # type: ignore[arg-type]
        data = open_images(recipe.data)  # type: ignore[arg-type]
        objective, steps = trained(network, data, 60 * arguments.minutes, arguments.rate)
        features: Any = feature_network(classifier, sha256=data.manifest["sha256"])
        torch.set_num_threads(1)
        labels, generator = data.held_out["labels"], torch.Generator().manual_seed(0)
        images = draw(objective, (1, 28, 28), labels, arguments.count, steps=arguments.steps, generator=generator)
        found[name] = {"steps": steps, **measure(images, data, features.features)}
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    report = {"machine": describe(), **vars(arguments), "measured": found}
    (RESULTS / "images_quality.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
