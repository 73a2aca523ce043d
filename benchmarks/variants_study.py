"""Attention variants at equal cache, and balancing rules: small models, several seeds.

Every (variant, seed) is trained in its own folder under ``--runs``; a complete folder is not trained again, an
interrupted one is resumed. Seeds go round before variants, so that a study cut short is a smaller study.

    python -m benchmarks.variants_study attention --runs runs/variants
    python -m benchmarks.variants_study balancing --runs runs/variants
    python -m benchmarks.variants_study full --runs runs/balancing-full

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

from benchmarks.expert_load import explained, noise_floor
from benchmarks.harness import RESULTS
from benchmarks.lm_study import validated
from benchmarks.machine import describe
from danlu.data import TextConfig
from danlu.models import Transformer
from danlu.nn import AuxiliaryLossConfig, DynamicConfig, LossFreeConfig
from danlu.optim import AdamWConfig, WarmupStableDecay
from danlu.recipes import load
from danlu.recipes.attention import VARIANTS, variant
from danlu.recipes.experts import balanced
from danlu.train import RunConfig, TrainConfig, assemble

STEPS, WIDTH, LAYERS, HIDDEN, LENGTH, BATCH, VOCABULARY = 400, 256, 2, 320, 128, 8, 1024
TOKENS, BALANCED_STEPS = 1024, 500


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
        train=TrainConfig(steps=STEPS, eval_every=STEPS, eval_batches=64, checkpoint_every=STEPS, threads=1),
    )


def balancing() -> dict[str, RunConfig]:
    """Ways of balancing: the experts' recipes made small, biases held for the last tenth."""
    held = {"freeze_after": BALANCED_STEPS * 9 // 10}
    rules: dict[str, AuxiliaryLossConfig | LossFreeConfig | DynamicConfig] = {
        "auxiliary loss": AuxiliaryLossConfig(weight=1e-3),
        "loss-free rms 4e-3": LossFreeConfig(rule="rms", rate=4e-3, **held),
        "loss-free sign 1e-2": LossFreeConfig(rate=1e-2, **held),
        "loss-free sign 1e-3": LossFreeConfig(**held),
        "loss-free rms 1e-2 scheduled": LossFreeConfig(rule="rms", rate=1e-2, scheduled=True),
        "none": LossFreeConfig(rate=0.0),
        "dynamic A 1e-2": DynamicConfig(rate=1e-2, **held),
    }
    return {name: sparse(rule) for name, rule in rules.items()}


def sparse(rule: AuxiliaryLossConfig | LossFreeConfig | DynamicConfig) -> RunConfig:
    """``lm-moe-lossfree`` with another rule, at half its width, with two layers, small vocabulary and short windows."""
    config = balanced("lm-moe-lossfree", rule)
    experts = replace(config.model.experts, hidden=64)
    return replace(
        config,
        data=TextConfig(vocab_size=VOCABULARY, length=64, batch=TOKENS // 64),
        model=replace(config.model, dim=128, layers=2, hidden=320, experts=experts),
        train=TrainConfig(
            steps=BALANCED_STEPS, eval_every=BALANCED_STEPS, eval_batches=64, checkpoint_every=100, threads=1
        ),
    )


def full() -> dict[str, RunConfig]:
    """The recipes of the auxiliary loss and of the biases as they ship, over 500 steps; all of the validation text."""
    train = TrainConfig(
        steps=BALANCED_STEPS, eval_every=BALANCED_STEPS, eval_batches=None, checkpoint_every=100, threads=1
    )
    return {name: replace(load(name), train=train) for name in ("lm-moe-lossfree", "lm-moe-aux")}


STUDIES = {"attention": attention, "balancing": balancing, "full": full}


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


def even_draws(config: RunConfig) -> float:
    """MaxVio of a batch of this run whose tokens choose evenly at random."""
    experts = config.model.experts
    return noise_floor(experts.num_experts, experts.top_k, config.data.length * config.data.batch)


def cached(config: RunConfig) -> int:
    """Numbers cached a token and layer."""
    return Transformer(config.model).new_cache(1, 1)[0].elements_per_token()


def spread(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    deviation = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


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
            folder = arguments.runs / f"{arguments.study}-{name}-{seed}"
            last = validated(folder, seeded)
            more = {} if arguments.study == "attention" else explained(folder)
            figures[name].append(recorded(folder, last) | more)
            console.print(f"{name} seed {seed}: {figures[name][-1]}", highlight=False)

    columns = sorted({key for rows in figures.values() for row in rows for key in row})
    table = Table("", "weights", "cache", *(f"{column} (std)" for column in columns))
    for name, rows in figures.items():
        model = assemble(configs[name]).model
        cells = [spread([row[key] for row in rows]) if key in rows[0] else "" for key in columns]
        table.add_row(name, f"{sum(p.numel() for p in model.parameters()):,}", str(cached(configs[name])), *cells)
    console.print(table)
    floor = {} if arguments.study == "attention" else {"noise_floor": even_draws(next(iter(configs.values())))}
    document = {"study": arguments.study, **floor, "seeds": arguments.seeds, "machine": describe(), "results": figures}
    console.print(*(f"{name}: {value:.3f}" for name, value in floor.items()))
    if arguments.only:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"variants_{arguments.study}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
