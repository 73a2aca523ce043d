"""Evaluation of an objective: the one place that switches modes, disables gradients and reduces over processes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from danlu.objectives.draws import numbered
from danlu.protocols import Batch, Measure, Objective

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """Measure an objective on batches, in evaluation mode and without gradients.

    With several processes each passes its own batches, and all get the results over all batches together; a measure
    without examples in any of them is left out. The module's training mode is restored. What an objective draws is a
    function of the number of an example (``batch["position"]``): where batches have none, each of n processes is taken
    to have every n-th row, as danlu's data give them, and the results are those of one process.

    Args:
        objective: a module that fits :class:`danlu.protocols.Objective`.
        batches: read once, on the module's device.

    Returns:
        The measures by name, ``val_loss`` among them.

    Raises:
        ValueError: the batches hold no targets.

    >>> from danlu.models import ConvNet, ConvNetConfig
    >>> from danlu.objectives import Classification
    >>> objective = Classification(ConvNet(ConvNetConfig(image_size=8, widths=(4,))))
    >>> batch = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([1, 2, 3])}
    >>> sorted(evaluate(objective, [batch]))
    ['val_accuracy', 'val_loss']
    """
    if not isinstance(objective, nn.Module):
        raise TypeError(f"objective must be a torch.nn.Module, got {type(objective).__name__}")
    rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    was_training = objective.training
    objective.eval()
    try:
        measures = objective.evaluate(numbered(batches, rank=rank, world=size))
        _check(objective, measures)
    finally:
        objective.train(was_training)
    if _several():
        # Sorted: every process reduces in the same order.
        measures = {name: _over_processes(measures[name]) for name in sorted(measures)}
    found = {name: value for name, measure in measures.items() if (value := measure.value()) is not None}
    if "val_loss" not in found:
        raise ValueError(f"batches must hold {objective.unit} to measure the loss on, got none")
    return found


def _check(objective: nn.Module, measures: object) -> None:
    kind = type(objective).__name__
    if not isinstance(measures, Mapping) or not all(isinstance(value, Measure) for value in measures.values()):
        raise TypeError(f"{kind}.evaluate must return danlu.protocols.Measure objects by name, got {measures!r:.60}")
    if "val_loss" not in measures:
        raise TypeError(f"{kind}.evaluate must measure val_loss, got {', '.join(measures) or 'nothing'}")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_processes(measure: Measure) -> Measure:
    total, denominator = measure.total.clone(), measure.denominator.clone()  # two measures may share a sum
    dist.all_reduce(total)
    dist.all_reduce(denominator)
    return replace(measure, total=total, denominator=denominator)
