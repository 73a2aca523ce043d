"""Does the best learning rate stay where it was when the model gets wider?

The same small Transformer (heads of 32, so that more width is more heads) on the default corpus, AdamW, a grid of
learning rates at every width, in two parametrisations: one rate for all parameters from the model's own
initialisation, and the spectral condition (`danlu.optim.mup`). Every finished run is a line of ``--runs``; a line that
is there is not trained again, so an interrupted study goes on where it was.

    python -m benchmarks.mup_transfer --runs runs/mup.jsonl --widths 64 128 256 512
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.optim import AdamW

from benchmarks.drawing import pyplot
from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.data.text import TextConfig, open_text
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM, evaluate
from danlu.optim import Cosine, clip_grad_norm_, mup_groups, schedule, spectral_init_

HEAD, LAYERS, BASE, BETAS = 32, 2, 128, (0.9, 0.95)
ENDS = ("attention.out.weight", "feed_forward.down.weight")  # maps that write to the residual stream


def run(parametrisation: str, width: int, lr: float, seed: int, *, steps: int, batch: int, length: int) -> dict:
    """Train once and return the validation loss in bits a byte."""
    data = open_text(TextConfig(vocab_size=1024, length=length, batch=batch), seed=seed)
    config = TransformerConfig(
        vocab_size=data.tokenizer.vocab_size,
        dim=width,
        layers=LAYERS,
        hidden=5 * width // 2,
        attention=GQAConfig(num_heads=width // HEAD),
    )
    torch.manual_seed(seed)
    objective = CausalLM(Transformer(config), byte_lengths=data.byte_lengths)
    if parametrisation == "spectral":
        # A square map of the model has twice the norm, its head 0.7 of it at the base width: the two begin alike.
        depth = (2 * LAYERS) ** -0.5
        gains = {
            "model.head.weight": 0.7,
            **{f"model.blocks.{i}.{end}": 2 * depth for i in range(LAYERS) for end in ENDS},
        }
        spectral_init_(objective, gain=lambda name: gains.get(name, 2.0))
        groups = mup_groups(objective, lr, BASE)
    else:
        groups = [{"params": list(objective.parameters())}]
    optimizer = AdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    scheduler = schedule(optimizer, Cosine(warmup=10, floor=0.0), steps)
    started = time.process_time()
    for _ in range(steps):
        drawn = next(data.train)
        optimizer.zero_grad()
        (objective(drawn) / objective.denominator(drawn)).backward()
        clip_grad_norm_(objective.parameters())
        optimizer.step()
        scheduler.step()
    found = evaluate(objective, data.validation(24))
    return {
        "parametrisation": parametrisation,
        "width": width,
        "lr": lr,
        "seed": seed,
        "val_bpb": found["val_bpb"],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def draw(lines: list[dict], path: Path) -> None:
    """Draw validation bits over the learning rate, one curve a width, one panel a parametrisation."""
    names = sorted({line["parametrisation"] for line in lines}, key=["plain", "spectral"].index)
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.6), sharey=True, squeeze=False)
    widths = sorted({line["width"] for line in lines})
    for axis, name in zip(axes[0], names):
        for index, width in enumerate(widths):
            points = sorted(
                (r["lr"], r["val_bpb"]) for r in lines if (r["parametrisation"], r["width"]) == (name, width)
            )
            if not points:
                continue
            rates, bits = zip(*points)
            colour = pyplot.get_cmap("viridis")(index / max(1, len(widths) - 1))
            axis.plot(rates, bits, marker="o", label=f"width {width}", color=colour)
            axis.plot(*min(points, key=lambda point: point[1]), marker="*", markersize=14, color=colour)
        axis.set(xscale="log", xlabel="learning rate", title="one rate" if name == "plain" else "spectral condition")
    axes[0, 0].set_ylabel("validation bits a byte")
    axes[0, -1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, then print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mup_transfer.jsonl"))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--rates", nargs="+", type=float, default=[2.0**-k for k in (10, 9, 8, 7, 6, 5)])
    parser.add_argument("--parametrisations", nargs="+", default=["spectral", "plain"], choices=["spectral", "plain"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--write", action="store_true", help="write results/mup_transfer.json and the picture in docs/images"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    size = {"steps": arguments.steps, "batch": arguments.batch, "length": arguments.length}
    done = [json.loads(line) for line in arguments.runs.read_text().splitlines()] if arguments.runs.exists() else []
    if any({key: line[key] for key in size} != size for line in done):
        raise SystemExit(f"{arguments.runs} holds runs of another size; use --runs")
    have = {(line["parametrisation"], line["width"], line["lr"], line["seed"]) for line in done}
    for width in arguments.widths:
        for lr in arguments.rates:
            for name in arguments.parametrisations:
                if (name, width, lr, arguments.seed) in have:
                    continue
                line = {**run(name, width, lr, arguments.seed, **size), **size}
                done.append(line)
                with arguments.runs.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name:9} width {width:5} rate {lr:.5f}: {line['val_bpb']:.4f}", flush=True)
    for name in arguments.parametrisations:
        for width in arguments.widths:
            rows = [line for line in done if (line["parametrisation"], line["width"]) == (name, width)]
            best = min(rows, key=lambda line: line["val_bpb"])
            print(f"{name:9} width {width:5}: best rate 2^{torch.tensor(best['lr']).log2():.0f}, {best['val_bpb']:.4f}")
    if arguments.write:
        report = {"machine": describe(), "runs": done}
        (RESULTS / "mup_transfer.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(done, RESULTS.parents[1] / "docs" / "images" / "mup-transfer.png")


if __name__ == "__main__":
    main()
