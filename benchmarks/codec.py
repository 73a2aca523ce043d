"""Rate and distortion of DDCM on held-out images, and what choosing the codewords costs beside the network.

Encodes held-out images of a run that denoises (``danlu train digits-flow``, say) at several numbers of steps and
codewords, and compares the peak signal-to-noise ratio (2 is the range of a pixel) with the bits a pixel. Then times,
for a batch of 16, one step's network, its choice of codewords, and the choice as published: the codebook drawn again
for every image.

    python -m benchmarks.codec runs/digits-flow-1
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.drawing import pyplot
from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.data import to_float
from danlu.diffusion import Codebook, CodecConfig, encode
from danlu.train import restore

STEPS = (10, 25, 50, 100)
SIZES = {"K = 4": (4, 1), "K = 64": (64, 1), "K = 1024": (1024, 1), "K = 256, four atoms": (256, 4)}
BATCH = 16


def milliseconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median processor time of one thread."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return 1000 * statistics.median(found[1:])


def costs(objective: Any, shape: tuple[int, ...], codewords: int) -> dict[str, float]:
    """Milliseconds of a step for a batch of 16, by what they are spent on."""
    size = math.prod(shape)
    book, residual = Codebook(codewords, size), torch.randn(BATCH, size)
    x, t = torch.randn(BATCH, *shape), torch.full((BATCH,), 0.5)
    denoise = objective.denoiser((BATCH, *shape))

    def choose() -> torch.Tensor:
        words = book(3)
        return words[(residual @ words.T).argmax(-1)]

    def published() -> list[torch.Tensor]:
        found = []
        for row in residual:
            words = torch.randn(codewords, size, generator=torch.Generator().manual_seed(3))
            found.append(words[(words @ row).argmax()])
        return found

    with torch.no_grad():
        return {
            "network": milliseconds(lambda: denoise(x, t)),
            "danlu's choice": milliseconds(choose),
            "drawn for every image": milliseconds(published),
        }


def main() -> None:
    """Encode, compare, time and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that denoises")
    parser.add_argument("--count", type=int, default=64, help="held-out images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = restore(arguments.run)
    images = to_float(parts.data.held_out["images"])
    images = images[torch.linspace(0, len(images) - 1, arguments.count).long()]
    pixels = images[0, 0].numel()
    rates: dict[str, list[tuple[float, float]]] = {}
    for name, (codewords, atoms) in SIZES.items():
        for steps in STEPS:
            config = CodecConfig(steps=steps, codewords=codewords, atoms=atoms, gain_bits=3)
            denoise = parts.objective.denoiser(tuple(images.shape))
            drawn = encode(denoise, images, parts.objective.schedule, config)[1].clamp(-1, 1)
            error = (drawn - images).square().mean(dim=(1, 2, 3))
            quality = float((10 * torch.log10(4 / error)).mean())
            rates.setdefault(name, []).append((config.bits / pixels, quality))
            print(f"{name:22} {steps:4} steps  {config.bits / pixels:7.3f} bits a pixel  {quality:6.2f} dB", flush=True)
    shape = tuple(images.shape[1:])
    spent = {f"K = {codewords}": costs(parts.objective, shape, codewords) for codewords in (64, 256, 1024)}
    for name, each in spent.items():
        print(name, {what: round(value, 2) for what, value in each.items()})

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in rates.items():
        axes.plot(*zip(*points, strict=True), "-o", ms=3, label=name)
    axes.set(xscale="log", xlabel="bits a pixel", ylabel="peak signal-to-noise ratio, dB")
    axes.set_title(f"DDCM on {arguments.count} held-out images of {shape[1]} x {shape[2]}", fontsize=10)
    axes.legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "codec.png", dpi=100)
    result = {"machine": describe(), "image": shape, "rate and quality": rates, "milliseconds a step of 16": spent}
    (RESULTS / "codec.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
