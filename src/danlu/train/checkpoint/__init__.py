"""Checkpoints that are complete or not there, readable without unpickling anything.

A checkpoint is a folder ``step-00000100``: the tensors, written by torch.distributed.checkpoint as safetensors, a file
for each process that took part; ``state.json``, which holds everything else and says where each tensor belongs; and
``SHA256SUMS`` of these files, which ``sha256sum -c`` reads and every load checks. It is written under a temporary name,
flushed to the disk, and only then renamed: whatever interrupts a save, the previous checkpoint stays. Any number of
processes reads it.

State is nested dictionaries, lists and tuples of tensors, DTensors and plain values, as ``state_dict`` methods return
it.
"""

from danlu.train.checkpoint.keeping import Goal, best
from danlu.train.checkpoint.layout import CheckpointError, checkpoints
from danlu.train.checkpoint.packing import pack, plain_groups, unpack
from danlu.train.checkpoint.reading import Checkpoint, Found, load, load_latest, newest
from danlu.train.checkpoint.saving import Saver
from danlu.train.checkpoint.writing import save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Found",
    "Goal",
    "Saver",
    "best",
    "checkpoints",
    "load",
    "load_latest",
    "newest",
    "pack",
    "plain_groups",
    "save",
    "unpack",
]
