"""Muon's momentum in bfloat16 beside float32: the loss curves of a small language model over seeds, and the memory.

Every (format, seed) is trained in its own folder under ``--runs``; a complete folder is not trained again, an
interrupted one is resumed. The figure is the largest difference of the two mean curves, over the evaluations, beside
the standard deviation over seeds.

    python -m benchmarks.momentum_dtype --runs runs/momentum
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.recipes import load
from danlu.train import RunConfig, TrainConfig, assemble, resume, train

FORMATS = ("float32", "bfloat16")


def config(momentum_dtype: str, seed: int, steps: int) -> RunConfig:
    """The recipe ``lm-dense``, 128 wide and two layers deep."""
    run = load("lm-dense")
    return replace(
        run,
        data=TextConfig(vocab_size=1024, length=128, batch=8),
        model=TransformerConfig(dim=128, layers=2, hidden=320, attention=GQAConfig(num_heads=4)),
        optim=replace(run.optim, momentum_dtype=momentum_dtype),
        train=TrainConfig(
            steps=steps, seed=seed, eval_every=steps // 5, eval_batches=16, threads=1, tensorboard=False, keep=1
        ),
    )


def curve(run: RunConfig, folder: Path) -> list[float]:
    """Train, or finish training, and return the validation losses."""
    new = not (folder / "config.json").exists()
    code = train(run, folder, quiet=True) if new else resume(folder, quiet=True)
    if code:
        raise SystemExit(code)  # interrupted, and saved
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record]


def momentum_bytes(run: RunConfig) -> int:
    """Bytes of Muon's state after one step."""
    parts = assemble(run)
    batch = next(parts.data.train)
    parts.objective(batch).backward()
    parts.optimizer.step()
    states = parts.optimizer.state.values()
    return sum(state["momentum_buffer"].nbytes for state in states if "momentum_buffer" in state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words = parser.parse_args()
    curves: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
    for seed in words.seeds:
        for name in FORMATS:
            run = config(name, seed, words.steps)
            curves[name].append(curve(run, words.runs / f"{name}-{seed}"))
            print(name, seed, " ".join(f"{loss:.4f}" for loss in curves[name][-1]), flush=True)
    means = {name: [statistics.mean(losses) for losses in zip(*found)] for name, found in curves.items()}
    noise = [statistics.stdev(losses) for losses in zip(*curves["float32"])]
    differences = [b - a for a, b in zip(means["float32"], means["bfloat16"])]
    size = {name: momentum_bytes(config(name, 0, words.steps)) for name in FORMATS}
    print("difference of means", differences, "deviation over seeds", noise, "bytes", size)
    RESULTS.mkdir(exist_ok=True)
    result = {
        "steps": words.steps,
        "seeds": words.seeds,
        "validation_losses": curves,
        "difference_of_means": differences,
        "deviation_over_seeds": noise,
        "momentum_bytes": size,
        "machine": describe(),
    }
    (RESULTS / "momentum_dtype.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
