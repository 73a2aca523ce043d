"""The recipe ``lm-dense`` under AdamW, Muon, Lion and Amos at equal tokens: tuned rates, seeds, tokens and time.

Every optimizer is trained with each learning rate of its grid on the first seed, the grid prolonged by factors of two
until its best rate, by final validation loss, lies inside; that rate is trained on every seed. What a loss costs in
tokens is read from *whole* runs of different lengths, never from the middle of one: half-way through a schedule whose
decay comes at the end says nothing. So the best rate of Muon is also trained with its whole schedule in each of
``--shares`` of the tokens. Times are a step's median processor time on one thread, evaluations not counted, so that
a busy machine changes how long the study takes and not what it finds. The arithmetic is what the recipe takes here.

``AdamW, fast embedding`` is a control: Muon's recipe has a rate of its own for the embedding, and what that alone
brings to AdamW is no merit of Muon's. ``Lion, fast embedding`` has one too. ``Amos, decayed`` has AdamW's schedule on
top of Amos' own. Every finished run is a JSON file under ``--runs`` and is not made again.

    python -m benchmarks.optimizer_study --runs runs/optimizers                # 4 layers of width 128: an hour
    python -m benchmarks.optimizer_study --runs runs/optimizers-full --full    # the recipe itself: three
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.drawing import pyplot
from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.nn import GQAConfig
from danlu.objectives import evaluate
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

Curve = list[dict[str, float]]
DECAYED = WarmupStableDecay(warmup=20, decay=0.4)
POINTS = 10  # evaluations along a run


@dataclass(frozen=True)
class Contestant:
    """An optimizer by its learning rate, the grid to begin with, a factor of two apart, and its schedule."""

    optim: Callable[[float], Any]
    grid: tuple[float, ...]
    plan: Any = DECAYED


CONTESTANTS = {
    "AdamW": Contestant(lambda lr: AdamWConfig(lr=lr), (4e-3, 8e-3, 16e-3)),
    "Muon": Contestant(lambda lr: MuonConfig(lr=lr, embedding_lr=40 * lr, no_decay=()), (4e-3, 8e-3, 16e-3)),
    "Muon, momentum 0.9": Contestant(
        lambda lr: MuonConfig(lr=lr, momentum=0.9, embedding_lr=40 * lr, no_decay=()), (4e-3, 8e-3, 16e-3)
    ),
    "AdamW, fast embedding": Contestant(lambda lr: AdamWConfig(lr=lr, embedding_lr=40 * lr), (2e-3, 4e-3, 8e-3)),
    "Lion": Contestant(lambda lr: LionConfig(lr=lr, weight_decay=3e-4 / lr), (1e-3, 2e-3, 4e-3)),
    "Lion, fast embedding": Contestant(
        lambda lr: LionConfig(lr=lr, weight_decay=3e-4 / lr, embedding_lr=40 * lr), (1e-3, 2e-3, 4e-3)
    ),
    "Amos": Contestant(lambda lr: AmosConfig(lr=lr, embedding_eta=1.0), (0.04, 0.08, 0.16), Constant(warmup=20)),
    "Amos, decayed": Contestant(lambda lr: AmosConfig(lr=lr, embedding_eta=1.0), (0.04, 0.08, 0.16)),
}


def configured(name: str, lr: float, seed: int, *, full: bool, steps: int) -> RunConfig:
    """Return the recipe under one optimizer: everything but the optimizer and Amos' own schedule is the same."""
    base = load("lm-dense")
    if not full:
        small = {"dim": 128, "hidden": 320, "attention": GQAConfig(num_heads=4)}
        base = replace(base, model=replace(base.model, **small), data=replace(base.data, vocab_size=1024))
    implementation = CONTESTANTS[name]
    loop = replace(base.train, steps=steps, seed=seed, threads=1, device="cpu")
    return replace(base, optim=implementation.optim(lr), schedule=implementation.plan, train=loop)


