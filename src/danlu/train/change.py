"""A run that goes on with other options: what may change, from which checkpoint it goes on, and what is put aside."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from danlu import config as configs
from danlu.train import history
from danlu.train.checkpoint import Found, checkpoints
from danlu.train.checkpoint.layout import step_of
from danlu.train.config import RunConfig
from danlu.train.load import RunAt, checkpoint_steps

__all__ = ["FREE", "LENGTH", "Going", "allowed", "check_saved", "going_on", "length_then", "set_aside"]

FREE = frozenset(
    f"train.{name}"
    for name in (
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep",
        "keep_every",
        "keep_best",
        "stop_after",
        "async_save",
        "patience",
        "threads",
        "tensorboard",
        "parallel.replicas",
        "parallel.experts",
        "parallel.recompute",
        "parallel.reduce",
        "parallel.compile",
    )
)
"""Options that change no number of the training, but for the order of additions."""

LENGTH = frozenset(("train.steps", "train.minutes"))

_KEPT = ("config.json", "manifest.json", "tokenizer.json", "metrics.jsonl", "history.json", "code.json")
_MADE_AT_THE_END = ("samples.txt", "samples.png", "report.html")


class Going(NamedTuple):
    """How a run goes on.

    Attributes:
        step: of the checkpoint that it goes on from.
        steps: its new length, as far as it is known; None where the length was not changed.
        said: sentences for the person who asked for it.
    """

    step: int
    steps: int | None = None
    said: tuple[str, ...] = ()


def allowed(folder: Path, kept: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return what of a run's configuration is to change, by option; paths may where the data's content is known.

    Raises:
        ValueError: a change would make it another run.
    """
    changed = configs.changes(kept, wanted)
    refused = sorted(set(changed) - FREE - LENGTH - _paths(folder, wanted))
    if refused:
        raise ValueError(
            f"a resumed run keeps {', '.join(refused)}: another value would change its numbers. To begin another run "
            f"with its weights: danlu train RECIPE --init {folder}"
        )
    return changed


def check_saved(folder: Path, config: RunConfig, saved: Found) -> None:
    """Raise ValueError unless a checkpoint has the run's configuration, up to what may change or is recorded."""
    found = configs.changes(config, saved.config)
    free = FREE | _paths(folder, config)
    free |= history.explained(folder, {key: (then, now) for key, (now, then) in found.items()})
    lines = [line for line in configs.differences(config, saved.config) if line.partition(":")[0] not in free]
    if lines:
        raise ValueError(
            f"{saved.path} was trained with another configuration (today's value and the checkpoint's): "
            f"{'; '.join(lines)}"
        )


def going_on(run: RunAt, saved: Found, kept: RunConfig, wanted: RunConfig) -> Going:
    """Choose the checkpoint that a run goes on from, whose length may be another one now.

    That is the newest one, unless its learning rate belongs to the end of the old length: then it is the newest one
    whose last step had the rate that it has in the new length, if that is not more than half of the way back (with a
    warm-up-stable-decay schedule: the last of the stable phase).

    Args:
        run: what was asked for: a step that is named is taken.
        saved: the checkpoint that this leads to.
        kept: the configuration so far.
        wanted: the configuration to go on with.

    Raises:
        ValueError: the new length is over already.
    """
    then, seconds = length_then(saved, kept), float(saved.described["state"].get("seconds") or 0.0)
    if not LENGTH & configs.changes(kept, wanted).keys():
        # A run that was killed before it saved under its new budget: the checkpoint has the length of the old one.
        stale = kept.train.minutes is not None and "train.minutes" in configs.changes(kept, saved.config)
        return Going(saved.step, max(saved.step + 1, _new_length(kept, saved.step, seconds)) if stale else None)
    now = _new_length(wanted, saved.step, seconds)
    before = _factors(kept, then)
    after = _factors(wanted, now)
    step = saved.step
    if run.at == "last":
        near = [s for s in checkpoint_steps(run.folder) if 0 < s <= now and 2 * s >= saved.step]
        same = [s for s in near if before(s - 1) == after(s - 1)]
        step = same[-1] if same else saved.step
    if step >= now:
        raise ValueError(
            f"train.steps must be above the {step} that {run.folder} has been trained for, got {now}"
            if wanted.train.minutes is None
            else f"train.minutes must be above the {seconds / 60:.3g} that {run.folder} has taken"
        )
    differing = sum(before(s) != after(s) for s in range(step))
    said = [f"Going on from step {step} to {now} steps." if wanted.train.minutes is None else f"From step {step}."]
    if differing:
        said.append(
            f"This is not what {now} steps from the start would give: "
            f"{differing} of these {step} had another learning rate than they would have there."
        )
    return Going(step, now, tuple(said))


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints after ``step``, and what was made at the run's end, to ``earlier/N``, a run folder of its own.

    Returns:
        That folder; None if there was nothing to move.
    """
    later = [path for path in checkpoints(folder / "checkpoints") if (step_of(path) or 0) > step]
    ends = [folder / name for name in _MADE_AT_THE_END if (folder / name).exists()]
    if not later and not ends:
        return None
    number = 1
    while (place := folder / "earlier" / str(number)).exists():
        number += 1
    unfinished = place.with_name(f".{number}.tmp")
    (unfinished / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        if (folder / name).is_file():
            shutil.copy2(folder / name, unfinished / name)
    for path in reversed(later):
        path.rename(unfinished / "checkpoints" / path.name)
    for path in ends:
        path.rename(unfinished / path.name)
    unfinished.rename(place)
    return place


def length_then(saved: Found, config: RunConfig) -> int:
    """Return how many steps a run was to have when a checkpoint was made."""
    held = saved.described["state"].get("length")
    steps = config.train.steps if config.train.minutes is None or not held else held["steps"]
    return int(steps or saved.step)


def _new_length(config: RunConfig, step: int, seconds: float) -> int:
    """How many steps a run is to have now; of a time budget, what the pace so far gives."""
    most, minutes = config.train.steps, config.train.minutes
    if minutes is None:
        return int(most or 0)
    paced = round(step * 60 * minutes / seconds) if seconds > 0 else step + 1
    return paced if most is None else min(most, paced)


def _factors(config: RunConfig, total: int) -> Callable[[int], float]:
    schedule = config.schedule
    return lambda step: float(schedule.factor(step, total))


def _paths(folder: Path, config: RunConfig) -> frozenset[str]:
    """Options that hold paths of data whose content the run knows: it is the content that must not change."""
    file = folder / "manifest.json"
    manifest: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    names: Sequence[str] = configs.path_options(config) if "sha256" in manifest else ()
    return frozenset(name for name in names if name.startswith("data."))
