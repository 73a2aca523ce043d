"""SwiGLU experts on tokens sorted by expert: no padding, no capacity, no token dropped.

The whole layer is one autograd function. Rows are gathered by expert, each expert's products run on its own rows, and
results are added back to their tokens; the backward pass does the same in reverse with the gate folded into the
hidden activation, so that nothing of size (choices, dim) is kept except the gathered input.

In bfloat16 torch's grouped product takes all experts at once. Elsewhere it gains nothing over a loop, and the loop goes
through a whole expert before the next: what lies between its products never leaves the processor's cache.

Shape suffixes: N tokens, K choices a token, S = N K sorted choices, E experts, R rows of one expert, D model size,
H hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.nn.feed_forward import swiglu_backward

_FEW = 16
"""Choices up to which a CPU loses more by sorting the tokens than by taking them one by one."""


class _Fused(torch.autograd.Function):
    """All experts at once, for bfloat16 with sizes that are multiples of 8 (rows of 16 bytes)."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, gate: Tensor, plan: tuple[Tensor, ...], *weights: Tensor) -> Tensor:
        order_s, token_s, ends_e = plan
        up_ehd, down_edh = (w.to(x_nd.dtype) for w in weights)
        x_sd = x_nd.index_select(0, token_s)
        gate_up = F.grouped_mm(x_sd, up_ehd.transpose(1, 2), offs=ends_e)
        gate_s1 = gate.flatten().index_select(0, order_s)[:, None].to(x_nd.dtype)
        first, second = gate_up.chunk(2, dim=-1)
        hidden_sh = F.silu(first).mul_(second)
        gated_sh = hidden_sh * gate_s1
        y_sd = F.grouped_mm(gated_sh, down_edh.transpose(1, 2), offs=ends_e)
        ctx.gates = gate.shape
        ctx.save_for_backward(x_sd, gate_up, hidden_sh, gated_sh, gate_s1, order_s, token_s, ends_e, *weights)
        return torch.zeros_like(x_nd).index_add_(0, token_s, y_sd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, gate_up, hidden_sh, gated_sh, gate_s1, order_s, token_s, ends_e, *weights = ctx.saved_tensors
        up_ehd, down_edh = (w.to(x_sd.dtype) for w in weights)
        grad_sd = grad_nd.contiguous().index_select(0, token_s)
        grad_down = F.grouped_mm(grad_sd.T, gated_sh, offs=ends_e).to(weights[1].dtype)
        grad_sh = F.grouped_mm(grad_sd, down_edh, offs=ends_e)
        grad_gate_s = torch.linalg.vecdot(grad_sh, hidden_sh)
        grad_gate_up = swiglu_backward(grad_sh.mul_(gate_s1), gate_up)
        grad_up = F.grouped_mm(grad_gate_up.T, x_sd, offs=ends_e).to(weights[0].dtype)
        grad_x = torch.zeros_like(grad_nd, memory_format=torch.contiguous_format)
        grad_x.index_add_(0, token_s, F.grouped_mm(grad_gate_up, up_ehd, offs=ends_e))
        return grad_x, _at_gates(grad_gate_s, order_s, ctx.gates), None, grad_up, grad_down


class _Loop(torch.autograd.Function):
    """Expert after expert, for every format."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, gate: Tensor, plan: tuple[Tensor, ...], *weights: Tensor) -> Tensor:
        order_s, token_s, ends_e = plan
        up_ehd, down_edh = (w.to(x_nd.dtype) for w in weights)
        ctx.sizes = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
        x_sd = x_nd.index_select(0, token_s)
        gate_s1 = gate.flatten().index_select(0, order_s)[:, None].to(x_nd.dtype)
        gate_up = x_nd.new_empty(x_sd.shape[0], up_ehd.shape[1])
        y_nd = torch.zeros_like(x_nd)
        by_expert = zip(*(t.split(ctx.sizes) for t in (x_sd, gate_s1, gate_up, token_s)), up_ehd, down_edh)
        for x_rd, gate_r1, gate_up_r, token_r, up_hd, down_dh in by_expert:
            torch.mm(x_rd, up_hd.T, out=gate_up_r)
            first, second = gate_up_r.chunk(2, dim=-1)
            y_nd.index_add_(0, token_r, torch.mm(F.silu(first).mul_(second).mul_(gate_r1), down_dh.T))
        ctx.gates = gate.shape
        ctx.save_for_backward(x_sd, gate_up, gate_s1, order_s, token_s, *weights)
        return y_nd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, gate_up, gate_s1, order_s, token_s, *weights = ctx.saved_tensors
        up_ehd, down_edh = (w.to(x_sd.dtype) for w in weights)
        grad_nd = grad_nd.contiguous()
        grad_x, grad_gate_s = torch.zeros_like(grad_nd), gate_s1.new_empty(gate_s1.shape[0])
        grad_up, grad_down = torch.empty_like(up_ehd), torch.empty_like(down_edh)
        rows = (t.split(ctx.sizes) for t in (x_sd, gate_up, gate_s1, grad_gate_s, token_s))
        for x_rd, gate_up_r, gate_r1, grad_gate_r, token_r, up_hd, down_dh, grad_up_hd, grad_down_dh in zip(
            *rows, up_ehd, down_edh, grad_up, grad_down
        ):
            grad_rd = grad_nd.index_select(0, token_r)
            first, second = gate_up_r.chunk(2, dim=-1)
            hidden_rh = F.silu(first).mul_(second)
            grad_rh = torch.mm(grad_rd, down_dh)
            torch.linalg.vecdot(grad_rh, hidden_rh, out=grad_gate_r)
            # An expert without a token gets a zero gradient: the product over no rows.
            torch.mm(grad_rd.T, hidden_rh.mul_(gate_r1), out=grad_down_dh)
            grad_gate_up = swiglu_backward(grad_rh.mul_(gate_r1), gate_up_r)
            torch.mm(grad_gate_up.T, x_rd, out=grad_up_hd)
            grad_x.index_add_(0, token_r, torch.mm(grad_gate_up, up_hd))
        grad_weights = (grad_up.to(weights[0].dtype), grad_down.to(weights[1].dtype))
        return grad_x, _at_gates(grad_gate_s, order_s, ctx.gates), None, *grad_weights


def _at_gates(grad_s: Tensor, order_s: Tensor, shape: torch.Size) -> Tensor:
    """Gradients of the sorted choices at their places in the gates, zero elsewhere."""
    return grad_s.new_zeros(shape.numel()).index_copy_(0, order_s, grad_s).view(shape)


def _few_choices(x_nd: Tensor, gate_nk: Tensor, chosen_nk: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Decode a few tokens on a CPU: expert after expert straight from its weights, without sorting or gathering."""
    y_nd = torch.zeros_like(x_nd)
    for x_d, y_d, gate_k, chosen_k in zip(x_nd.unbind(), y_nd.unbind(), gate_nk.tolist(), chosen_nk.tolist()):
        for gate, expert in zip(gate_k, chosen_k):
            first, second = torch.mv(w_up[expert].to(x_d.dtype), x_d).chunk(2)
            y_d.addmv_(w_down[expert].to(x_d.dtype), F.silu(first).mul_(second), alpha=gate)
    return y_nd


def _plan(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the choices in the gates, their tokens, and where each expert's choices end; sorted by expert."""
    if chosen.dtype == torch.bool:
        expert_s, token_s = chosen.T.nonzero().unbind(-1)
        order_s, counts_e = token_s * experts + expert_s, chosen.sum(0)
    else:
        flat = chosen.flatten()
        order_s, counts_e = torch.argsort(flat, stable=True), torch.bincount(flat, minlength=experts)
        token_s = torch.div(order_s, chosen.shape[1], rounding_mode="floor")
    return order_s, token_s, counts_e.cumsum(0).to(torch.int32)


def routed_experts(
    x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor, *, rms: float | None = None
) -> Tensor:
    """``y_n = sum over the chosen e of gate_ne * expert_e(x_n)`` for SwiGLU experts.

    Args:
        x_nd: tokens, ``(N, D)``, any float dtype; bfloat16 uses torch's grouped product when the sizes are multiples
            of 8, every other case a loop over experts.
        gate: weights of the choices, ``(N, K)``, or of all experts, ``(N, E)``.
        chosen: expert numbers ``(N, K)``, int64, or a mask ``(N, E)``: any number a token, none as well.
        w_up: gate and up weights ``(E, 2 H, D)``, gate first.
        w_down: ``(E, D, H)``.
        rms: root mean square that every expert's output is brought to; None leaves it as it is.

    Returns:
        ``(N, D)`` in the dtype of ``x_nd``. Differentiable once in ``x_nd``, ``gate`` and both weights.

    >>> x, w_up, w_down = torch.randn(5, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    >>> routed_experts(x, torch.ones(5, 2), torch.tensor([[0, 2]]).expand(5, 2), w_up, w_down).shape
    torch.Size([5, 4])
    """
    few = chosen.dtype != torch.bool and chosen.numel() <= _FEW and x_nd.device.type == "cpu"
    if few and rms is None and not torch.is_grad_enabled():
        return _few_choices(x_nd, gate, chosen, w_up, w_down)
    order_s, token_s, ends_e = _plan(chosen, w_up.shape[0])
    fused = x_nd.dtype == torch.bfloat16 and w_down.shape[1] % 8 == 0 and w_down.shape[2] % 8 == 0
    experts = _Fused if fused else _Loop
    if rms is None:
        y: Tensor = experts.apply(x_nd, gate, (order_s, token_s, ends_e), w_up, w_down)
        return y
    rows = torch.arange(token_s.numel(), device=x_nd.device)
    # Sorted rows of their own: each choice is a token with one expert, whose output can be seen before the gate.
    y_sd = experts.apply(x_nd[token_s], x_nd.new_ones(rows.numel(), 1), (rows, rows, ends_e), w_up, w_down)
    # The eps only keeps a dead expert's zero from being divided by zero.
    gated_sd = F.rms_norm(y_sd, y_sd.shape[-1:], eps=1e-12) * (rms * gate.flatten()[order_s, None]).to(x_nd.dtype)
    return torch.zeros_like(x_nd).index_add(0, token_s, gated_sd)
