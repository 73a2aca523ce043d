"""What a run is going to do, in plain sentences, before it does it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu import optim
from danlu.train import rng
from danlu.train.device import Policy
from danlu.train.progress import duration
from danlu.train.trainer import Batch, TrainConfig

__all__ = ["EXPECTED_SHARE", "activation_bytes", "sentences", "state_bytes", "training_flops"]

EXPECTED_SHARE = 0.4
"""Share of the measured rate of matrix products that a training step is expected to reach; the run shows the truth."""


def activation_bytes(objective: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass of ``batch`` keeps for its backward pass, parameters not counted.

    One row of the batch is run and counted, and everything that it changed (buffers, random generators) is put back.
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
    generators, training = rng.snapshot(), objective.training
    objective.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective(row)
    finally:
        objective.train(training)
        rng.restore(generators)
        for buffer, before in buffers:
            buffer.copy_(before)
    return kept * rows


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Return the bytes that ``optimizers`` will keep between steps."""
    return sum(map(optim.state_bytes, optimizers))


def training_flops(model: nn.Module, data: Any) -> float | None:
    """Return the operations of training one of the units that the data consist of, by the network's own count.

    None for a network that does not count them.
    """
    length = getattr(data, "length", None)
    per_token = getattr(model, "flops_per_token", None)
    if per_token and length:
        return float(per_token(length))
    forward: Any = getattr(model, "flops", None)
    return None if forward is None else 3.0 * float(forward)  # the backward pass is two more of the forward one


def sentences(
    config: TrainConfig,
    *,
    model: nn.Module,
    objective: Any,
    optimizers: Sequence[Optimizer],
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
        objective: what is trained.
        optimizers: of the run.
        batch: one micro-batch of this process.
        policy: arithmetic and measured speed.
        processes: that share the work.
        flops: floating point operations of training a unit.
        manifest: what the data are; its ``unit`` is what the objective counts (tokens, images).
    """
    said = []
    data = manifest or {}
    if "source" in data:
        size = f", {data['bytes'] / 1e6:.2f} MB" if "bytes" in data else ""
        said.append(f"Data: {data['source']}{size}{_documents(data)}.")
        said += data.get("warnings", [])
    total = sum(p.numel() for p in model.parameters())
    counts = getattr(model, "parameter_counts", None)
    total, active = counts() if counts else (total, total)
    experts = f", of which {_count(active)} work on each token" if active != total else ""
    said.append(f"Model: {_count(total)} parameters{experts}.")
    a_step = int(objective.count(batch)) * config.accumulate * processes
    units = a_step * config.steps
    unit = data.get("unit", "tokens")
    held = data.get(f"train_{unit}")
    passes = f", {units / held:.1f} passes over the data" if held else ""
    said.append(f"Training: {config.steps:,} steps of {a_step:,} {unit}, {_count(units)} in all{passes}.")
    weights = sum(p.nbytes for p in objective.parameters())
    copies = 3 if config.ema is not None else 2  # weights, gradients, average
    memory = copies * weights + state_bytes(optimizers) + activation_bytes(objective, batch)
    size = f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:.0f} MiB"
    said.append(f"Memory: about {size} for weights, gradients, optimizer state and activations.")
    said.append(policy.sentence())
    if flops:
        seconds = flops * units / (EXPECTED_SHARE * policy.rate * processes)
        said.append(
            f"Time: about {duration(seconds)}, if {EXPECTED_SHARE:.0%} of the measured speed is reached; "
            "the line below soon knows better."
        )
    if config.compile:
        said.append("The first step compiles the model, which takes a minute or so.")
    return said


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
