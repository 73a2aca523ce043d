"""Weights in bfloat16 beside float32 ones: the final loss of a small language model under every optimizer here.

The weights are kept in float32, or in bfloat16 with each ``rounding``; the network computes in float32 from them either
way, and gradients arrive in the dtype of the weights, so that nothing else differs and a machine without bfloat16
units finds the same. Every optimizer is trained at a rate that is about its best and at a small one, a 32nd of it, as
weights meet at the end of a schedule or in fine-tuning, where most of its steps are below the resolution of a weight.
Each (optimizer, rate, weights, seed) is a JSON file under ``--runs`` and is not trained again.

    python -m benchmarks.bfloat16_weights --runs runs/bfloat16-weights    # 120 runs of five seconds
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.func import functional_call

from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.optim import (
    AdamWConfig,
    AmosConfig,
    Constant,
    LionConfig,
    MuonConfig,
    TigerConfig,
    WarmupStableDecay,
    schedule,
)
from danlu.protocols import Objective
from danlu.recipes import load
from danlu.train import RunConfig, TrainConfig, assemble

SMALL = 1 / 32
WEIGHTS = ("float32", "nearest", "stochastic", "compensated")
#: For each optimizer its configuration by learning rate and rounding, and the rate that is about its best.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], float]] = {
    "AdamW": (lambda lr, **options: AdamWConfig(lr=lr, **options), 8e-3),
    "Muon": (lambda lr, **options: MuonConfig(lr=lr, dtype="float32", **options), 8e-3),
    "Lion": (lambda lr, **options: LionConfig(lr=lr, weight_decay=0.1, **options), 2e-3),
    "Tiger": (lambda lr, **options: TigerConfig(lr=lr, **options), 16e-3),
    "Amos": (lambda lr, **options: AmosConfig(lr=lr, embedding_eta=1.0, **options), 0.08),
}


def configured(name: str, lr: float, weights: str, seed: int, steps: int) -> RunConfig:
    """Return the recipe ``lm-dense``, 64 wide and two layers deep."""
    make, _ = OPTIMIZERS[name]
    return replace(
        load("lm-dense"),
        data=TextConfig(vocab_size=512, length=64, batch=8),
        model=TransformerConfig(dim=64, layers=2, hidden=160, attention=GQAConfig(num_heads=4)),
        optim=make(lr, rounding="nearest" if weights == "float32" else weights),
        schedule=Constant(warmup=20) if name == "Amos" else WarmupStableDecay(warmup=20, decay=0.4),
        train=TrainConfig(steps=steps, seed=seed, threads=1, device="cpu"),
    )


def widened(objective: Objective, batch: Any) -> Any:
    """Return the loss of a batch, computed in float32 whatever the weights are kept in."""
    wide = {name: parameter.float() for name, parameter in objective.named_parameters()}
    return functional_call(objective, wide, (batch,))


def trained(config: RunConfig, weights: str) -> dict[str, float]:
    """Train one run and return its validation loss at the beginning and at the end."""
    parts = assemble(config)
    objective, validation = parts.objective, list(parts.data.validation(32))
    if weights != "float32":
        for parameter in objective.parameters():
            parameter.data = parameter.data.bfloat16()
    optimizer = config.optim.build(objective)
    scheduler = schedule(optimizer, config.schedule, config.train.steps)

    def loss() -> float:
        with torch.no_grad():
            objective.eval()
            total = sum(float(widened(objective, batch)) for batch in validation)
            objective.train()
            return total / sum(float(objective.denominator(batch)) for batch in validation)

    start, began = loss(), time.process_time()
    for _ in range(config.train.steps):
        batch = next(parts.data.train)
        (widened(objective, batch) / float(objective.denominator(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"start": start, "val_loss": loss(), "seconds": time.process_time() - began}


def run(folder: Path, name: str, lr: float, weights: str, seed: int, steps: int) -> dict[str, float]:
    """Train one run, or read it where it is finished."""
    path = folder / f"{name}-{lr:g}-{weights}-{seed}-{steps}.json"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a step of")  # that updates are lost is what is measured
            found = trained(configured(name, lr, weights, seed, steps), weights)
        path.with_suffix(".part").write_text(json.dumps(found) + "\n")
        path.with_suffix(".part").replace(path)
    found = json.loads(path.read_text())
    print(name, f"{lr:g}", weights, seed, f"{found['val_loss']:.4f}", f"{found['seconds']:.1f} s", flush=True)
    return found  # type: ignore[no-any-return]


def main() -> None:
    """Train what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bfloat16-weights"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)

    losses: dict[str, dict[str, list[float]]] = {}
    begin: list[float] = []
    for seed in arguments.seeds:
        for name in arguments.optimizers:
            for factor in (1.0, SMALL):
                lr = OPTIMIZERS[name][1] * factor
                row = losses.setdefault(f"{name}, {lr:g}", {weights: [] for weights in WEIGHTS})
                for weights in WEIGHTS:
                    found = run(arguments.runs, name, lr, weights, seed, arguments.steps)
                    row[weights].append(found["val_loss"])
                    begin.append(found["start"])
    table = Table("", *WEIGHTS, title=f"validation loss, from {statistics.mean(begin):.3f}")
    for label, row in losses.items():
        spread = [f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}" for found in row.values()]
        table.add_row(label, *spread)
    Console().print(table)
    if arguments.optimizers == list(OPTIMIZERS):
        document = {"machine": describe(), "steps": arguments.steps, "seeds": arguments.seeds, "losses": losses}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "bfloat16_weights.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
