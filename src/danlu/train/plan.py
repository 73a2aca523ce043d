"""What a run is going to do, in plain sentences, before it does it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.optim import state_bytes
from danlu.protocols import Batch, CountsOperations, CountsParameters, Data
from danlu.train import rng
from danlu.train.config import TrainConfig
from danlu.train.contracts import check_first_batch
from danlu.train.device import Policy
from danlu.train.memory import pass_bytes
from danlu.train.progress import duration

__all__ = ["EXPECTED_SHARE", "activation_bytes", "sentences", "step_memory", "training_flops"]

EXPECTED_SHARE = 0.4
"""Share of the measured rate of matrix products that a training step is expected to reach; the run shows the truth."""


def activation_bytes(
    objective: nn.Module, batch: Batch, *, check: Callable[[Batch, Any], None] = lambda batch, loss: None
) -> int:
    """Return the bytes that a forward pass of ``batch`` keeps for its backward pass, parameters not counted.

    One row of the batch is run and counted, and everything that it changed (buffers, attributes, random generators) is
    put back.
    ``check`` is called with that row and its loss.
    """
    rows = len(next(iter(batch.values())))
    row = {key: value[:1] for key, value in batch.items()}
    seen = {tensor.untyped_storage().data_ptr() for tensor in objective.parameters()}
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    attributes = [(module, dict(vars(module))) for module in objective.modules()]
    generators = rng.snapshot()
    objective.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            check(row, objective(row))
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        rng.restore(generators)
        for buffer, numbers in buffers:
            buffer.copy_(numbers)
    return kept * rows


def step_memory(
    config: TrainConfig,
    objective: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    policy: Policy,
    *,
    check: Callable[[Batch, Any], None] = lambda batch, loss: None,
) -> int:
    """Return the bytes of all tensors at the fullest moment of a step, on one process.

    An objective that cannot run on tensors without numbers is counted by what its forward pass keeps.
    ``check`` is called with one row of the batch and its loss.
    """
    kept = activation_bytes(objective, batch, check=check)
    weights = sum(p.nbytes for p in objective.parameters())
    copies = 1 if config.ema is None else 2
    buffers = sum(b.nbytes for b in objective.buffers())
    batches = config.accumulate * sum(value.nbytes for value in batch.values())
    try:
        passed = pass_bytes(objective, batch, policy.device.type, accumulate=config.accumulate)
    except Exception:  # somebody else's objective may fail there in any way: it is only asked for its sizes
        passed = weights + kept
    return copies * (weights + buffers) + state_bytes(optimizer) + batches + passed


def training_flops(model: nn.Module, data: Data) -> float | None:
    """Return the floating-point operations of training one of what the loss is divided by, by the model's own count.

    None for a model that does not count them.
    """
    return model.training_flops(data.manifest.get("length")) if isinstance(model, CountsOperations) else None


def sentences(
    config: TrainConfig,
    *,
    model: nn.Module,
    objective: Any,
    optimizer: Optimizer,
    batch: Batch,
    policy: Policy,
    processes: int = 1,
    flops: float | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the plan of a run.

    Args:
        config: the loop.
        model: the network; ``parameter_counts()`` gives its total and active parameters if it has experts.
        objective: what is trained, a module that fits :class:`danlu.protocols.Objective`.
        optimizer: of the run.
        batch: one micro-batch of this process.
        policy: arithmetic and measured speed.
        processes: that share the work.
        flops: floating-point operations of training one of what the loss is divided by.
        manifest: what the data are.
    """
    said = []
    data = manifest or {}
    if "source" in data:
        size = f", {data['bytes'] / 1e6:.2f} MB" if "bytes" in data else ""
        said.append(f"Data: {data['source']}{size}{_documents(data)}.")
        said += data.get("warnings", [])
    total = sum(p.numel() for p in model.parameters())
    total, active = model.parameter_counts() if isinstance(model, CountsParameters) else (total, total)
    experts = f" ({_count(active)} active per token)" if active != total else ""
    said.append(f"Model: {_count(total)} parameters{experts}.")
    unit = objective.unit
    a_step = int(objective.denominator(batch)) * config.accumulate * processes
    items = None if config.steps is None else a_step * config.steps
    said.append(f"Training: {_extent(config)}, {a_step:,} {unit} per step{_in_all(items, unit, data)}.")
    memory = step_memory(config, objective, optimizer, batch, policy, check=partial(check_first_batch, objective))
    size = f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:.0f} MiB"
    said.append(f"Memory: about {size} for weights, gradients, optimizer state and activations.")
    said.append(policy.sentence())
    if flops and items and config.minutes is None:
        seconds = flops * items / (EXPECTED_SHARE * policy.rate * processes)
        said.append(f"Time: about {duration(seconds)} at {EXPECTED_SHARE:.0%} of the measured speed.")
    if config.compile:
        said.append("The first step compiles the model, which takes a minute or so.")
    return said


def _extent(config: TrainConfig) -> str:
    """How long the run is.

    >>> _extent(TrainConfig(steps=600)), _extent(TrainConfig(steps=600, minutes=8))
    ('600 steps', 'for 8 min 00 s, at most 600 steps')
    """
    if config.minutes is None:
        return f"{config.steps:,} steps"
    most = "" if config.steps is None else f", at most {config.steps:,} steps"
    return f"for {duration(60 * config.minutes)}{most}"


def _in_all(items: int | None, unit: str, data: Mapping[str, Any]) -> str:
    """What a run of known length goes through, and how often that is all of the data."""
    if items is None:
        return ""
    held = data.get(f"train_{unit}")
    passes = f" ({items / held:.1f} passes over the data)" if held else ""
    return f", {_count(items)} in all{passes}"


def _documents(data: Mapping[str, Any]) -> str:
    return f" in {data['documents']:,} document{'s' * (data['documents'] != 1)}" if "documents" in data else ""


def _count(number: float) -> str:
    """A count to three digits.

    >>> _count(950), _count(12_345), _count(12_345_678)
    ('950', '12.3 thousand', '12.3 million')
    """
    for size, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(int(number))
