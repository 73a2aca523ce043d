"""Multitask sparse parity: when each task is learned, and what exponent the loss has in steps and in parameters.

A list of Zipf-frequent tasks, one hidden layer of ReLU, a stream of new samples, Adam (`danlu.analysis.sparse_parity`).
For several g: the exponent x of ``S_k ~ p_k^-x``, that of the mean loss in steps, and beside it that of the sum over
the falls of single tasks, of the fitted power law over this finite list, and over an infinite one. For one g over
widths: the loss over parameters, beside the share of all tasks but the first n when n are learned.
Every finished run is a line of ``--runs``; a line that is there is not trained again.

    python -m benchmarks.sparse_parity --runs runs/sparse_parity.jsonl --write
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drawing import pyplot
from benchmarks.harness import RESULTS
from benchmarks.machine import describe
from danlu.analysis import (
    ParityNetwork,
    ParityRun,
    exponents,
    log_log_slope,
    parity_tasks,
    quanta_loss,
    rank_correlation,
    train_parity,
)

TASKS, BITS, WIDTH, BATCH, LR, G = 50, 16, 256, 1000, 1e-2, 0.4
THRESHOLD = 0.1  # bit


def run(g: float, width: int, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return the losses over steps and when each task was learned."""
    tasks = parity_tasks(TASKS, BITS, g=g, seed=seed)
    network = ParityNetwork(TASKS, BITS, width, generator=torch.Generator().manual_seed(seed))
    started = time.process_time()
    found = train_parity(network, tasks, steps=steps, batch=BATCH, lr=LR, points=150, seed=seed)
    return {
        "g": g,
        "width": width,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps": found.steps.tolist(),
        "mean_loss": [round(loss, 5) for loss in found.mean_loss.tolist()],
        "learned_at": [step if math.isfinite(step) else None for step in found.learned_at(THRESHOLD).tolist()],
        "losses": [[round(loss, 3) for loss in row] for row in found.losses.tolist()],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def in_steps(line: dict[str, Any]) -> dict[str, float]:
    """Return the exponents of one run: measured, and what the model makes of when the tasks are learned.

    x is fitted over the tasks before the first that is not learned: beyond it only the lucky ones are. The loss is
    compared with sums over falls, whose middle is at half a bit.
    """
    g, shares = line["g"], parity_tasks(TASKS, BITS, g=line["g"]).shares
    run = ParityRun(torch.tensor(line["steps"]), torch.tensor(line["losses"], dtype=torch.float64), shares)
    (learned, x, order, _), (_, half_x, _, first) = (_law(run.learned_at(level), shares) for level in (THRESHOLD, 0.5))
    steps = run.steps.double()
    due = (steps / first).clamp(min=1) ** (1 / (half_x * (g + 1)))  # tasks that are due by then
    window = (due > 1) & (due <= TASKS / 2)
    left = (run.learned_at(0.5) > steps[:, None]).double() @ shares
    return {
        "learned": learned,
        "order": order,
        "x": x,
        "measured": -log_log_slope(steps[window], run.mean_loss[window]),
        "sum of falls": -log_log_slope(steps[window], left[window]),
        "this list": -log_log_slope(steps[window], quanta_loss(due[window], g, quanta=TASKS)),
        "infinite list": exponents(g).steps / half_x,
        "theory": exponents(g).steps,
    }


def _law(when: Tensor, shares: Tensor) -> tuple[int, float, float, float]:
    """Count what is learned; fit ``when ~ first (p / p_1)^-x`` to the tasks before the first that is not."""
    whole = int(when.isfinite().long().cumprod(0).sum())
    learned, when, shares = int(when.isfinite().sum()), when[:whole], shares[:whole]
    x = -log_log_slope(shares, when)
    first = float((when.log() + x * (shares / shares[0]).log()).mean().exp())
    return learned, x, rank_correlation(-shares, when), first


def draw(line: dict[str, Any], path: Path) -> None:
    """Draw the losses of single tasks and their mean over steps, and the steps of learning over the shares."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    shares = parity_tasks(TASKS, BITS, g=line["g"]).shares
    for task in range(0, 30, 3):
        colour = pyplot.get_cmap("viridis")(task / 30)
        left.plot(line["steps"], [row[task] for row in line["losses"]], color=colour, linewidth=1)
    left.plot(line["steps"], line["mean_loss"], color="black", linewidth=2.5, label="mean over the tasks")
    left.set(xscale="log", xlabel="steps", ylabel="loss, bits", title="every third of the first thirty tasks")
    left.legend(frameon=False)
    points = [(share, step) for share, step in zip(shares.tolist(), line["learned_at"]) if step is not None]
    right.loglog(*zip(*points), "o")
    x = in_steps(line)["x"]
    right.tick_params(which="minor", labelbottom=False, labelleft=False)
    right.set(xlabel="share of the samples", ylabel="step at which it is learned", title=f"exponent -{x:.2f}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, then print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse_parity.jsonl"))
    parser.add_argument("--g", nargs="+", type=float, default=[0.4, 0.2, 0.8, 1.2])
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128], help="beside 256, at g = 0.4")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--write", action="store_true", help="write results/sparse_parity.json and the picture in docs/images"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in arguments.runs.read_text().splitlines()] if arguments.runs.exists() else []
    if any(line["steps"][-1] != arguments.steps for line in done):
        raise SystemExit(f"{arguments.runs} holds runs of another length; use --runs")
    have = {(line["g"], line["width"], line["seed"]) for line in done}
    for seed in range(arguments.seeds):
        for g, width in [*((g, WIDTH) for g in arguments.g), *((G, width) for width in arguments.widths)]:
            if (g, width, seed) not in have:
                done.append(run(g, width, seed, arguments.steps))
                with arguments.runs.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(f"g {g:g} width {width} seed {seed}: {done[-1]['mean_loss'][-1]:.4f} bits", flush=True)
    rows = [{**in_steps(line), "g": line["g"], "seed": line["seed"]} for line in done if line["width"] == WIDTH]
    names = ("learned", "order", "x", "measured", "sum of falls", "this list", "infinite list", "theory")
    print("exponents in steps, mean ± deviation over seeds\n     g  " + "  ".join(f"{name:>13}" for name in names))
    for g in arguments.g:
        columns = [[row[name] for row in rows if row["g"] == g] for name in names]
        spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        cells = [f"{statistics.mean(column):.3f} ± {spread:.3f}" for column, spread in zip(columns, spreads)]
        print(f"{g:6.2f}  " + "  ".join(f"{cell:>13}" for cell in cells))
    print(f"loss in parameters, g = {G}")
    for width in sorted({*arguments.widths, WIDTH}):
        lines = [line for line in done if line["g"] == G and line["width"] == width]
        loss = statistics.mean(line["mean_loss"][-1] for line in lines)
        learned = statistics.mean(sum(step is not None for step in line["learned_at"]) for line in lines)
        rest = float(quanta_loss(learned, G, quanta=TASKS))
        parameters = lines[0]["parameters"]
        print(f"width {width:4}  parameters {parameters:6}  loss {loss:.4f}  learned {learned:4.1f}: leaves {rest:.4f}")
    if arguments.write:
        lean = [
            {key: value for key, value in line.items() if key != "losses"}
            | ({"exponents": in_steps(line)} if line["width"] == WIDTH else {})
            for line in done
        ]
        (RESULTS / "sparse_parity.json").write_text(json.dumps({"machine": describe(), "runs": lean}) + "\n")
        picked = next(line for line in done if (line["g"], line["width"]) == (G, WIDTH))
        draw(picked, RESULTS.parents[1] / "docs" / "images" / "sparse-parity.png")


if __name__ == "__main__":
    main()
