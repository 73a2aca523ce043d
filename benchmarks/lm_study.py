"""The recipe ``lm`` against ``lm-baseline`` at equal time: validation bits per byte over seeds.

Each recipe's training step is timed, interleaved round by round; the budget divided by the median gives the number of
steps each recipe may take, so that a busy machine changes how long the study takes and not what it finds. Then every
(recipe, seed) is trained in its own folder under ``--runs``; a complete folder is not trained again, an interrupted one
is resumed. The table beside the result holds what ``gzip -9`` and ``xz -9`` make of the validation text.

    python -m benchmarks.lm_study --runs runs/study --minutes 8 --seeds 0 1 2

Where the machine itself is shared (a virtual one whose host takes processor time away), ``--cpu-time`` counts a budget
of one thread's processor time instead of wall time.
"""

import argparse
import gzip
import json
import lzma
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.objectives.causal_lm import IGNORE
from danlu.optim import clip_grad_norm_
from danlu.recipes import load
from danlu.train import RunConfig, assemble, read_config, resume, train

ROUNDS = 9


def stepper(config: RunConfig) -> Callable[[], None]:
    """One training step of a recipe as the trainer does it, on fresh batches."""
    parts = assemble(config)

    def step() -> None:
        batch = next(parts.data.train)
        (parts.objective(batch) / parts.objective.denominator(batch)).backward()
        clip_grad_norm_(parts.objective.parameters(), 1.0)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)

    return step


def seconds_a_step(configs: dict[str, RunConfig], *, cpu_time: bool) -> dict[str, float]:
    """Median seconds of a step of each recipe over interleaved rounds."""
    clock = time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        configs = {name: replace(c, train=replace(c.train, threads=1)) for name, c in configs.items()}
    steps = {name: stepper(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(ROUNDS + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if turn > 1:
                times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def compressed_bits(config: RunConfig) -> dict[str, float]:
    """Bits a byte of the whole validation text under ``gzip -9`` and ``xz -9``."""
    parts = assemble(config)
    text = b"".join(
        parts.data.tokenizer.bytes_of(int(token))
        for batch in parts.data.validation(None)
        for row in batch["targets"]
        for token in row[row != IGNORE].tolist()
    )
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def finished(folder: Path, config: RunConfig) -> None:
    """Train, resume or skip; leave when interrupted."""
    if not (folder / "config.json").exists():
        stopped = train(config, folder, quiet=True)
    elif read_config(folder).train != config.train:
        raise SystemExit(f"{folder} was trained for another number of steps or seed; move it away or use --runs")
    else:
        stopped = resume(folder, quiet=True)
    if stopped:
        raise SystemExit(stopped)


def validated(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Finish a run and return its last logged validation."""
    finished(folder, config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = next(line for line in reversed(lines) if "val_bpb" in line)
    return last


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["lm", "lm-baseline"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=8.0, help="training time of one run")
    parser.add_argument("--runs", type=Path, default=Path("runs/lm-study"))
    parser.add_argument("--threads", type=int, help="threads of a run; fewer than the timed ones let runs share cores")
    parser.add_argument("--cpu-time", action="store_true", help="budget one thread's processor time, not wall time")
    parser.add_argument("--time-only", action="store_true", help="time the steps, fix the budget, train nothing")
    arguments = parser.parse_args()
    console = Console()

    arguments.runs.mkdir(parents=True, exist_ok=True)
    budget = arguments.runs / "budget.json"
    configs = {name: load(name) for name in arguments.recipes}
    if not budget.exists():
        timed = seconds_a_step(configs, cpu_time=arguments.cpu_time)
        clock = "one thread's processor time" if arguments.cpu_time else "wall time"
        budget.write_text(json.dumps({"clock": clock, "seconds_a_step": timed}, indent=2))
    measured = json.loads(budget.read_text())
    timed = measured["seconds_a_step"]
    steps = {name: round(60 * arguments.minutes / timed[name]) for name in configs}
    for name in configs:
        console.print(f"{name}: {timed[name]:.3f} s a step, {steps[name]} steps in {arguments.minutes:g} minutes")
    if arguments.time_only:
        return

    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in configs}
    for seed in arguments.seeds:
        for name, config in configs.items():
            loop = replace(
                config.train,
                steps=steps[name],
                seed=seed,
                eval_every=100,
                eval_batches=None,
                threads=arguments.threads,
                tensorboard=False,
            )
            results[name][seed] = validated(arguments.runs / f"{name}-{seed}", replace(config, train=loop))
            console.print(f"{name} seed {seed}: {results[name][seed]['val_bpb']:.4f} bits a byte")

    table = Table("", "bits a byte (mean)", *(f"seed {seed}" for seed in arguments.seeds), "tokens")
    means = {}
    for name, found in results.items():
        bits = [found[seed]["val_bpb"] for seed in arguments.seeds]
        means[name] = statistics.mean(bits)
        table.add_row(
            name, f"{means[name]:.4f}", *(f"{b:.4f}" for b in bits), f"{found[arguments.seeds[0]]['tokens']:,}"
        )
    packed = compressed_bits(configs[arguments.recipes[0]])
    for name, bits_a_byte in packed.items():
        table.add_row(name, f"{bits_a_byte:.4f}")
    console.print(table)
    first, *others = means
    for other in others:
        console.print(f"{first} needs {1 - means[first] / means[other]:.1%} fewer bits than {other}")
    report = {"machine": describe(), "minutes": arguments.minutes, **measured, "compressed": packed}
    report["runs"] = {name: {str(seed): line for seed, line in found.items()} for name, found in results.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lm_study.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
