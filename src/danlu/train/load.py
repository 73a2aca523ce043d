"""From a run folder back to its configuration, model and objective."""

from pathlib import Path
from typing import Any

from torch import nn

from danlu import config as configs
from danlu.train import checkpoint
from danlu.train.config import RunConfig
from danlu.train.device import Policy, choose

__all__ = ["build_model", "load", "load_objective", "read_config", "weights"]


def read_config(path: Path | str) -> RunConfig:
    """Return the configuration of the run in ``path``.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: the file is no configuration.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        what = f"it has no {file.name}" if Path(path).is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is not a run folder: {what}")
    return configs.loads(RunConfig, file.read_text(), name=str(file))


def load(path: Path | str) -> tuple[nn.Module, RunConfig]:
    """Return the model of a run (its moving average if it keeps one) and its configuration.

    The model is in evaluation mode, on the device and in the arithmetic chosen for this machine.

    Raises:
        FileNotFoundError: ``path`` is no run folder, or holds no complete checkpoint.
    """
    path = Path(path)
    config = read_config(path)
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    model = build_model(config, policy)
    model.load_state_dict(weights(path, "model."))
    return model.to(policy.device).eval(), config


def load_objective(path: Path | str) -> tuple[Any, RunConfig]:
    """Return the objective of a run with its trained weights (averaged ones if it keeps them), and its configuration.

    It is in evaluation mode, on the device and in the arithmetic chosen for this machine. It was
    built without data and other runs: it can sample, but need not be able to train.

    Raises:
        FileNotFoundError: ``path`` is no run folder, or holds no complete checkpoint.
    """
    path = Path(path)
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


def weights(path: Path, prefix: str) -> dict[str, Any]:
    """The newest weights of a run whose names begin with ``prefix``, without it; averaged ones if there are any."""
    saved = checkpoint.load_latest(path, parts=("objective", "ema"))
    if saved is None:
        raise FileNotFoundError(f"{path} holds no complete checkpoint yet")
    state = saved.state
    weights, prefix = (state["objective"], prefix) if state["ema"] is None else (state["ema"], "module." + prefix)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
