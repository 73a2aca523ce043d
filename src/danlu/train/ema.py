"""An exponential moving average of the weights, evaluated in place of the weights themselves.

theta_ema <- d theta_ema + (1 - d) theta after every step, with d = min(decay, (1 + n) / (10 + n)) after n steps, so
that the first, poor weights are soon forgotten.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from danlu._validate import number
from danlu.optim._sharded import local

__all__ = ["averaged"]


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of ``module``; call its ``update_parameters(module)`` after each step.

    The averaged copy is ``.module``: its parameters are averages, its buffers the latest.

    Args:
        module: what is being trained, not yet compiled or wrapped.
        decay: in [0, 1); 0.999 averages over about the last thousand steps.

    Raises:
        ValueError: ``decay`` is outside [0, 1).

    >>> linear = nn.Linear(2, 2)
    >>> average = averaged(linear, 0.9)
    >>> average.update_parameters(linear)
    >>> torch.equal(average.module.weight, linear.weight)
    True
    """
    number("decay", decay, low=0, high=1, high_open=True)

    def update(averages: Any, current: Any, updates: Tensor | int) -> None:
        count = int(updates)  # a CPU buffer: reading it waits for nothing
        averages, current = ([local(tensor) for tensor in tensors] for tensors in (averages, current))
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + count) / (10 + count)))

    average = AveragedModel(module, multi_avg_fn=update)
    average.requires_grad_(False)
    return average
