"""A run that decays from a checkpoint of another run's stable phase, which goes on untouched."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from danlu import config as configs
from danlu.protocols import Decays
from danlu.train import history
from danlu.train.begin import located
from danlu.train.change import check_saved, length_then
from danlu.train.distributed import init_distributed
from danlu.train.folder import claimed, write_whole
from danlu.train.load import RunAt, checkpoint_steps, find_checkpoint, read_config, run_at
from danlu.train.metrics import MetricsFile
from danlu.train.run import resume
from danlu.train.together import first

__all__ = ["branch"]


def branch(path: Path | str | RunAt, out: Path | str, *, steps: int | None = None, quiet: bool = False) -> int:
    """Train a new run in the folder ``out`` that decays from a checkpoint of the stable phase of another.

    The checkpoint is copied, so that the new run needs the other one no more; the other one is not changed.

    Args:
        path: the other run, or a checkpoint of it (:func:`danlu.train.load.run_at`).
        out: a folder that does not exist yet, or is empty.
        steps: of the decay; None for the share of the run that the schedule gives it.
        quiet: print nothing but errors.

    Returns:
        As :func:`danlu.train.train`.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint.
        FileExistsError: ``out`` holds something; it is left as it is.
        ValueError: the schedule has no stable phase, or the checkpoint is not of it.
    """
    at, out = run_at(path), Path(out)
    config = read_config(at)
    with init_distributed(config.train.device):
        out = Path(first(lambda: str(out)))
        source = find_checkpoint(at)
        if source is None:
            raise FileNotFoundError(f"{at.folder} holds no complete checkpoint yet")
        check_saved(at.folder, config, source)
        schedule = config.schedule
        if not isinstance(schedule, Decays):
            kind = configs.short_name(type(schedule))
            raise ValueError(
                f"{at.folder} has the schedule {kind}, which has no stable phase to decay from; to begin another run "
                f"with its weights: danlu train RECIPE --init {at}"
            )
        config = located(config, at.folder)
        total = length_then(source, config)
        decaying, length = schedule.decaying_from(source.step, total, steps)
        if decaying is None:
            there = [step for step in checkpoint_steps(at.folder) if schedule.decaying_from(step, total)[0]]
            stable = f"it has those of steps {', '.join(map(str, there))}" if there else "it has none of them"
            raise ValueError(f"step {source.step} of {at.folder} is not in its stable phase; {stable}")
        new = replace(config, schedule=decaying, train=replace(config.train, steps=length, minutes=None))

        def copy() -> None:
            with claimed(out, new=True):
                _copy(at.folder, source.path, source.step, out)
                changed = {key: list(values) for key, values in configs.changes(config, new).items()}
                said = history.origin(source, at.folder)
                history.add_event(out, "branch", folder=os.path.abspath(out), **said, changed=changed)
                write_whole(out / "config.json", configs.dumps(new))

        first(copy)
        return resume(out, quiet=quiet)


def _copy(run: Path, checkpoint: Path, step: int, out: Path) -> None:
    for path in run.iterdir():
        if path.name in ("manifest.json", "tokenizer.json", "metrics.jsonl", "code.json"):
            shutil.copyfile(path, out / path.name)
    if (run / "code").is_dir():
        shutil.copytree(run / "code", out / "code")
    MetricsFile(out / "metrics.jsonl", after=step).close()
    shutil.copytree(checkpoint, out / "checkpoints" / checkpoint.name.partition(".")[0])
