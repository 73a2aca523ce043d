r"""What a step costs on so many devices, in bytes and seconds: the cost model of ``danlu plan``, on plain numbers.

With P bytes of weights on R replicas of S shards each (N = R S processes), X processes that share the experts, and b
the bytes of the largest block's weights in the dtype they are gathered in:

    memory  = (weights + state + average) / S + batch + the larger of
              activations + weights outside of blocks, gathered, + b    when the loss turns round
              gradients / S + gathered                                  at the end (their sum with recomputation)
    gathered = 3 b + the weights outside of blocks, gathered, + b in the dtype gradients are added up in
               (where S = 1 and R > 1: all weights, which stay for the step)

    sent    = (S-1)/S (2 gathers + 1 reduction of P)  +  2 (R-1)/R (reduction of P / S)  +  4 (X-1)/X routed activations

    compute = max(operations / (share x rate) + bytes that other operations move / bandwidth, number of calls x launch)
    step    = max(compute, weights and gradients sent / link)  +  routed activations sent / link  +  the optimizer's

Activations and bytes moved come from `danlu.train.memory`, operations from the model's own count; recomputation adds a
forward pass, a third. The optimizer reads weights, gradients and state and writes weights and state; Muon's products
are divided among the processes. Links are those between machines as soon as a group of processes is larger than one.
What is not in it: latency, a kernel's own scratch memory, waiting for the slowest process, data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from danlu.train.devices import Device

__all__ = ["Estimate", "Pass", "Sizes", "candidates", "estimate"]

Recompute = Literal["none", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A micro-batch forward and backward: the most bytes alive in it, bytes moved beside products, and calls."""

    held: float
    moved: float
    calls: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the cost of a step depends on, of one process.

    Attributes:
        weights: bytes of all weights; gradients have as many.
        experts: bytes of them that belong to routed experts.
        block: bytes of the largest block's weights.
        outside: bytes of the weights outside of blocks.
        state: bytes of the optimizer's state.
        copies: averages of the weights that are kept.
        ratio: bytes of a weight as it is gathered over its bytes as it is kept.
        batch: bytes of the micro-batches of a step.
        accumulate: micro-batches of a step.
        alone: what a pass holds by the way of recomputing where weights are whole, gradients among it.
        cut: the same where weights are cut among processes, without gradients.
        operations: of a step, forward and backward.
        muon: operations of Muon's products in a step, of all processes together.
        routed: bytes of the activations that go to experts and come back, one way, in a step.
        num_experts: routed experts of a layer, 0 for none.
        items: what the loss is divided by, of all processes.
    """

    weights: float
    experts: float
    block: float
    outside: float
    state: float
    copies: int
    ratio: float
    batch: float
    accumulate: int
    alone: Mapping[Recompute, Pass]
    cut: Mapping[Recompute, Pass]
    operations: float
    muon: float
    routed: float
    num_experts: int
    items: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A way to divide the work, its memory in bytes a process, and its step in bytes and seconds."""

    replicas: int
    shards: int
    experts: int
    recompute: Recompute
    weights: float
    gradients: float
    state: float
    average: float
    activations: float
    gathered: float
    memory: float
    fits: bool
    sent: float
    compute_seconds: float
    sending_seconds: float
    optimizer_seconds: float
    seconds: float
    items_per_second: float
    mfu: float


def estimate(
    sizes: Sizes,
    device: Device,
    *,
    replicas: int = 1,
    shards: int = 1,
    experts: int = 1,
    recompute: Recompute = "none",
    reduced: float = 1.0,
) -> Estimate:
    """Return what one way to divide the work costs.

    Args:
        sizes: of the run, for a process's share of the batch.
        device: that every process has.
        replicas, shards, experts, recompute: as in ``ParallelConfig``.
        reduced: bytes of a gradient where it is added up, over its bytes as it is kept.
    """
    processes = replicas * shards
    common, routed = sizes.weights - sizes.experts, sizes.experts
    # Experts that are shared lie on their own processes, whole; otherwise they are cut as everything else is.
    weights = common / shards + routed / (experts if experts > 1 else shards)
    part = weights / sizes.weights
    way = (sizes.cut if shards > 1 else sizes.alone)[recompute]
    gradients = weights if shards > 1 else 0.0  # of whole weights they are in what a pass holds
    state, average = part * sizes.state, sizes.copies * weights
    own = sizes.block - (routed and experts > 1) * min(routed, sizes.block)  # experts at home are not gathered
    block = own * sizes.ratio
    outside = sizes.outside * sizes.ratio
    held = way.held
    if shards > 1:
        gathered = outside + 3 * block + own * reduced
        if recompute == "blocks":  # at the end of the backward pass, when a block is full again
            held += gradients + gathered
        else:  # when the loss turns round there are no gradients, and at the end no activations
            held = max(held + outside + block, gradients + gathered)
    else:  # whole copies are gathered as well, and stay for the step
        gathered = weights if processes > 1 else 0.0
        held += gathered
    memory = weights + state + average + sizes.batch + held

    travelling = common + (routed if experts == 1 else 0.0)
    inner = (shards - 1) / shards * travelling * (2 * sizes.ratio * sizes.accumulate + reduced)
    outer = 2 * (replicas - 1) / replicas * travelling / shards * reduced
    if experts > 1:
        copies = processes // experts
        outer += 2 * (copies - 1) / copies * routed / experts
    exchange = 4 * (experts - 1) / experts * sizes.routed

    inside = device.link if shards <= device.together else device.network
    between = device.link if processes <= device.together else device.network
    sending = inner / inside + outer / between
    exchanging = exchange / (device.link if experts <= device.together else device.network)
    operations = sizes.operations * (4 / 3 if recompute == "blocks" else 1)
    compute = operations / (device.share * device.flops) + sizes.accumulate * way.moved / device.bandwidth
    compute = max(compute, sizes.accumulate * way.calls * device.launch)
    stepped = (3 * weights + 2 * state) / device.bandwidth + sizes.muon / processes / (device.share * device.flops)
    seconds = max(compute, sending) + exchanging + stepped
    return Estimate(
        replicas=replicas,
        shards=shards,
        experts=experts,
        recompute=recompute,
        weights=weights,
        gradients=gradients,
        state=state,
        average=average,
        activations=way.held,
        gathered=gathered,
        memory=memory,
        fits=memory <= device.memory,
        sent=inner + outer + exchange,
        compute_seconds=compute,
        sending_seconds=sending + exchanging,
        optimizer_seconds=stepped,
        seconds=seconds,
        items_per_second=sizes.items / seconds,
        mfu=sizes.operations / seconds / device.flops,
    )


def candidates(sizes: Sizes, device: Device, processes: int, *, reduced: float = 1.0) -> list[Estimate]:
    """Return every way to divide the work among ``processes``, those that fit first, the fastest first.

    Of ways that do not fit the smallest come first.
    """
    found = [
        estimate(
            sizes,
            device,
            replicas=replicas,
            shards=processes // replicas,
            experts=experts,
            recompute=recompute,
            reduced=reduced,
        )
        for replicas in _divisors(processes)
        for experts in _divisors(processes)
        if experts == 1 or (sizes.num_experts and sizes.num_experts % experts == 0)
        for recompute in sizes.alone
    ]
    return sorted(found, key=lambda way: (not way.fits, way.seconds if way.fits else way.memory))


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)