def trained(config: RunConfig) -> dict[str, Any]:
    """Train one run and return its curve: validation loss, tokens and processor seconds at each evaluation."""
    parts = assemble(config)
    steps = config.train.steps
    scheduler = schedule(parts.optimizer, config.schedule, steps)
    every = max(1, steps // POINTS)
    spent, tokens, curve = [], 0, []
    for step in range(1, steps + 1):
        batch = next(parts.data.train)
        start = time.process_time()
        count = int(parts.objective.denominator(batch))
        (parts.objective(batch) / count).backward()
        clip_grad_norm_(parts.objective.parameters(), 1.0)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        spent.append(time.process_time() - start)
        tokens += count
        if step % every == 0 or step == steps:
            loss = evaluate(parts.objective, parts.data.validation(8))["val_loss"]
            curve.append({"step": step, "tokens": tokens, "val_loss": loss})
    seconds = statistics.median(spent)
    return {"config": asdict(config), "policy": parts.policy.sentence(), "step_seconds": seconds, "curve": curve}


class Study:
    """The runs of one setting in one folder."""

    def __init__(self, folder: Path, seeds: Sequence[int], *, full: bool, steps: int) -> None:
        self.folder, self.seeds, self.full, self.steps = folder, seeds, full, steps
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, lr: float, seed: int, share: float = 1.0) -> dict[str, Any]:
        """Train one run, or read it where it is finished."""
        steps = round(share * self.steps)
        path = self.folder / f"{name}-{lr:g}-{seed}-{steps}.json"
        if not path.exists():
            document = trained(configured(name, lr, seed, full=self.full, steps=steps))
            path.with_suffix(".part").write_text(json.dumps(document) + "\n")
            path.with_suffix(".part").replace(path)
        document = json.loads(path.read_text())
        print(name, f"{lr:g}", seed, steps, f"{document['curve'][-1]['val_loss']:.4f}", flush=True)
        return document  # type: ignore[no-any-return]

    def tuned(self, name: str) -> dict[float, float]:
        """Return the final loss on the first seed by learning rate; the best rate is neither the first nor the last."""

        def final(lr: float) -> float:
            return float(self.run(name, lr, self.seeds[0])["curve"][-1]["val_loss"])

        found = {lr: final(lr) for lr in CONTESTANTS[name].grid}
        while (best := min(found, key=found.__getitem__)) in (min(found), max(found)):
            beyond = best / 2 if best == min(found) else best * 2
            found[beyond] = final(beyond)
        return dict(sorted(found.items()))

    def repeated(self, name: str, lr: float, share: float = 1.0) -> dict[str, Any]:
        """Return the mean curve over seeds, each seed's final loss and the median time of a step."""
        runs = [self.run(name, lr, seed, share) for seed in self.seeds]
        finals = [run["curve"][-1]["val_loss"] for run in runs]
        return {
            "curve": averaged([run["curve"] for run in runs]),
            "final": statistics.mean(finals),
            "seeds": finals,
            "step_seconds": statistics.median(run["step_seconds"] for run in runs),
            "policy": runs[0]["policy"],
        }


def averaged(curves: Sequence[Curve]) -> Curve:
    """Return the mean curve over seeds."""
    return [
        {key: statistics.mean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def needed(finals: dict[float, float], loss: float) -> float | None:
    """Return the share of the tokens whose whole schedule ends at ``loss``, linear between the shares; None if none.

    >>> needed({0.5: 5.0, 1.0: 4.0}, 4.5), needed({0.5: 5.0, 1.0: 4.0}, 3.9)
    (0.75, None)
    """
    ends = sorted(finals.items())
    if ends[0][1] <= loss:
        return ends[0][0]
    for (less, before), (more, after) in itertools.pairwise(ends):
        if after <= loss:
            return less + (before - loss) / (before - after) * (more - less)
    return None


def draw(rows: dict[str, Any], path: Path) -> None:
    """Draw the mean curves over tokens, those of shorter schedules dotted, and AdamW's final loss."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, row) in enumerate(rows.items()):
        for share, held in row["lengths"].items():
            points = [(point["tokens"] / 1e6, point["val_loss"]) for point in held["curve"][1:]]
            what = f"rate {row['lr']:g}" if share == "1" else f"in {share} of the tokens"
            style = "-" if share == "1" else ":"
            label = f"{name}, {what}: {held['final']:.3f}"
            axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label)
    axes.axhline(rows["AdamW"]["lengths"]["1"]["final"], color="0.6", lw=0.8)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats a token (mean over seeds)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--full", action="store_true", help="the recipe itself instead of width 128")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6], help="of the tokens, for Muon")
    parser.add_argument("--optimizers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    arguments = parser.parse_args()
    study = Study(arguments.runs, arguments.seeds, full=arguments.full, steps=arguments.steps)

    rows: dict[str, Any] = {}
    for name in ["AdamW", *(n for n in arguments.optimizers if n != "AdamW")]:
        grid = study.tuned(name)
        best = min(grid, key=grid.__getitem__)
        shares = (1.0, *arguments.shares) if name == "Muon" else (1.0,)
        lengths = {f"{share:g}": study.repeated(name, best, share) for share in shares}
        rows[name] = {"lr": best, "grid": {f"{lr:g}": loss for lr, loss in grid.items()}, "lengths": lengths}
    report(rows, study)


def report(rows: dict[str, Any], study: Study) -> None:
    """Print the table and write it with the curves."""
    goal = rows["AdamW"]["lengths"]["1"]
    table = Table("", "lr", "final loss", *(f"seed {s}" for s in study.seeds), "to AdamW's: tokens", "time")
    for name, row in rows.items():
        whole = row["lengths"]["1"]
        share = needed({float(share): held["final"] for share, held in row["lengths"].items()}, goal["final"])
        row["tokens_share"] = share
        row["time_share"] = None if share is None else share * whole["step_seconds"] / goal["step_seconds"]
        shown = ["never" if share is None else f"{share:.2f}" for share in (row["tokens_share"], row["time_share"])]
        table.add_row(name, f"{row['lr']:g}", f"{whole['final']:.4f}", *(f"{x:.4f}" for x in whole["seeds"]), *shown)
    Console().print(table)
    setting = {"full": study.full, "steps": study.steps, "seeds": list(study.seeds)}
    document = {"machine": describe(), "clock": "processor time", **setting, "optimizers": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizer_study.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, RESULTS / "optimizer_study.png")


if __name__ == "__main__":
    main()
