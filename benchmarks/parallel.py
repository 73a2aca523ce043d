"""Does a run on several processes take the steps of one, and how fast?

    python -m benchmarks.parallel                       losses of 50 steps of six recipes, 1 process against 2 and 4
    python -m benchmarks.parallel --steps 4 --only lm   fewer of them
    python -m benchmarks.parallel --starts              every recipe takes two steps on two processes
    python -m benchmarks.parallel --speed               2 processes of one thread against 1 of two, the same batch

Sizes are tiny but for the speed; what is known is kept in ``--results`` and not run again. Differences are the largest
of all steps, relative: of the losses, and of the weights to their largest entry, at least 0.1: some begin at
zero.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from danlu.config import Pretrained
from danlu.objectives import SiDConfig
from danlu.protocols import Record
from danlu.recipes import REGISTRY, load
from danlu.train import RunConfig, train
from danlu.train.assembly import assemble
from danlu.train.distributed import init_distributed
from danlu.train.parallel import ParallelConfig
from danlu.train.trainer import Trainer

RECIPES = ("lm", "lm-dense", "lm-masked", "digits", "digits-sid", "digits-caption")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp2": {"replicas": 1},
    "hsdp": {"replicas": 2},
    "experts": {"experts": 2},
    "fsdp2-experts": {"replicas": 1, "experts": 2},
    "recompute": {"recompute": "blocks"},
    "fsdp2-recompute": {"replicas": 1, "recompute": "blocks"},
    "compile": {"compile": "blocks"},
}
TEXT = argparse.__file__
"""Text that is the same in every checkout."""


def tiny(name: str) -> RunConfig:
    """Return a recipe at a size that takes a step in tens of milliseconds."""
    config = load(name)
    known = {field.name for field in fields(config.model)}
    sizes: dict[str, Any] = {"dim": 48, "layers": 2, "hidden": 64, "condition": 16}
    if "mixers" in known:
        sizes["layers"] = max(2, len(config.model.mixers))  # type: ignore[attr-defined]
    if "widths" in known:
        sizes["widths"] = tuple(16 for _ in config.model.widths)  # type: ignore[attr-defined]
    if getattr(config.model, "experts", None) is not None:
        sizes["experts"] = replace(config.model.experts, num_experts=8, hidden=16)  # type: ignore[attr-defined]
    model = replace(config.model, **{key: value for key, value in sizes.items() if key in known})
    known = {field.name for field in fields(config.data)}
    sizes = {"batch": 8, "length": 64, "vocab_size": 512}
    if "vocab_size" in known:
        sizes["path"] = (TEXT,)
    data = replace(config.data, **{key: value for key, value in sizes.items() if key in known})
    optim = config.optim
    if "dtype" in {field.name for field in fields(optim)}:
        optim = replace(optim, dtype="float32")  # bfloat16 would round what differs in the last digit to two numbers
    config = replace(config, model=model, data=data, optim=optim)
    if isinstance(config.objective, SiDConfig):
        config = replace(config, objective=replace(config.objective, teacher=Pretrained(run=str(teacher()))))
    return config


def teacher() -> Path:
    """Return the folder of a run of ``digits-edm``, trained now if nobody has: two steps of it."""
    folder = Path("runs/parallel-teacher").absolute()
    if not (folder / "config.json").exists():
        config = tiny("digits-edm")
        loop = replace(config.train, steps=2, minutes=None, eval_batches=1, precision="float32", device="cpu", ema=None)
        train(replace(config, train=loop), folder, quiet=True)
    return folder


def records(
    config: RunConfig, steps: int, way: str, *, precision: str = "float32", **loop_options: Any
) -> tuple[list[Record], Any]:
    """Train for some steps on the processes there are; return what was reported, and the weights, whole.

    ``loop_options`` are fields of the loop's configuration.
    """
    loop = replace(
        config.train, steps=steps, minutes=None, eval_every=steps, eval_batches=2, parallel=ParallelConfig(**WAYS[way])
    )
    loop = replace(loop, precision=precision, device="cpu", threads=torch.get_num_threads(), **loop_options)
    with init_distributed("cpu") as world:
        parts = assemble(replace(config, train=loop), world)
        said: list[Record] = []
        trainer = Trainer(
            parts.objective,
            parts.optimizer,
            config.schedule,
            parts.data.train,
            loop,
            policy=parts.policy,
            validation=parts.data.validation,
            reporters=[said.append],
            ema=parts.ema,
            mesh=parts.mesh,
        )
        trainer.fit()
        state = parts.objective.state_dict()
        whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state.items()}
    return said, whole


def launch(words: Sequence[str], processes: int, threads: int = 1, timeout: float = 900) -> None:
    """Run this file as a worker in so many processes.

    Raises:
        RuntimeError: one of them failed; its last words are in the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), **(together if processes > 1 else {})}
    command = [sys.executable, "-m", "benchmarks.parallel", "--work", *words]
    started = [
        subprocess.Popen(
            command,
            env={**common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=timeout)[1] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("; ".join(text.strip().splitlines()[-1] for text in said if text.strip()))


def work(options: argparse.Namespace) -> None:
    """Train one recipe in one way, and leave losses and weights in a file."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = load(options.only) if options.speed else tiny(options.only)
    began = time.perf_counter()
    said, weights = records(config, options.steps, options.way, precision="auto" if options.speed else "float32")
    if os.environ.get("RANK", "0") == "0":
        numbers = {"records": said, "seconds": time.perf_counter() - began}
        torch.save({"numbers": json.dumps(numbers), "weights": weights}, options.out)


def run(name: str, way: str, processes: int, steps: int, folder: Path, *words: str, threads: int = 1) -> dict[str, Any]:
    """Run a worker, or take what it left before; return its numbers and weights."""
    file = folder / f"{name}-{way}-{processes}-{steps}.pt"
    if not file.exists():
        launch([*words, "--only", name, "--way", way, "--steps", str(steps), "--out", str(file)], processes, threads)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return {**json.loads(found["numbers"]), "weights": found["weights"]}


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the largest relative differences of losses, evaluations included, and of weights."""
    losses = 0.0
    for left, right in zip(one["records"], other["records"], strict=True):
        for key in left.keys() & right.keys():
            if key == "loss" or key == "val_loss":
                losses = max(losses, abs(left[key] - right[key]) / abs(left[key]))
    weights = 0.0
    for name, value in one["weights"].items():
        if value.is_floating_point() and value.numel():
            largest = max(float(value.abs().max()), 0.1)
            weights = max(weights, float((value - other["weights"][name]).abs().max()) / largest)
    return losses, weights


def table(options: argparse.Namespace) -> None:
    """Print how far each way on 2 and 4 processes is from one process."""
    names = [options.only] if options.only else RECIPES
    print(
        f"| recipe | way | processes | losses of {options.steps} steps | weights |\n|---|---|---|---|---|", flush=True
    )
    for name in names:
        alone = run(name, "plain", 1, options.steps, options.results)
        for way in WAYS:
            if "experts" in way and getattr(load(name).model, "experts", None) is None:
                continue
            for processes in (2, 4):
                if way == "hsdp" and processes == 2:
                    continue
                try:
                    found = difference(alone, run(name, way, processes, options.steps, options.results))
                    print(f"| {name} | {way} | {processes} | {found[0]:.1e} | {found[1]:.1e} |", flush=True)
                except (RuntimeError, subprocess.TimeoutExpired) as problem:
                    print(f"| {name} | {way} | {processes} | failed: {problem} | |", flush=True)


def starts(options: argparse.Namespace) -> None:
    """Take two steps of every recipe on two processes."""
    for name in [options.only] if options.only else REGISTRY:
        try:
            found = difference(run(name, "plain", 1, 2, options.results), run(name, "plain", 2, 2, options.results))
            print(f"{name}: {found[0]:.1e} {found[1]:.1e}", flush=True)
        except RuntimeError as problem:
            print(f"{name}: failed: {problem}", flush=True)


def speed(options: argparse.Namespace) -> None:
    """Print the median ratio of the times of a step, two processes of one thread over one process of two."""
    for name in [options.only] if options.only else ("lm", "lm-dense", "digits"):
        ratios = []
        for round_ in range(3):
            folder = options.results / f"round-{round_}"
            folder.mkdir(parents=True, exist_ok=True)
            pair = [
                run(name, "plain", processes, options.steps, folder, "--speed", threads=threads)["records"]
                for processes, threads in ((1, 2), (2, 1))
            ]
            rates = [median(record["items_per_second"] for record in records[2:]) for records in pair]
            ratios.append(rates[1] / rates[0])
        print(f"{name}: 2 x 1 over 1 x 2: {median(ratios):.2f} of {[round(r, 2) for r in ratios]}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="one recipe")
    parser.add_argument("--results", type=Path, default=Path("runs/parallel"))
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", default="plain", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.work:
        work(options)
    elif options.starts:
        starts(options)
    elif options.speed:
        speed(options)
    else:
        table(options)


if __name__ == "__main__":
    main()
