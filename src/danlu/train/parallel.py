"""One way from a model on one process to a model on many: PyTorch's own sharding (FSDP2), experts, recomputation.

Processes form a grid of ``replicas x shards``. A copy of the weights is cut among the shards of a row, as DTensors;
gradients are summed over the row while they are cut again, then over the replicas. Whole copies on every process (data
parallelism) are the grid of one column, so that there is one way for all of them. The loop divides by what all
processes counted together, which leaves no factor to get wrong for parameters that not all processes hold alike.

Experts can be cut among neighbouring processes instead: each keeps some of them, and tokens go to where theirs are
(:mod:`danlu.nn.exchange`).

Sources: Zhao et al., "PyTorch FSDP", arXiv:2304.11277; Lepikhin et al., "GShard", arXiv:2006.16668, section 3.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu._validate import integer, literals
from danlu.nn.exchange import is_cut
from danlu.nn.moe import MoE
from danlu.optim._sharded import local
from danlu.protocols import HasBlocks, SwapsWeights
from danlu.train.device import Policy
from danlu.train.distributed import World, world

__all__ = ["Mesh", "ParallelConfig", "blocks_of", "parallelize"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share a model.

    Attributes:
        replicas: whole copies of the weights; each is cut among ``processes / replicas`` of the processes. None: as
            many as there are processes, which then hold all of it, the fastest where it fits.
        experts: neighbouring processes that share the experts of a layer; 1: the experts are placed like other weights.
        recompute: what runs its forward pass again in the backward pass instead of keeping its activations, also on one
            process.
        reduce: dtype in which gradients are added up between processes.
        compile: what is compiled by itself, also on one process; ``train.compile`` is about the whole objective.
    """

    replicas: int | None = None
    experts: int = 1
    recompute: Literal["none", "blocks"] = "none"
    reduce: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["none", "blocks"] = "none"

    def __post_init__(self) -> None:
        if self.replicas is not None:
            integer("replicas", self.replicas)
        integer("experts", self.experts)
        literals(self)

    def grid(self, processes: int) -> tuple[int, int]:
        """Return ``(replicas, shards)`` for so many processes.

        Raises:
            ValueError: they do not divide the processes.

        >>> ParallelConfig(replicas=2).grid(8), ParallelConfig().grid(8)
        ((2, 4), (8, 1))
        """
        replicas = processes if self.replicas is None else self.replicas
        for name, value in (("replicas", replicas), ("experts", self.experts)):
            if processes % value:
                number = "1 process" if processes == 1 else f"{processes} processes"
                raise ValueError(f"train.parallel.{name} must divide the {number} of the run, got {value}")
        return replicas, processes // replicas


@dataclass(frozen=True)
class Mesh:
    """How the processes of a run share its work; a process alone is the mesh of one.

    Attributes:
        world: this process and how many there are; all of them share every batch.
        replicas: processes that hold equal parts of the weights.
        shards: processes that a copy of the weights is cut among.
        root: the module that PyTorch gathers and reduces; None on one process.
        own: parameters that are placed by hand, whose gradients the loop adds up: experts that are cut among processes,
            and numbers, which nobody can cut.
    """

    world: World = World()
    replicas: int = 1
    shards: int = 1
    root: nn.Module | None = None
    own: tuple[nn.Parameter, ...] = field(default=(), repr=False)

    @property
    def copies(self) -> Any:
        """The processes that hold the same whole weights, among which work on them may be shared; None for none."""
        return dist.group.WORLD if self.world.size > 1 and self.shards == 1 else None

    def accumulate(self, *, last: bool) -> None:
        """Say before a micro-batch whether its backward pass is the last of the step, which adds up the processes'."""
        if self.root is not None:
            self.root.set_requires_gradient_sync(last)  # type: ignore[operator]

    def release(self, module: nn.Module) -> None:
        """Forget the weights that a pass without gradients has gathered: they are old as soon as a step is taken."""
        if self.root is not None:
            for part in module.modules():
                if hasattr(part, "reshard"):
                    part.reshard()  # type: ignore[operator]

    def reduce_own(self) -> None:
        """Add up the gradients that PyTorch does not, over the processes that hold the same parameters."""
        by_group: dict[Any, list[Tensor]] = {}
        for parameter in self.own:
            group = parameter.device_mesh.get_group(0) if is_cut(parameter) else dist.group.WORLD  # type: ignore[attr-defined]
            if dist.get_world_size(group) > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_group.setdefault(group, []).append(local(parameter.grad))
        for group, grads in by_group.items():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=group)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(total.view_as(grad))


