"""Runs the checks of several processes for ``test_sharded.py``: ``python sharding_worker.py FOLDER``.

Each check is a function of the world of four processes; what it raises goes into ``FOLDER/RANK.json``. The four are
forks of one process that has imported everything: imports are half of what a process costs on a busy machine.
"""

import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import sharding_clip
import sharding_elementwise
import sharding_models
import sharding_muon
import sharding_twice
import torch.distributed as dist
from sharding_world import World

PROCESSES = 4

CHECKS = {
    name.removeprefix("check_"): check
    for module in (sharding_muon, sharding_twice, sharding_elementwise, sharding_models, sharding_clip)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def work(rank, folder):
    limit = timedelta(seconds=300)  # a check that fails on one process leaves others waiting
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=limit
    )
    world, outcome = World(folder), {}
    for name, check in CHECKS.items():
        try:
            check(world)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()
    dist.destroy_process_group()


def main(folder):
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else methods[0])
    workers = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return int(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
