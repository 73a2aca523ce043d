r"""Experts cut among processes: tokens travel to the experts that they chose, and what these give travels back.

Each process has tokens of its own and a few of the experts of a layer, whole. A token is sent once to each process that
has experts of its choice, with its gates there; the experts' outputs are added up where they were computed, and one row
comes back. So a row is sent at most ``min(K, P)`` times each way, and not once a choice. Nothing is dropped, however
uneven the choices: the processes tell each other how many rows come, for which the host waits for the device once a
layer. The backward pass sends the same rows the other way.

Source: Lepikhin et al., "GShard", arXiv:2006.16668, section 3, without its capacity; a token goes to a group of experts
once, as in DeepSeek-V3, arXiv:2412.19437, section 3.2.

Shape suffixes as in `danlu.nn.grouped`; P processes, L experts of one of them, R rows that are sent, C rows that come.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu._autograd import autocasts, tangents
from danlu.nn.grouped import routed_experts

__all__ = ["exchanged_experts", "is_cut"]

_MESH_DIM = "experts"
"""Name of the last dimension of a mesh along which experts are cut."""


def is_cut(weight: Tensor) -> bool:
    """Say whether the experts of a layer are cut among processes: DTensors whose mesh ends in a dimension "experts".

    >>> is_cut(nn.Parameter(torch.ones(2)))
    False
    """
    if type(weight) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # until somebody has imported it there is none
    if module is None or not isinstance(weight, module.DTensor):
        return False
    return (weight.device_mesh.mesh_dim_names or ("",))[-1] == _MESH_DIM


@torch.compiler.disable(reason="how many rows travel is known when they do")  # type: ignore[untyped-decorator]
def exchanged_experts(
    x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Any, w_down: Any, *, rms: float | None = None
) -> Tensor:
    """Return what `danlu.nn.grouped.routed_experts` returns, for experts cut among processes.

    Every process along the mesh's last dimension calls it, as often as the others and with its own tokens, however few.
    Gradients of the weights are sums over the tokens of these processes.

    Args:
        x_nd: tokens ``(N, D)`` of this process.
        gate: weights of the choices, ``(N, K)``, or of all experts, ``(N, E)``.
        chosen: numbers of experts ``(N, K)``, or a mask ``(N, E)``.
        w_up: DTensor ``(E, 2 H, D)``, ``Shard(0)`` along the last dimension of its mesh, replicated along others.
        w_down: DTensor ``(E, D, H)``, likewise.
        rms: as in `routed_experts`.

    Raises:
        ValueError: the weights are placed in another way, or E is not a multiple of the processes.
        RuntimeError: under ``torch.func`` or in forward mode, where rows cannot travel.
    """
    if torch._C._are_functorch_transforms_active() or tangents((x_nd, gate)):
        raise RuntimeError(
            "experts that are cut among processes have no torch.func transforms and no forward mode: gather the "
            "weights (full_tensor) and use danlu.nn.grouped.routed_experts"
        )
    group = _group(w_up)
    if autocasts(x_nd.device.type) and x_nd.dtype != torch.float64:
        x_nd = x_nd.to(torch.get_autocast_dtype(x_nd.device.type))  # what the experts would do, before it is sent
    (tokens, _), processes, experts = x_nd.shape, dist.get_world_size(group), w_up.shape[0]
    gate_ne, chosen_ne = gate, chosen
    if chosen.dtype != torch.bool:
        gate_ne = gate.new_zeros(tokens, experts).scatter_add(1, chosen, gate)
        chosen_ne = torch.zeros_like(gate_ne, dtype=torch.bool).scatter_(1, chosen, True)
    local = experts // processes
    wanted_pn = chosen_ne.reshape(tokens, processes, local).any(-1).T
    going_p = wanted_pn.sum(1)
    coming_p = torch.empty_like(going_p)
    dist.all_to_all_single(coming_p, going_p, group=group)
    going, coming = torch.stack([going_p, coming_p]).tolist()
    process_r, token_r = torch.nonzero_static(wanted_pn, size=sum(going)).unbind(-1)  # process by process
    row_r = token_r * processes + process_r
    gates_rl = gate_ne.reshape(-1, local).index_select(0, row_r)
    chosen_rl = chosen_ne.reshape(-1, local).index_select(0, row_r)
    # Two tensors in one function: whatever order a backward pass takes, all processes send them in this one.
    x_cd, gates_cl = _Exchange.apply(going, coming, group, x_nd.index_select(0, token_r), gates_rl)
    chosen_cl = _exchange(chosen_rl.view(torch.uint8), going, coming, group).view(torch.bool)
    y_cd = routed_experts(x_cd, gates_cl, chosen_cl, w_up.to_local(), w_down.to_local(), rms=rms)
    (y_rd,) = _Exchange.apply(coming, going, group, y_cd)
    return torch.zeros_like(x_nd).index_add(0, token_r, y_rd)


def _group(weight: Any) -> Any:
    """The processes among which the experts are cut."""
    mesh, last = weight.device_mesh, weight.placements[-1]
    if not last.is_shard(0) or any(not p.is_replicate() for p in weight.placements[:-1]):
        raise ValueError(
            f"weights of experts must be placed as Shard(0) along the last dimension of their mesh and replicated "
            f"along others, got {weight.placements}"
        )
    experts, processes = weight.shape[0], mesh.size(mesh.ndim - 1)
    if experts % processes:
        raise ValueError(f"experts must be a multiple of the {processes} processes that share them, got {experts}")
    return mesh.get_group(mesh.ndim - 1)


def _exchange(rows: Tensor, going: Sequence[int], coming: Sequence[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(coming), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(coming), list(going), group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows sent and received, and their gradients the other way, any number of times."""

    @staticmethod
    def forward(ctx: Any, going: list[int], coming: list[int], group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.going, ctx.coming, ctx.group = going, coming, group
        return tuple(_exchange(rows, going, coming, group) for rows in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_Exchange.apply(ctx.coming, ctx.going, ctx.group, *grads)
