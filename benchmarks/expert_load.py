"""What a trained run's load over its experts comes from: the draw, likeness of neighbours, documents, the biases.

Router scores of a trained model are collected once; from them follow the choices under any biases. Every figure is a
MaxVio, averaged over the layers.
"""

import statistics
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.loader import Batch, validation_batches
from danlu.nn import MoE
from danlu.nn.balance import max_violation
from danlu.nn.moe import GATES
from danlu.objectives import evaluate
from danlu.train.run import Assembly, restore

BATCHES, SLICES = 48, 4


def layers_of(parts: Assembly) -> list[MoE]:
    """The layers with experts."""
    return [module for module in parts.model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def scores_of(parts: Assembly, batches: Iterable[Batch]) -> list[Tensor]:
    """Router scores of every layer, ``(batches, tokens, experts)``."""
    layers = layers_of(parts)
    found: list[list[Tensor]] = [[] for _ in layers]

    def listen(layer: MoE, into: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
        def look(_: MoE, inputs: tuple[Tensor]) -> None:
            logits = F.linear(inputs[0].flatten(0, -2).float(), layer.router.float())
            into.append(GATES[layer.config.gate](logits))

        return layer.register_forward_pre_hook(look)

    handles = [listen(layer, into) for layer, into in zip(layers, found)]
    for batch in batches:
        parts.objective(batch)
    for handle in handles:
        handle.remove()
    return [torch.stack(into) for into in found]


def chosen(layer: MoE, scores: Tensor, bias: Tensor) -> Tensor:
    """Zeros and ones: which experts the tokens choose under these biases."""
    if layer.config.balance.thresholds:
        return (scores + bias > 0).float()
    return torch.zeros_like(scores).scatter_(-1, (scores + bias).topk(layer.config.top_k, -1).indices, 1.0)


def fitted(layer: MoE, scores: Tensor, steps: int = 150) -> Tensor:
    """Biases under which all of these tokens together load the experts evenly, up to a thousandth or two."""
    flat, bias = scores.flatten(0, 1), layer.balancer.bias.clone()
    for _ in range(steps):
        counts = chosen(layer, flat, bias).sum(0)
        wanted = len(flat) * layer.config.top_k / layer.config.num_experts
        bias -= 0.05 * (counts / wanted - 1)
    return bias


def slices(parts: Assembly, count: int) -> Iterator[Iterable[Batch]]:
    """Training documents in a random order, in portions of as many tokens as the validation text has."""
    train, size = parts.data.train, parts.data.manifest["validation_tokens"]
    documents = np.split(np.asarray(train.tokens), np.flatnonzero(train.tokens == train.end)[:-1] + 1)
    order = np.random.default_rng(0).permutation(len(documents))
    mixed = np.concatenate([documents[i] for i in order])
    for part in range(min(count, len(mixed) // size)):
        portion = mixed[part * size : (part + 1) * size]
        yield validation_batches(portion, end=train.end, length=train.length, batch=train.batch)


def explained(folder: Path) -> dict[str, float]:
    """Where the imbalance of a trained run comes from.

    * ``held_max_vio``: of training batches, with the biases as they are at the end;
    * ``held_shuffled_max_vio``: of as many tokens drawn from all of these batches. What lies between the two is the
      likeness of neighbouring tokens, which no bias of a whole expert can even out;
    * ``held_global_max_vio``: of all of these tokens together, what the biases leave;
    * ``fitted_max_vio``, ``fitted_shuffled_max_vio``: of batches under the best biases that there are for these tokens;
    * ``slices_max_vio``: of random training documents, as many tokens as the validation text has;
    * ``fitted_val_max_vio``: of the validation text under biases fitted to these documents: what is left is that its
      documents are others.
    """
    parts = restore(folder)
    layers = layers_of(parts)
    train = scores_of(parts, islice(parts.data.train, BATCHES))
    order = torch.randperm(train[0][..., 0].numel(), generator=torch.Generator().manual_seed(0))
    rows: dict[str, list[float]] = {}
    for layer, scores in zip(layers, train):
        mixed = scores.flatten(0, 1)[order].view_as(scores)
        for name, bias in (("held", layer.balancer.bias), ("fitted", fitted(layer, scores))):
            loads = chosen(layer, scores, bias).sum(1)
            figures = {
                f"{name}_max_vio": max_violation(loads).mean(),
                f"{name}_shuffled_max_vio": max_violation(chosen(layer, mixed, bias).sum(1)).mean(),
                f"{name}_global_max_vio": max_violation(loads.sum(0)),
            }
            for key, value in figures.items():
                rows.setdefault(key, []).append(value.item())
    found = {key: statistics.fmean(values) for key, values in rows.items()}

    documents = [scores_of(parts, part) for part in slices(parts, SLICES)]
    parted = [
        statistics.fmean(
            max_violation(chosen(layer, scores, layer.balancer.bias).sum((0, 1))).item()
            for layer, scores in zip(layers, part)
        )
        for part in documents
    ]
    found |= {"slices_max_vio": statistics.fmean(parted), "slices_max_vio_least": min(parted)}
    for number, layer in enumerate(layers):
        layer.balancer.bias.copy_(fitted(layer, torch.cat([part[number] for part in documents])))
    found["fitted_val_max_vio"] = evaluate(parts.objective, parts.data.validation(None))["val_max_vio"]
    return found


def noise_floor(experts: int, active: int, tokens: int, draws: int = 200) -> float:
    """MaxVio of a batch whose tokens choose evenly at random."""
    generator = torch.Generator().manual_seed(0)
    counts = [
        torch.rand(tokens, experts, generator=generator).topk(active, -1).indices.flatten().bincount(minlength=experts)
        for _ in range(draws)
    ]
    return max_violation(torch.stack(counts)).mean().item()
