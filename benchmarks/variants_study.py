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

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.lm_study import finished
from benchmarks.machine import describe
from danlu.data import TextConfig
from danlu.models import Transformer
from danlu.optim import WarmupStableDecay
from danlu.recipes.attention import VARIANTS, variant
from danlu.train import RunConfig, TrainConfig, assemble

STEPS, WIDTH, LAYERS, HIDDEN, LENGTH, BATCH, VOCABULARY = 200, 256, 2, 320, 128, 8, 1024


def attention() -> dict[str, RunConfig]:
    """Every attention variant on a dense model of two layers."""
    return {name: small(variant(name, "lm-dense")) for name in VARIANTS}


def small(config: RunConfig) -> RunConfig:
    """Two layers, a small vocabulary and short windows; no other field changes."""
    return replace(
        config,
        data=TextConfig(vocab_size=VOCABULARY, length=LENGTH, batch=BATCH),
        model=replace(config.model, dim=WIDTH, layers=LAYERS, hidden=HIDDEN),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(steps=STEPS, eval_every=STEPS, eval_batches=64, checkpoint_every=STEPS, threads=1),
    )


STUDIES = {"attention": attention}


def cached(config: RunConfig) -> int:
    """Numbers cached a token and layer."""
    return Transformer(config.model).new_cache(1, 1)[0].elements_per_token()


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    console, configs = Console(), STUDIES[arguments.study]()
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for seed in arguments.seeds:
        for name, config in configs.items():
            seeded = replace(config, train=replace(config.train, seed=seed, tensorboard=False))
            last = finished(arguments.runs / f"{arguments.study}-{name}-{seed}", seeded)
            figures[name].append({key: last[key] for key in last if key.startswith("val_") or key == "max_vio"})
            console.print(f"{name} seed {seed}: {figures[name][-1]}", highlight=False)

    columns = sorted(figures[next(iter(figures))][0])
    table = Table("", "weights", "cache", *(f"{column} (std)" for column in columns))
    for name, rows in figures.items():
        model = assemble(configs[name]).model
        cells = [
            f"{statistics.fmean(row[key] for row in rows):.4f} ({statistics.stdev(row[key] for row in rows):.4f})"
            for key in columns
        ]
        table.add_row(name, f"{sum(p.numel() for p in model.parameters()):,}", str(cached(configs[name])), *cells)
    console.print(table)
    document = {"study": arguments.study, "seeds": arguments.seeds, "machine": describe(), "results": figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"variants_{arguments.study}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
