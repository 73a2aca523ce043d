"""Train tiny recipes on the processes of one group, started once: ``parallel_worker.py FOLDER STEPS CASES``.

Cases are JSON, ``{name: [recipe, way, options of the loop]}``. Each process runs this; the first leaves what the loop
reported and the whole weights in the folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.parallel import records, tiny

from danlu.train.distributed import init_distributed


def main(folder: Path, steps: int, cases: dict[str, tuple[str, str, dict[str, Any]]]) -> None:
    """Run every case; a case that fails ends all processes."""
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        for name, (recipe, way, loop) in cases.items():
            said, weights = records(tiny(recipe), steps, way, **loop)
            if world.main:
                torch.save({"said": json.dumps(said), "weights": weights}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
