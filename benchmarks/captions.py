"""Where patches stand: the digits-caption recipes over seeds, each measured on all validation examples.

Every run is a folder; what is complete is not trained again, what was interrupted goes on.

    python -m benchmarks.captions --seeds 0 1 --out runs/captions
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from danlu.recipes import load
from danlu.train import run

RECIPES = ("digits-caption", "digits-caption-flat", "digits-caption-unscaled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/captions"))
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.recipes:
            folder = options.out / f"{name}-{seed}"
            if (folder / "config.json").exists():
                run.resume(folder, quiet=True)
            else:
                config = load(name)
                train = replace(config.train, seed=seed, threads=options.threads, precision="float32")
                run.train(replace(config, train=train), folder, quiet=True)
            print(json.dumps({"recipe": name, "seed": seed, **run.evaluate(folder)}), flush=True)


if __name__ == "__main__":
    main()
