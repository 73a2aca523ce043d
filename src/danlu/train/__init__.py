"""Training: the loop, checkpoints, several processes, metrics, and the arithmetic chosen for this machine.

>>> from danlu.train import TrainConfig
>>> TrainConfig(steps=100).clip
1.0
"""

from danlu.train.assembly import Assembly, assemble
from danlu.train.branch import branch
from danlu.train.config import RunConfig, TrainConfig
from danlu.train.device import Policy, Probe, Rate, choose, probe
from danlu.train.load import load, load_objective, read_config
from danlu.train.run import evaluate, restore, resume, train
from danlu.train.trainer import Trainer

__all__ = [
    "Assembly",
    "Policy",
    "Probe",
    "Rate",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "assemble",
    "branch",
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
