"""From a run folder back to its configuration, model and objective.

A run is named by its folder, and one of its checkpoints by what stands behind an ``@``: ``runs/lm-1@600`` is that of
step 600, ``runs/lm-1@best`` the one with the lowest validation loss, ``runs/lm-1@last`` (or nothing) the newest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from danlu import config as configs
from danlu.train import checkpoint
from danlu.train.checkpoint.layout import damage, described, step_of
from danlu.train.config import RunConfig
from danlu.train.device import Policy, choose
from danlu.train.metrics import read_records

__all__ = [
    "RunAt",
    "build_model",
    "checkpoint_steps",
    "find_checkpoint",
    "last_finite",
    "load",
    "load_objective",
    "nonfinite",
    "read_config",
    "run_at",
    "weights",
]


class RunAt(NamedTuple):
    """A run folder and which of its checkpoints is meant: ``"last"``, ``"best"`` or a step."""

    folder: Path
    at: int | str = "last"

    def __str__(self) -> str:
        return str(self.folder) if self.at == "last" else f"{self.folder}@{self.at}"


def run_at(run: "Path | str | RunAt") -> RunAt:
    """Return the folder and the checkpoint that ``RUN``, ``RUN@STEP``, ``RUN@best`` or ``RUN@last`` names.

    A folder whose name itself has an ``@`` is found under its whole name.

    Raises:
        ValueError: what follows the ``@`` is neither a step nor one of the two words.

    >>> run_at("runs/lm-1@600")
    RunAt(folder=PosixPath('runs/lm-1'), at=600)
    >>> run_at("runs/lm-1").at
    'last'
    """
    if isinstance(run, RunAt):
        return run
    folder, mark, at = str(run).rpartition("@")
    if not mark or Path(run).exists():
        return RunAt(Path(run))
    if at.isascii() and at.isdigit():
        return RunAt(Path(folder), int(at))
    if at not in ("best", "last"):
        raise ValueError(f"{run}: @ must be followed by a step, best or last, got {at!r}")
    return RunAt(Path(folder), at)


def find_checkpoint(run: Path | str | RunAt) -> checkpoint.Found | None:
    """Find the checkpoint that is meant (:func:`run_at`) and check its files; on several processes call it on all.

    None: the run has none yet, and no step was named.

    Raises:
        ValueError: there is none of that step (those that there are are named), or none was evaluated.
        CheckpointError: it is damaged; for the newest one only if all are.
    """
    folder, at = run_at(run)
    if at == "last":
        return checkpoint.newest(folder)
    there = {int(step_of(path) or 0): path for path in _checkpoints(folder)}
    if at == "best":
        path = checkpoint.best(folder) or _lowest(folder, there)
        if path is None:
            have = _named(there)
            raise ValueError(f"no checkpoint of {folder} is known to be the best: none was evaluated ({have})")
    elif at in there:
        path = there[int(at)]
    else:
        raise ValueError(f"{folder} has no checkpoint of step {at}: {_named(there)}")
    found = described(path)
    if wrong := damage(path, found):
        raise checkpoint.CheckpointError(wrong)
    return checkpoint.Found(path, found)


def _read(run: RunAt, parts: Sequence[str]) -> checkpoint.Checkpoint | None:
    """Read what :func:`find_checkpoint` finds, on this process alone."""
    if run.at == "last":
        return checkpoint.load_latest(run.folder, parts=parts)
    found = find_checkpoint(run)
    return None if found is None else found.read(parts=parts)


def _lowest(folder: Path, there: Mapping[int, Path]) -> Path | None:
    """The checkpoint with the lowest validation loss in the metrics, where none says its own."""
    losses = {
        record["step"]: record["val_loss"]
        for record in read_records(folder / "metrics.jsonl")
        if record["step"] in there and isinstance(record.get("val_loss"), (int, float))
    }
    return there[min(losses, key=lambda step: losses[step])] if losses else None


def _checkpoints(folder: Path) -> list[Path]:
    return checkpoint.checkpoints(folder / "checkpoints")


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of which a run has checkpoints."""
    return sorted({int(step_of(path) or 0) for path in _checkpoints(folder)})


