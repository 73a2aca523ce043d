"""Does a run that goes on with other numbers of processes take the steps of one that was never interrupted?

    python -m benchmarks.resuming                     1 -> 2 -> 4 -> 1 processes, recipes and placements
    python -m benchmarks.resuming --only lm --ways fsdp2 --worlds 2 1

Every part trains three steps at the size of `benchmarks.parallel`, saves and ends; the next one reads the checkpoint
with its own number of processes. Differences are the largest of all steps, relative: of the losses, and of the weights
to their largest entry.
"""

import argparse
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.parallel import RECIPES, WAYS, tiny
from danlu.train import checkpoint
from danlu.train.assembly import assemble
from danlu.train.distributed import world
from danlu.train.metrics import MetricsFile, read_records
from danlu.train.parallel import ParallelConfig
from danlu.train.signals import Stop
from danlu.train.trainer import Trainer

PART = 3


def part(rank: int, size: int, recipe: str, way: str, folder: Path, until: int, total: int) -> None:
    """Train to the step ``until`` on ``size`` processes, from the checkpoint in ``folder`` if there is one."""
    torch.set_num_threads(1)
    if size > 1:
        store = f"file://{folder}/store{until}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    # What does not fit these processes is left out: a run on one has no experts to share.
    placed = {name: value for name, value in WAYS[way].items() if isinstance(value, str) or size % value == 0}
    config = tiny(recipe)
    loop = replace(
        config.train,
        steps=total,
        minutes=None,
        eval_every=total,
        eval_batches=2,
        checkpoint_every=None,
        precision="float32",
        device="cpu",
        threads=1,
        ema=0.9,
        parallel=ParallelConfig(**placed),
    )
    parts = assemble(replace(config, train=loop), world())
    stop = Stop()
    trainer = Trainer(
        parts.objective,
        parts.optimizer,
        config.schedule,
        parts.data.train,
        loop,
        policy=parts.policy,
        validation=parts.data.validation,
        folder=folder / "checkpoints",
        ema=parts.ema,
        mesh=parts.mesh,
    )
    found = checkpoint.newest(folder)
    if found is not None:
        trainer.restore(found)

    def end(record: Any) -> None:
        if record["step"] >= until:
            stop.signal = signal.SIGTERM

    # A signal is seen in the step after it: the reporter sends it one step early.
    until -= size > 1
    metrics = MetricsFile(folder / "metrics.jsonl", after=trainer.logged) if rank == 0 else None
    trainer.reporters = [end] if metrics is None else [metrics, end]
    trainer.fit(stop)
    if metrics is not None:
        metrics.close()
    if size > 1:
        dist.destroy_process_group()


def chain(recipe: str, way: str, worlds: Sequence[int], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train one part in each of ``worlds``; return the records and the weights."""
    folder.mkdir(parents=True)
    total = PART * len(worlds)
    context = multiprocessing.get_context("fork")
    for index, size in enumerate(worlds):
        words = (size, recipe, way, folder, PART * (index + 1), total)
        processes = [context.Process(target=part, args=(rank, *words)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{recipe}, {way}: a part of {size} processes failed")
    (*_, newest) = checkpoint.checkpoints(folder / "checkpoints")
    return list(read_records(folder / "metrics.jsonl")), checkpoint.load(newest).state


def differences(first: Any, second: Any) -> tuple[float, float]:
    """Return the largest relative difference of losses, and of weights and averages."""
    (records, state), (others, other) = first, second
    if [record["step"] for record in records] != [record["step"] for record in others]:
        raise RuntimeError("the runs have not the same steps")
    losses = max(
        abs(a[key] / b[key] - 1)
        for a, b in zip(records, others, strict=True)
        for key in ("loss", "val_loss")
        if key in a
    )
    weights = 0.0
    for kind in ("objective", "ema"):
        for name, value in state[kind].items():
            if value.is_floating_point() and value.numel():
                scale = max(float(value.abs().max()), 1e-30)
                weights = max(weights, float((value - other[kind][name]).abs().max()) / scale)
    return losses, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--ways", nargs="+", default=["plain", "fsdp2"], choices=list(WAYS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4, 1])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for recipe in options.only:
            alone = chain(recipe, "plain", [1] * len(options.worlds), folder / recipe / "alone")
            for way in options.ways:
                several = chain(recipe, way, options.worlds, folder / recipe / way)
                losses, weights = differences(alone, several)
                through = " -> ".join(map(str, options.worlds))
                print(f"{recipe:15} {way:15} {through}: losses {losses:.1e}, weights {weights:.1e}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
