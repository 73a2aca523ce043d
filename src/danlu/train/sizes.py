"""The sizes that a run's cost depends on, from its configuration alone: nothing of the model is allocated."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from danlu.nn import MoE
from danlu.optim import state_bytes
from danlu.optim.combined import CombinedOptimizer
from danlu.optim.muon import Muon
from danlu.protocols import Batch, CountsOperations, ExpectsSizes, ShowsBatch
from danlu.train.assembly import fitted
from danlu.train.config import RunConfig
from danlu.train.costs import Pass, Recompute, Sizes
from danlu.train.device import Policy
from danlu.train.load import build_model
from danlu.train.memory import trace_pass

__all__ = ["Planned", "sizes_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What a configuration makes, by its sizes: ``parameters`` and those in use per item, and the unit of items."""

    sizes: Sizes
    parameters: int
    active: int
    unit: str


def sizes_of(config: RunConfig, policy: Policy, *, processes: int, kind: str) -> Planned:
    """Return the sizes of a run on ``processes`` processes.

    The data are only opened if their configuration cannot show a batch.

    Args:
        config: of the run.
        policy: arithmetic; only its dtype counts.
        processes: that share the batch.
        kind: of device, "cuda" or "cpu".

    Raises:
        ValueError: a batch smaller than the processes, or an objective that cannot run on tensors without numbers.
    """
    if isinstance(config.data, ExpectsSizes):
        config = fitted(config, config.data.expected_sizes())
    batch = _batch(config, processes)
    rows = len(next(iter(batch.values())))
    with torch.device("meta"):
        model = build_model(config, policy)
        objective: Any = config.objective.build(model, batches=config.train.batches)
    optimizer = config.optim.build(objective, process_group=None)
    blocks = [block for part in objective.modules() for block in part._modules.get("blocks") or ()]
    weights = sum(p.nbytes for p in objective.parameters())
    sizes_of_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    ratio = policy.dtype.itemsize / 4
    experts = [module for module in objective.modules() if isinstance(module, MoE)]
    items = int(objective.denominator(batch)) * config.train.accumulate
    length = batch["tokens"].shape[1] if "tokens" in batch else None
    flops = model.training_flops(length) if isinstance(model, CountsOperations) else 6.0 * weights / 4
    total = sum(p.numel() for p in model.parameters())
    counts = getattr(model, "parameter_counts", None)
    total, active = (total, total) if counts is None else counts()
    alone: dict[Recompute, Pass] = {}
    cut: dict[Recompute, Pass] = {}
    ways: tuple[Recompute, ...] = ("none", "blocks") if blocks else ("none",)
    for way in ways:
        if way == "blocks":
            _recompute(blocks)
        alone[way] = _pass(objective, batch, kind, config.train.accumulate)
        cut[way] = _pass(objective, batch, kind, 1, weights=policy.dtype, keep_gradients=False)
    tokens = batch["tokens"].numel() if "tokens" in batch else rows
    return Planned(
        parameters=total,
        active=active,
        unit=objective.unit,
        sizes=Sizes(
            weights=weights,
            experts=sum(module.w_up.nbytes + module.w_down.nbytes for module in experts),
            block=max(sizes_of_blocks, default=0),
            outside=weights - sum(sizes_of_blocks),
            state=state_bytes(optimizer),
            copies=0 if config.train.ema is None else 1,
            ratio=ratio,
            batch=config.train.accumulate * sum(value.nbytes for value in batch.values()),
            accumulate=config.train.accumulate,
            alone=alone,
            cut=cut,
            operations=flops * items,
            muon=_muon_operations(optimizer),
            routed=config.train.accumulate
            * policy.dtype.itemsize
            * tokens
            * sum(module.config.top_k * module.w_down.shape[1] for module in experts),
            num_experts=min((module.config.num_experts for module in experts), default=0),
            items=items * processes,
        ),
    )


def _batch(config: RunConfig, processes: int) -> Batch:
    """A process's share of a batch."""
    if isinstance(config.data, ShowsBatch):
        batch = config.data.example()
    else:
        batch = next(config.data.open(seed=config.train.seed, rank=0, world=1).train)
    rows = len(next(iter(batch.values())))
    if rows % processes:
        raise ValueError(f"data.batch must be divisible by the {processes} processes, got {rows}")
    return {name: value[: rows // processes] for name, value in batch.items()}


def _pass(objective: nn.Module, batch: Batch, kind: str, accumulate: int, **options: Any) -> Pass:
    try:
        count = trace_pass(objective, batch, kind, accumulate=accumulate, **options)
    except (RuntimeError, NotImplementedError) as error:
        kind_of = type(objective).__name__
        raise ValueError(f"{kind_of} cannot be planned: it needs more than the sizes of a batch ({error})") from error
    passes = min(accumulate, 2)
    return Pass(held=count.peak, moved=count.moved / passes, calls=count.calls / passes)


def _recompute(blocks: list[nn.Module]) -> None:
    for block in blocks:
        inner = block.forward

        def forward(*inputs: Any, inner: Any = inner) -> Any:
            return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False)

        block.forward = forward


def _muon_operations(optimizer: Optimizer) -> float:
    """Operations of the matrix products of Muon's iteration: five steps of degree five on each matrix."""
    rules = optimizer.rules if isinstance(optimizer, CombinedOptimizer) else [optimizer]
    total = 0.0
    for rule in rules:
        if not isinstance(rule, Muon):
            continue
        for group in rule.param_groups:
            for parameter in group["params"]:
                *stack, m, n = parameter.shape
                small, large = min(m, n), max(m, n)
                total += (
                    torch.Size(stack).numel()
                    * len(rule.composition.coefficients)
                    * (4 * small**2 * large + 2 * small**3)
                )
    return total