def parallelize(objective: nn.Module, config: ParallelConfig, policy: Policy) -> Mesh:
    """Place ``objective`` on the processes of this run, in place; call it before the optimizer is made.

    On one process nothing happens but what ``recompute`` and ``compile`` ask for. Every process passes the same
    weights, whole, and keeps its part.

    Args:
        objective: the module that the loop calls, its weights on ``policy.device``.
        config: how.
        policy: arithmetic; weights that are cut are gathered in its dtype.

    Raises:
        ValueError: the processes cannot be divided so, or the experts among them.

    >>> from danlu.train.device import choose
    >>> parallelize(nn.Linear(2, 3), ParallelConfig(), choose("float32", device="cpu")).shards
    1
    """
    place = world()
    replicas, shards = config.grid(place.size)
    blocks = list(blocks_of(objective))
    if isinstance(objective, SwapsWeights):
        if config.recompute == "blocks":
            kind = type(objective).__name__
            raise ValueError(f"train.parallel.recompute must be 'none' for {kind}, which swaps a network's weights")
        blocks = []
    experts = _cut_experts(objective, config.experts) if config.experts > 1 else ()
    for block in blocks:
        if config.recompute == "blocks":
            _recompute(block)
        if config.compile == "blocks":
            block.compile()
    if place.size == 1:
        return Mesh()
    own = (*experts, *(parameter for parameter in objective.parameters() if parameter.dim() == 0))
    # Whole copies are gathered and reduced at once: nothing is won by blocks but an overlap, and hooks inside a network
    # are in the way of whatever an objective does with it.
    _shard(objective, blocks if shards > 1 else [], (replicas, shards), config, policy, set(own))
    return Mesh(place, replicas, shards, objective, tuple(p for p in own if p.requires_grad))


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of every network in ``module`` that says which they are (:class:`danlu.protocols.HasBlocks`)."""
    seen: set[int] = set()
    for part in module.modules():
        # Other things are called blocks as well.
        blocks = part.blocks if isinstance(part, HasBlocks) else ()
        for block in blocks if isinstance(blocks, Iterable) else ():
            if isinstance(block, nn.Module) and id(block) not in seen:
                seen.add(id(block))
                yield block


def _recompute(block: nn.Module) -> None:
    from torch.distributed._composable.checkpoint_activation import checkpoint

    checkpoint(block)


def _shard(
    objective: nn.Module,
    blocks: list[nn.Module],
    grid: tuple[int, int],
    config: ParallelConfig,
    policy: Policy,
    ignored: set[nn.Parameter],
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(policy.device.type, grid, mesh_dim_names=("replicas", "shards"))
    # Copies that are whole keep float32: the layers round where they compute, as on one process.
    gathered = policy.dtype if grid[1] > 1 and policy.dtype != torch.float32 else None
    reduced = None if config.reduce == "float32" and gathered is None else getattr(torch, config.reduce)
    mixed = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
    with torch.no_grad():
        for parameter in objective.parameters():
            if not parameter.is_contiguous():  # a kernel whose channels come last: they are cut in rows
                parameter.data = parameter.data.contiguous()
    for module in (*blocks, objective):
        fully_shard(module, mesh=mesh, mp_policy=mixed, ignored_params=ignored, reshard_after_forward=grid[1] > 1)
    register_fsdp_forward_method(objective, "evaluate")
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows no sum that is scaled on the way.
            module.set_force_sum_reduction_for_comms(policy.device.type == "cpu")


def _cut_experts(objective: nn.Module, count: int) -> tuple[nn.Parameter, ...]:
    """Keep of each layer's experts those of this process, as DTensors on a mesh ``(processes / count, count)``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layers = [module for module in objective.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"train.parallel.experts = {count} needs a model with experts, and this one has none")
    for layer in layers:
        if layer.config.num_experts % count:
            raise ValueError(
                f"train.parallel.experts must divide the {layer.config.num_experts} experts of a layer, got {count}"
            )
    device = layers[0].w_up.device.type
    mesh = init_device_mesh(device, (world().size // count, count), mesh_dim_names=("copies", "experts"))
    cut = []
    for layer in layers:
        for name in ("w_up", "w_down"):
            whole = getattr(layer, name)
            # Every process has the same weights: nothing is sent.
            part = distribute_tensor(whole.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            setattr(layer, name, parameter := nn.Parameter(part, requires_grad=whole.requires_grad))
            cut.append(parameter)
    return tuple(cut)
