"""Runs the checks of several processes for ``test_sharded.py``: ``python sharding_worker.py RANK STORE FOLDER``.

Each check is a function of the world of four processes; what it raises goes into ``FOLDER/RANK.json``.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import sharding_clip
import sharding_elementwise
import sharding_models
import sharding_muon
import torch.distributed as dist
from sharding_world import World

CHECKS = {
    name.removeprefix("check_"): check
    for module in (sharding_muon, sharding_elementwise, sharding_models, sharding_clip)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main(rank, store, folder):
    limit = timedelta(seconds=300)  # a check that fails on one process leaves others waiting
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=limit)
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


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
