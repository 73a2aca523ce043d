"""The recipe ``lm-dense`` under AdamW, Muon, Lion and Amos at equal tokens: tuned rates, seeds, tokens and time.

Every optimizer is trained with each learning rate of its grid on the first seed; the best rate by final validation
loss is trained on every seed. Reported are the final validation losses and, for the mean curve over seeds, the tokens
and the processor time needed to come down to AdamW's mean final loss (steps alone; evaluations are not counted).
Every finished run is a JSON file under ``--runs`` and is not made again.

    python -m benchmarks.optimizer_study --runs runs/optimizers                       # small: minutes
    python -m benchmarks.optimizer_study --runs runs/optimizers-full --full           # the recipe itself: hours

Times are processor time of one thread, so that a busy machine changes how long the study takes and not what it finds.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.nn import GQAConfig
from danlu.optim import (
    AdamWConfig,
    AmosConfig,
    Constant,
    LionConfig,
    MuonConfig,
    WarmupStableDecay,
    clip_grad_norm_,
    schedule,
)
from danlu.recipes import load
from danlu.train import RunConfig, assemble

#: Learning rates of each optimizer, a factor of two apart around what was good in smaller trials.
GRIDS = {
    "AdamW": (2e-3, 4e-3, 8e-3),
    "Muon": (4e-3, 8e-3, 16e-3),
    "Lion": (0.5e-3, 1e-3, 2e-3),
    "Amos": (0.02, 0.04, 0.08),
}
POINTS = 12  # evaluations along a run


def configured(name: str, lr: float, seed: int, *, full: bool, steps: int) -> RunConfig:
    """Return the recipe under one optimizer: everything but the optimizer and Amos' own schedule is the same."""
    base = load("lm-dense")
    if not full:
        small = {"dim": 128, "layers": 2, "hidden": 320, "attention": GQAConfig(heads=4)}
        data = replace(base.data, vocab_size=1024, length=128, batch=8)
        base = replace(base, model=replace(base.model, **small), data=data)
    optim: Any = {
        "AdamW": lambda: AdamWConfig(lr=lr),
        "Muon": lambda: MuonConfig(lr=lr, embedding_lr=40 * lr),
        "Lion": lambda: LionConfig(lr=lr, weight_decay=0.3),
        "Amos": lambda: AmosConfig(lr=lr, embedding_eta=1.0),
    }[name]()
    plan: Any = Constant(warmup=20) if name == "Amos" else WarmupStableDecay(warmup=20, decay=0.4)
    loop = replace(base.train, steps=steps, seed=seed, threads=1, precision="float32", device="cpu")
    return replace(base, optim=optim, schedule=plan, train=loop)


def trained(config: RunConfig) -> dict[str, Any]:
    """Train one run and return its curve: validation loss, tokens and processor seconds at each evaluation."""
    parts = assemble(config)
    steps = config.train.steps
    schedulers = [schedule(optimizer, config.schedule, steps) for optimizer in parts.optimizers]
    every = max(1, steps // POINTS)
    spent, tokens, curve = 0.0, 0, []
    for step in range(1, steps + 1):
        batch = next(parts.data.train)
        start = time.process_time()
        count = int(parts.objective.count(batch))
        (parts.objective(batch) / count).backward()
        clip_grad_norm_(parts.objective.parameters(), 1.0)
        for optimizer, scheduler in zip(parts.optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        spent, tokens = spent + time.process_time() - start, tokens + count
        if step % every == 0 or step == steps:
            loss = parts.objective.evaluate(parts.data.validation(8))["val_loss"]
            curve.append({"step": step, "tokens": tokens, "seconds": spent, "val_loss": loss})
    return {"config": asdict(config), "curve": curve}


def made(folder: Path, name: str, lr: float, seed: int, **options: Any) -> list[dict[str, float]]:
    """Train one run, or read it where it is finished."""
    path = folder / f"{name}-{lr:g}-{seed}-{options['steps']}.json"
    if not path.exists():
        document = trained(configured(name, lr, seed, **options))
        path.with_suffix(".part").write_text(json.dumps(document) + "\n")
        path.with_suffix(".part").replace(path)
    curve: list[dict[str, float]] = json.loads(path.read_text())["curve"]
    return curve


def averaged(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Return the mean curve over seeds."""
    return [{key: statistics.mean(point[key] for point in points) for key in points[0]} for points in zip(*curves)]


def reached(curve: Sequence[dict[str, float]], loss: float, axis: str) -> float | None:
    """Return tokens or seconds at which a curve comes down to ``loss``, linear between evaluations; None if never.

    >>> points = [{"tokens": 100, "val_loss": 5.0}, {"tokens": 200, "val_loss": 4.0}]
    >>> reached(points, 4.5, "tokens"), reached(points, 3.9, "tokens")
    (150.0, None)
    """
    for before, after in itertools.pairwise(curve):
        if after["val_loss"] <= loss:
            share = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return before[axis] + max(0.0, share) * (after[axis] - before[axis])
    return None


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--full", action="store_true", help="the recipe itself instead of 2 layers of width 128")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--optimizers", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    arguments = parser.parse_args()
    options = {"full": arguments.full, "steps": arguments.steps}
    arguments.runs.mkdir(parents=True, exist_ok=True)
    console = Console()

    grids: dict[str, dict[str, float]] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    finals: dict[str, list[float]] = {}
    best: dict[str, float] = {}
    for name in ["AdamW", *(n for n in arguments.optimizers if n != "AdamW")]:
        ends = {lr: made(arguments.runs, name, lr, arguments.seeds[0], **options)[-1]["val_loss"] for lr in GRIDS[name]}
        best[name] = min(ends, key=ends.__getitem__)
        grids[name] = {f"{lr:g}": end for lr, end in ends.items()}
        console.print(name, grids[name])
        runs = [made(arguments.runs, name, best[name], seed, **options) for seed in arguments.seeds]
        curves[name], finals[name] = averaged(runs), [run[-1]["val_loss"] for run in runs]

    goal = curves["AdamW"][-1]
    table = Table(
        "", "lr", "final loss", *(f"seed {s}" for s in arguments.seeds), "tokens to AdamW's", "time to AdamW's"
    )
    rows: dict[str, Any] = {}
    for name, curve in curves.items():
        shares = [
            None if (at := reached(curve, goal["val_loss"], axis)) is None else at / goal[axis]
            for axis in ("tokens", "seconds")
        ]
        row = {"lr": best[name], "final": curve[-1]["val_loss"], "seeds": finals[name]}
        rows[name] = {**row, "tokens_share": shares[0], "time_share": shares[1], "grid": grids[name], "curve": curve}
        shown = ["never" if share is None else f"{share:.2f}" for share in shares]
        table.add_row(name, f"{best[name]:g}", f"{row['final']:.4f}", *(f"{x:.4f}" for x in finals[name]), *shown)
    console.print(table)
    report = {"machine": describe(), "clock": "processor time", **options, "seeds": arguments.seeds, "optimizers": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizer_study.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
