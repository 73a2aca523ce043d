"""A prefix that sees itself against a causal model, at equal tokens: the loss of what follows the same prefixes.

Three ways of training the same small model on the same windows in the same order:

* ``prefix``: the recipe ``lm-prefix``, mask "prefix", the loss of what follows the prefix;
* ``causal``: the same with the mask "causal" (the controlled comparison: the mask alone differs);
* ``dense``: the recipe ``lm-dense``, mask "causal", the loss of every token, of which there are twice as many.

All are measured by ``PrefixLM`` on all of the validation text, where the prefix of a window belongs to the window.
Every (way, seed) is trained in its own folder under ``--runs``; a complete folder is not trained again, an interrupted
one is resumed. Seeds go round before ways, so that a study cut short is a smaller study.

    python -m benchmarks.prefix_study --runs runs/prefix --seeds 0 1 2
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.lm_study import finished
from benchmarks.machine import describe
from danlu.data import TextConfig
from danlu.nn import GQAConfig
from danlu.objectives import PrefixLM, evaluate
from danlu.optim import AdamWConfig, WarmupStableDecay
from danlu.recipes import load
from danlu.train import RunConfig, TrainConfig, assemble, load_objective

STEPS, WIDTH, LAYERS, HIDDEN, LENGTH, BATCH, VOCABULARY = 400, 128, 4, 320, 128, 16, 1024


def ways(steps: int) -> dict[str, RunConfig]:
    """The three ways of training, small."""
    prefix = small(load("lm-prefix"), steps)
    causal = replace(prefix, model=replace(prefix.model, attention=GQAConfig(num_heads=4)))
    return {"prefix": prefix, "causal": causal, "dense": small(load("lm-dense"), steps)}


def small(config: RunConfig, steps: int) -> RunConfig:
    """Fewer and narrower layers, a small vocabulary, short windows and AdamW; no other field changes."""
    return replace(
        config,
        data=TextConfig(vocab_size=VOCABULARY, length=LENGTH, batch=BATCH),
        model=replace(config.model, dim=WIDTH, layers=LAYERS, hidden=HIDDEN),
        optim=AdamWConfig(lr=3e-3),
        schedule=WarmupStableDecay(warmup=20, decay=0.4),
        train=TrainConfig(
            steps=steps, eval_every=None, eval_batches=16, checkpoint_every=100, threads=1, tensorboard=False
        ),
    )


def measured(folder: Path, config: RunConfig) -> dict[str, float]:
    """The loss of what follows the prefixes, over all of the validation text, in the arithmetic of the run."""
    data = assemble(config).data
    objective, _ = load_objective(folder)
    return evaluate(PrefixLM(objective.model, byte_lengths=data.byte_lengths), data.validation())


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=Path, default=Path("runs/prefix"))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console, configs = Console(), ways(arguments.steps)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for seed in arguments.seeds:
        for name, config in configs.items():
            seeded = replace(config, train=replace(config.train, seed=seed))
            folder = arguments.runs / f"{name}-{seed}"
            finished(folder, seeded)
            figures[name].append(measured(folder, seeded))
            console.print(f"{name} seed {seed}: {figures[name][-1]}", highlight=False)

    base = [row["val_loss"] for row in figures["causal"]]
    table = Table("", "nats a token behind the prefix (std)", "minus causal (std)")
    for name, rows in figures.items():
        losses = [row["val_loss"] for row in rows]
        apart = [loss - other for loss, other in zip(losses, base)]
        table.add_row(name, spread(losses), "" if name == "causal" else spread(apart))
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    document = {"steps": arguments.steps, "seeds": arguments.seeds, "machine": describe(), "results": figures}
    (RESULTS / "prefix_study.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def spread(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    deviation = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
