"""Ray Train starts the processes, danlu trains: ``python ray_train.py PROCESSES RECIPE DIR [--OPTION VALUE ...]``.

Ray sets the variables that torchrun sets and joins a process group, which danlu uses. A worker that is lost ends them
all; Ray starts them again, and ``--resume`` goes on from the newest checkpoint in DIR, a path on shared storage.
"""

import sys
from collections.abc import Sequence
from typing import Any


def train(options: dict[str, Any]) -> None:
    """Train on one of the processes; a run that did not become complete is a failure to Ray."""
    from danlu.cli import main

    code = main(["train", options["recipe"], "--out", options["out"], "--resume", *options["words"]])
    if code:
        raise RuntimeError(f"danlu ended with exit code {code}")


def start(processes: int, recipe: str, out: str, words: Sequence[str], *, gpu: bool) -> None:
    """Start a job of so many processes, which is started again up to three times."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train,
        train_loop_config={"recipe": recipe, "out": out, "words": list(words)},
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    import torch

    start(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:], gpu=torch.cuda.is_available())
