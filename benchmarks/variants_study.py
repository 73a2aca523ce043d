"""Attention variants at equal cache, and balancing rules: small models, several seeds.

Every (variant, seed) is trained in its own folder under ``--runs``; a complete folder is not trained again, an
interrupted one is resumed. Seeds go round before variants, so that a study cut short is a smaller study.

    python -m benchmarks.variants_study attention --runs runs/variants
    python -m benchmarks.variants_study balancing --runs runs/variants

The models are far below the size at which the sources report differences: what the table shows is the spread of seeds
beside the differences at this size.
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
from danlu.models import Transformer
from danlu.nn import AuxiliaryLossConfig, DynamicConfig, GQAConfig, LossFreeConfig
from danlu.nn.balance import max_violation
from danlu.optim import AdamWConfig, WarmupStableDecay
from danlu.recipes.attention import VARIANTS, variant
from danlu.recipes.experts import balanced
from danlu.train import RunConfig, TrainConfig, assemble

STEPS, WIDTH, LAYERS, HIDDEN, LENGTH, BATCH, VOCABULARY = 60, 256, 2, 320, 128, 8, 1024
EXPERTS, ACTIVE, TOKENS, BALANCED_STEPS = 16, 4, 512, 500


def attention() -> dict[str, RunConfig]:
    """Every attention variant on a dense model of two layers."""
    return {name: small(variant(name, "lm-dense")) for name in VARIANTS}


def small(config: RunConfig) -> RunConfig:
    """Two layers, a small vocabulary, short windows and AdamW; no other field changes."""
    return replace(
        config,
        data=TextConfig(vocab_size=VOCABULARY, length=LENGTH, batch=BATCH),
        model=replace(config.model, dim=WIDTH, layers=LAYERS, hidden=HIDDEN),
        optim=AdamWConfig(lr=3e-3),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(steps=STEPS, eval_every=STEPS, eval_batches=16, checkpoint_every=STEPS, threads=1),
    )


def balancing() -> dict[str, RunConfig]:
    """Ways of balancing on a model of one dense and one expert layer; biases are held for the last tenth."""
    held = {"freeze_after": BALANCED_STEPS * 9 // 10}
    rules: dict[str, AuxiliaryLossConfig | LossFreeConfig | DynamicConfig] = {
        "none": LossFreeConfig(rate=0.0),
        "auxiliary loss": AuxiliaryLossConfig(weight=1e-3),
        "loss-free sign": LossFreeConfig(**held),
        "loss-free rms": LossFreeConfig(rule="rms", **held),
        "dynamic A": DynamicConfig(**held),
    }
    return {name: sparse(rule) for name, rule in rules.items()}


def sparse(rule: AuxiliaryLossConfig | LossFreeConfig | DynamicConfig) -> RunConfig:
    """A very small model with 16 experts of which 4 are used."""
    config = balanced("lm-dense", rule)
    assert config.model.experts is not None
    experts = replace(config.model.experts, experts=EXPERTS, active=ACTIVE, hidden=32)
    attention = GQAConfig(heads=2)
    return replace(
        config,
        data=TextConfig(vocab_size=512, length=64, batch=TOKENS // 64),
        model=replace(config.model, dim=64, layers=2, hidden=128, experts=experts, attention=attention),
        optim=AdamWConfig(lr=3e-3),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(
            steps=BALANCED_STEPS, eval_every=BALANCED_STEPS, eval_batches=64, checkpoint_every=BALANCED_STEPS, threads=1
        ),
    )


def noise_floor(draws: int = 400) -> float:
    """MaxVio of a batch whose tokens choose evenly at random."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(draws, TOKENS, EXPERTS, generator=generator)
    counts = torch.zeros_like(scores).scatter_(-1, scores.topk(ACTIVE, -1).indices, 1.0).sum(1)
    return max_violation(counts).mean().item()


STUDIES = {"attention": attention, "balancing": balancing}


def recorded(folder: Path, last: dict[str, float]) -> dict[str, float]:
    """The validation of a run, and the balance of its batches averaged over the last fifty steps."""
    found = {key: last[key] for key in last if key.startswith("val_")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "max_vio" in line]
    for key in ("max_vio", "experts_per_token"):
        values = [line[key] for line in steps[-50:] if key in line]
        if values:
            found[key] = statistics.fmean(values)
    return found


def cached(config: RunConfig) -> int:
    """Numbers cached a token and layer."""
    return Transformer(config.model).new_cache(1, 1)[0].elements_per_token()


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--only", nargs="+", help="some of the variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    console, configs = Console(), STUDIES[arguments.study]()
    configs = {name: configs[name] for name in arguments.only or configs}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for seed in arguments.seeds:
        for name, config in configs.items():
            seeded = replace(config, train=replace(config.train, seed=seed, tensorboard=False))
            last = finished(arguments.runs / f"{arguments.study}-{name}-{seed}", seeded)
            figures[name].append(recorded(arguments.runs / f"{arguments.study}-{name}-{seed}", last))
            console.print(f"{name} seed {seed}: {figures[name][-1]}", highlight=False)

    columns = sorted({key for rows in figures.values() for row in rows for key in row})
    table = Table("", "weights", "cache", *(f"{column} (std)" for column in columns))
    for name, rows in figures.items():
        model = assemble(configs[name]).model
        cells = [
            f"{statistics.fmean(row[key] for row in rows):.4f} ({statistics.stdev(row[key] for row in rows):.4f})"
            if key in rows[0]
            else ""
            for key in columns
        ]
        table.add_row(name, f"{sum(p.numel() for p in model.parameters()):,}", str(cached(configs[name])), *cells)
    console.print(table)
    if arguments.study == "balancing":
        console.print(f"noise floor of a batch: {noise_floor():.3f}")
    document = {"study": arguments.study, "seeds": arguments.seeds, "machine": describe(), "results": figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"variants_{arguments.study}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
