"""The list of optimizers that earlier releases made of a configuration: a deprecated alias."""

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer


def build_optimizers(model: nn.Module, config: Any, *, process_group: Any = None) -> list[Optimizer]:
    """Return ``[config.build(model, process_group=process_group)]``, with a DeprecationWarning.

    Deprecated: ``config.build(model)`` makes one optimizer of all rules. This name goes with the next release.

    Raises:
        TypeError: ``config`` cannot build an optimizer.
    """
    warnings.warn(
        "build_optimizers(model, config) is deprecated; use config.build(model), which returns one optimizer",
        DeprecationWarning,
        stacklevel=2,
    )
    if not callable(getattr(config, "build", None)):
        raise TypeError(f"config must have a method build(model), as MuonConfig has, got {type(config).__name__}")
    optimizer: Optimizer = config.build(model, process_group=process_group)
    return [optimizer]