def _named(steps: Mapping[int, Path]) -> str:
    """Say which checkpoints there are.

    >>> _named({4: Path(), 8: Path(), 11: Path()})
    'it has those of steps 4, 8 and 11'
    """
    *others, last = sorted(steps) or [0]
    if not steps:
        return "it has none"
    return f"it has {'those' if others else 'that'} of step{'s' if others else ''} " + (
        f"{', '.join(map(str, others))} and {last}" if others else str(last)
    )


def read_config(path: Path | str | RunAt) -> RunConfig:
    """Return the configuration of the run in ``path``.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: the file is no configuration.
    """
    path = run_at(path).folder
    file = path / "config.json"
    if not file.is_file():
        what = f"it has no {file.name}" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is not a run folder: {what}")
    return configs.loads(RunConfig, file.read_text(), name=str(file))


def load(path: Path | str | RunAt) -> tuple[nn.Module, RunConfig]:
    """Return the model of a run (its moving average if it keeps one) and its configuration.

    The model is in evaluation mode, on the device and in the arithmetic chosen for this machine.

    Args:
        path: a run folder, with ``@600``, ``@best`` or ``@last`` for one of its checkpoints (:func:`run_at`).

    Raises:
        FileNotFoundError: ``path`` is no run folder, or holds no complete checkpoint.
        ValueError: there is no such checkpoint, or its weights are not finite.
    """
    config = read_config(path)
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    model = build_model(config, policy)
    model.load_state_dict(weights(path, "model."))
    return model.to(policy.device).eval(), config


def load_objective(path: Path | str | RunAt) -> tuple[Any, RunConfig]:
    """Return the objective of a run with its trained weights (averaged ones if it keeps them), and its configuration.

    It is in evaluation mode, on the device and in the arithmetic chosen for this machine. It was
    built without data and other runs: it can sample, but need not be able to train.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    config = read_config(path)
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    objective = config.objective.build(build_model(config, policy))
    objective.load_state_dict(weights(path, ""))
    return objective.to(policy.device).eval(), config


def build_model(config: RunConfig, policy: Policy) -> nn.Module:
    """Return the network with fresh weights, which computes in the dtype of ``policy``."""
    model: object = config.model.build()
    if not isinstance(model, nn.Module):
        kind, found = type(config.model).__name__, type(model).__name__
        raise TypeError(f"model: {kind}.build() must return a torch.nn.Module, got {found}")
    model.compute_dtype = policy.dtype  # type: ignore[assignment]
    return model


def weights(path: Path | str | RunAt, prefix: str) -> dict[str, Any]:
    """The weights of a run whose names begin with ``prefix``, without it; averaged ones if there are any.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: there is no such checkpoint, or its weights are not finite.
    """
    run = run_at(path)
    saved = _read(run, ("objective", "ema"))
    if saved is None:
        raise FileNotFoundError(f"{run.folder} holds no complete checkpoint yet")
    found = _weights(saved, prefix)
    wrong = nonfinite(found)
    if wrong:
        finite = last_finite(run.folder)
        other = "no earlier one has finite ones" if finite is None else f"take {run.folder}@{finite}"
        raise ValueError(
            f"the run {run.folder} has diverged: at step {saved.step} {len(wrong)} of its {len(found)} weights are not "
            f"finite ({wrong[0]}); {other}"
        )
    return found


def last_finite(folder: Path) -> int | None:
    """Return the step of the newest checkpoint whose weights are finite, or None."""
    for path in reversed(_checkpoints(folder)):
        try:
            saved = checkpoint.load(path, parts=("objective", "ema"))
        except checkpoint.CheckpointError:
            continue
        if not nonfinite(_weights(saved, "")):
            return saved.step
    return None


def nonfinite(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of a state that hold anything that is not finite."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
    ]


def _weights(saved: checkpoint.Checkpoint, prefix: str) -> dict[str, Any]:
    state = saved.state
    weights, prefix = (state["objective"], prefix) if state["ema"] is None else (state["ema"], "module." + prefix)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
