"""Which checkpoints stay: the last, every so many steps, and the best by a metric."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.train.checkpoint.layout import checkpoints, described, remove

__all__ = ["Goal", "best", "prune"]


@dataclass(frozen=True)
class Goal:
    """The metric that says which checkpoint is the best.

    Attributes:
        metric: its name in an evaluation.
        higher: whether more is better.
    """

    metric: str = "val_loss"
    higher: bool = False

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` is an improvement; a number that is not finite never is.

        >>> Goal().better(1.0, None), Goal(higher=True).better(1.0, 2.0), Goal().better(float("nan"), 2.0)
        (True, False, False)
        """
        if not math.isfinite(value):
            return False
        return than is None or (value > than if self.higher else value < than)

    def of(self, saved: Mapping[str, Any]) -> float | None:
        """The metric of a checkpoint's own step, from what ``state.json`` says; None if that was not evaluated."""
        metrics = saved.get("metrics") or {}
        value = metrics.get(self.metric) if metrics.get("step") == saved["step"] else None
        return value if isinstance(value, (int, float)) else None


def best(run: Path, goal: Goal | None = None) -> Path | None:
    """Return the complete checkpoint of a run that was best when it was evaluated; None if none was evaluated.

    Args:
        run: its folder.
        goal: by what; None for what the run was configured with (``train.keep_best``), else the validation loss.
    """
    found = [(path, described(path)) for path in checkpoints(Path(run) / "checkpoints")]
    if goal is None:
        said = [saved["goal"] for _, saved in found if saved.get("goal")]
        goal = Goal(**said[-1]) if said else Goal()
    return _best(found, goal)


def prune(folder: Path, *, last: int, every: int | None = None, goal: Goal | None = None) -> list[Path]:
    """Remove the checkpoints that need not stay, and return them.

    Args:
        folder: of the checkpoints.
        last: how many of the newest stay.
        every: those of steps that this divides stay.
        goal: the best by it stays.
    """
    paths = checkpoints(folder)
    stay = set(paths[-last:])
    if every is not None or goal is not None:
        found = [(path, described(path)) for path in paths]
        stay |= {path for path, saved in found if every is not None and saved["step"] % every == 0}
        chosen = None if goal is None else _best(found, goal)
        stay |= set() if chosen is None else {chosen}
    gone = [path for path in paths if path not in stay]
    for path in gone:
        remove(path)
    return gone


def _best(found: list[tuple[Path, dict[str, Any]]], goal: Goal) -> Path | None:
    chosen, reached = None, None
    for path, saved in found:
        value = goal.of(saved)
        if value is not None and goal.better(value, reached):
            chosen, reached = path, value
    return chosen
