"""A recipe whose second process is killed in its seventh step, once: then the file ``DANLU_MARK`` is there."""

import os
import signal
from pathlib import Path

import toy

from danlu.train import RunConfig


def recipe() -> RunConfig:
    """The small task, in which nothing is drawn."""
    mark = Path(os.environ["DANLU_MARK"])
    if os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        toy.SIGNALS[7] = signal.SIGKILL
    return toy.plain_config()
