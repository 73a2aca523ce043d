"""What saving costs a training run: steps without it, with it on the training thread, and in the background.

Each contestant takes the same steps of the recipe `lm` and saves once, after the first of them; the last one waits for
its save at the end, as a run does before the next. Wall time says what a run waits; the training thread's own processor
time leaves out what other programs of the machine take. The cost of a save is the difference of a round to the round
without one; divided by the steps between two saves of a run (`train.checkpoint_every`, 200) it is the share of a step.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from danlu.recipes import load
from danlu.train import checkpoint

EVERY = load("lm").train.checkpoint_every or 200


def make(steps: int, folder: Path) -> tuple[dict[str, Callable[[], None]], list[float], dict[str, list[float]]]:
    """Return what is compared; how long background saves held up the training thread; its processor time."""
    torch.manual_seed(0)
    config = load("lm")
    objective: Any = config.objective.build(config.model.build())
    optimizer = config.optim.build(objective, process_group=None)
    tokens = torch.randint(256, (2, 129))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    held: list[float] = []
    own_time: dict[str, list[float]] = {}

    def step() -> None:
        (objective(batch) / 256).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state() -> dict[str, Any]:
        return {"objective": objective.state_dict(), "optimizer": checkpoint.plain_groups(optimizer.state_dict())}

    def run(name: str, saver: checkpoint.Saver | None) -> None:
        start = time.thread_time()
        for index in range(steps):
            step()
            if index == 0 and saver is not None:
                began = time.perf_counter()
                saver.save(1, state())
                if saver.background:
                    held.append(time.perf_counter() - began)
        own_time.setdefault(name, []).append(time.thread_time() - start)
        if saver is not None:
            saver.wait()

    options: dict[str, Any] = {"config": {}, "keep": 1}
    own = checkpoint.Saver(folder / "own", **options)
    background = checkpoint.Saver(folder / "background", background=True, **options)
    runs = {
        name: (lambda name=name, saver=saver: run(name, saver))
        for name, saver in (
            ("no save", None),
            ("danlu, saved on the training thread", own),
            ("danlu, saved in the background", background),
        )
    }
    return runs, held, own_time


def main() -> None:
    options = harness.options(__doc__, rounds=31, warmup=1, threads=1)
    steps = 3 if options.quick else 5
    folder = Path(tempfile.mkdtemp())
    try:
        runs, held, own_time = make(steps, folder)
        table = harness.compare(f"{steps} steps of lm, one save", runs, base="no save", options=options)
        size = sum(file.stat().st_size for file in (folder / "own").rglob("*.safetensors"))
    finally:
        shutil.rmtree(folder)
    plain = table.seconds["no save"]
    print(f"a checkpoint of {size / 2**20:.0f} MiB; a step takes {1000 * median(plain) / steps:.0f} ms")
    for name, seconds in table.seconds.items():
        if name != "no save":
            cost = median(mine - base for mine, base in zip(seconds, plain))
            share = cost / (EVERY * median(plain) / steps)
            print(f"{name}: a save costs {1000 * cost:.0f} ms, {share:.2%} of a step with one every {EVERY} steps")
            busy = median(mine - base for mine, base in zip(own_time[name], own_time["no save"]))
            print(f"    {1000 * busy:.0f} ms of the training thread's processor time")
    print(f"in the background the training thread copies for {1000 * median(held):.0f} ms")
    harness.write("saving", __doc__, [table], options)


if __name__ == "__main__":
    main()
