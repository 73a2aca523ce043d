"""The training room: the loop, checkpoints, several processes, metrics, and the arithmetic chosen for this machine.

>>> from danlu.train import TrainConfig
>>> TrainConfig(steps=100).clip
1.0
"""

from danlu.train.device import Policy, Probe, Rate, choose, probe
from danlu.train.run import (
    Assembly,
    RunConfig,
    assemble,
    evaluate,
    load,
    load_objective,
    read_config,
    restore,
    resume,
    train,
)
from danlu.train.trainer import TrainConfig, Trainer

__all__ = [
    "Assembly",
    "Policy",
    "Probe",
    "Rate",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "assemble",
    "choose",
    "evaluate",
    "load",
    "load_objective",
    "probe",
    "read_config",
    "restore",
    "resume",
    "train",
]
