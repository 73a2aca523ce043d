"""Generators of digits at equal processor time: Frechet distance against the number of steps, over seeds.

Every recipe has the same network and, scaled to its number of steps, the schedule it ships with. Each one's training
step is timed, interleaved round by round, in one thread's processor time; the budget divided by the median gives its
number of steps. Then every (recipe, seed) is trained in its
own folder under ``--runs``, and measured at every number of sampling steps against the held-out images, by the features
of the recipe ``digits-classifier``. What is finished is not done again; an interrupted run is resumed.

    python -m benchmarks.digits_study --runs runs/digits-study --minutes 10 --seeds 0 1 2

``digits-sid`` distils the ``digits-edm`` run of the same seed, which must be among the recipes.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.lm_study import finished, seconds_a_step
from benchmarks.machine import describe
from danlu.config import Pretrained
from danlu.evaluation import draw, feature_network, measure
from danlu.objectives import MeanFlowConfig
from danlu.recipes import load
from danlu.train import RunConfig, restore

# Of Heun's method 18 steps are 35 evaluations.
STEPS = {"digits": [1, 2, 4, 16], "digits-sid": [1], "digits-ddpm": [16, 50], "digits-edm": [18]}
USUAL = [1, 2, 4, 16, 50]


def configuration(name: str, seed: int, steps: int, options: argparse.Namespace) -> RunConfig:
    """The recipe as the study trains it: on one thread, evaluated at the end alone."""
    config, runs = load(name), options.runs
    loop = replace(
        config.train,
        steps=steps,
        seed=seed,
        eval_every=None,
        checkpoint_every=1000,
        threads=1,
        tensorboard=False,
        precision=options.precision,
    )
    if name == "digits-sid":
        teacher = Pretrained(run=str(runs / f"digits-edm-{seed}"))
        config = replace(config, objective=replace(config.objective, teacher=teacher))
    return replace(config, train=loop)


def typical(config: RunConfig) -> RunConfig:
    """A run whose every step costs what the steps of ``config`` cost on average."""
    if isinstance(config.objective, MeanFlowConfig):
        share = config.objective.share * (1 - config.objective.flow_share)
        return replace(config, objective=replace(config.objective, share=share, flow_share=0.0))
    return config


def measured(folder: Path, steps: list[int], count: int) -> dict[str, dict[str, float]]:
    """Measures of a run at each number of steps, kept in its folder."""
    file = folder / "measures.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    if all(str(number) in found for number in steps):
        return found
    run = restore(folder)
    classifier = load("digits-classifier")
    network: Any = feature_network(
        replace(classifier, train=replace(classifier.train, threads=1)),
        sha256=run.data.manifest["sha256"],
    )
    shape = tuple(run.data.held_out["images"].shape[1:])
    for number in steps:
        if str(number) not in found:
            generator = torch.Generator().manual_seed(0)
            labels = run.data.held_out["labels"]
            images = draw(run.objective, shape, labels, count, steps=number, generator=generator)
            found[str(number)] = measure(images, run.data, network.features)
            file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def collected(runs: Path) -> dict[str, dict[str, list[float]]]:
    """Frechet distances of all that was ever measured under ``runs``: recipe, sampling steps, seeds."""
    results: dict[str, dict[str, list[float]]] = {}
    for file in sorted(runs.glob("*/measures.json")):
        by_steps = results.setdefault(file.parent.name.rpartition("-")[0], {})
        for number, values in json.loads(file.read_text()).items():
            by_steps.setdefault(number, []).append(values["frechet_distance"])
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["digits", "digits-flow", "digits-ddpm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0, help="one thread's processor time of a training")
    parser.add_argument("--count", type=int, default=500, help="images drawn for a measurement")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits-study"))
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)

    arguments.runs.mkdir(parents=True, exist_ok=True)
    budget = arguments.runs / "budget.json"
    timed: dict[str, float] = json.loads(budget.read_text()) if budget.exists() else {}
    missing = [name for name in arguments.recipes if name not in timed]
    direct = {name: typical(configuration(name, 0, 1000, arguments)) for name in missing if name != "digits-sid"}
    timed |= seconds_a_step(direct, cpu_time=True) if direct else {}
    budget.write_text(json.dumps(timed, indent=2))

    for seed in arguments.seeds:
        for name in arguments.recipes:
            if name not in timed:  # it could only be made once its teacher was trained
                sid = {name: configuration(name, seed, 1, arguments)}
                timed |= seconds_a_step(sid, cpu_time=True)
                budget.write_text(json.dumps(timed, indent=2))
            steps = round(60 * arguments.minutes / timed[name])
            folder = arguments.runs / f"{name}-{seed}"
            finished(folder, configuration(name, seed, steps, arguments))
            found = measured(folder, STEPS.get(name, USUAL), arguments.count)
            line = ", ".join(f"{number}: {values['frechet_distance']:.3f}" for number, values in found.items())
            floor = next(iter(found.values()))["frechet_floor"]
            console.print(f"{name} seed {seed}, {steps} steps: {line} (floor {floor:.3f})", highlight=False)

    results = collected(arguments.runs)
    table = Table("recipe", "sampling steps", "Frechet distance (mean)", "seeds")
    for name, by_steps in results.items():
        for number, values in by_steps.items():
            table.add_row(name, number, f"{statistics.mean(values):.3f}", " ".join(f"{v:.3f}" for v in values))
    console.print(table)
    report = {
        "machine": describe(),
        "minutes": arguments.minutes,
        "precision": arguments.precision,
        "seconds_a_step": timed,
        "frechet": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "digits_study.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
