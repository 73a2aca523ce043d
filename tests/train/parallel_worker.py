"""Train tiny recipes in several ways on the processes of one group, which are started once: ``parallel_worker.py FOLDER``.

Each process of the group runs it; the first leaves what the loop reported and the whole weights in the folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.parallel import records, tiny

from danlu.train.distributed import init_distributed

STEPS = 3
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whole copies": ("lm-dense", "plain", {}),
    "whole copies, two micro-batches, averaged weights": ("lm", "plain", {"accumulate": 2, "ema": 0.5}),
    "cut weights, two micro-batches, averaged weights": ("lm", "fsdp2", {"accumulate": 2, "ema": 0.5}),
    "cut experts": ("lm", "experts", {}),
    "cut weights and experts, two micro-batches": ("lm", "fsdp2-experts", {"accumulate": 2}),
    "cut weights, blocks run again": ("lm", "fsdp2-recompute", {}),
    "masked tokens": ("lm-masked", "fsdp2", {}),
}


def main(folder: Path) -> None:
    """Run every case; a case that fails ends all processes."""
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        for name, (recipe, way, loop) in CASES.items():
            said, weights = records(tiny(recipe), STEPS, way, **loop)
            if world.main:
                torch.save({"said": json.dumps(said), "weights": weights}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
