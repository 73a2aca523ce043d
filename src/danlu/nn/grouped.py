"""SwiGLU experts on tokens sorted by expert: no padding, no capacity, no token dropped.

The whole layer is one autograd function. Rows are gathered by expert, each expert's products run on its own rows, and
results are added back to their tokens; the backward pass does the same in reverse with the gate folded into the
hidden activation, so that nothing of size (choices, dim) is kept except the gathered input.

Shape suffixes: N tokens, K choices a token, S = N K sorted choices, E experts, D model size, H hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.nn.feed_forward import swiglu_backward

_FEW = 16
"""Choices up to which a CPU loses more by sorting the tokens than by taking them one by one."""


def _fused_products(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product serves: bfloat16 with rows that are multiples of 16 bytes."""
    return x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def _rows_by_expert(x_si: Tensor, w_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """``y_s = W_e(s) x_s``, ``(S, I) -> (S, O)``."""
    if _fused_products(x_si, *w_eoi.shape[1:]):
        return F.grouped_mm(x_si, w_eoi.transpose(1, 2), offs=ends_e)
    y_so = x_si.new_empty(x_si.shape[0], w_eoi.shape[1])
    start = 0
    for w_oi, end in zip(w_eoi, ends_e.tolist()):
        if end > start:
            torch.mm(x_si[start:end], w_oi.T, out=y_so[start:end])
        start = end
    return y_so


def _weight_gradient(grad_so: Tensor, x_si: Tensor, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
    """``dW_e = sum of grad_s x_s^T`` over the rows of expert ``e``: ``(E, O, I)``."""
    if _fused_products(x_si, grad_so.shape[1], x_si.shape[1]):
        return F.grouped_mm(grad_so.transpose(0, 1), x_si, offs=ends_e).to(dtype)
    grad_eoi = x_si.new_empty(ends_e.shape[0], grad_so.shape[1], x_si.shape[1])
    start = 0
    for grad_oi, end in zip(grad_eoi, ends_e.tolist()):
        # An expert without a token gets a zero gradient: the product over no rows.
        torch.mm(grad_so[start:end].T, x_si[start:end], out=grad_oi)
        start = end
    return grad_eoi.to(dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, gate_nk: Tensor, plan: tuple[Tensor, ...], *weights: Tensor) -> Tensor:
        order_s, token_s, ends_e = plan
        ctx.gates = gate_nk.shape
        up_ehd, down_edh = (w.to(x_nd.dtype) for w in weights)
        x_sd = x_nd.index_select(0, token_s)
        gate_up = _rows_by_expert(x_sd, up_ehd, ends_e)
        gate_s1 = gate_nk.flatten().index_select(0, order_s)[:, None].to(x_nd.dtype)
        first, second = gate_up.chunk(2, dim=-1)
        hidden_sh = F.silu(first).mul_(second)
        gated_sh = hidden_sh * gate_s1
        y_sd = _rows_by_expert(gated_sh, down_edh, ends_e)
        ctx.save_for_backward(x_sd, gate_up, hidden_sh, gated_sh, gate_s1, order_s, token_s, ends_e, *weights)
        return torch.zeros_like(x_nd).index_add_(0, token_s, y_sd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, gate_up, hidden_sh, gated_sh, gate_s1, order_s, token_s, ends_e, *weights = ctx.saved_tensors
        up_ehd, down_edh = (w.to(x_sd.dtype) for w in weights)
        grad_sd = grad_nd.contiguous().index_select(0, token_s)
        grad_down = _weight_gradient(grad_sd, gated_sh, ends_e, weights[1].dtype)
        grad_sh = _rows_by_expert(grad_sd, down_edh.transpose(1, 2), ends_e)
        grad_gate_s = torch.linalg.vecdot(grad_sh, hidden_sh)
        grad_gate_up = swiglu_backward(grad_sh.mul_(gate_s1), gate_up)
        grad_up = _weight_gradient(grad_gate_up, x_sd, ends_e, weights[0].dtype)
        grad_x = torch.zeros_like(grad_nd, memory_format=torch.contiguous_format)
        grad_x.index_add_(0, token_s, _rows_by_expert(grad_gate_up, up_ehd.transpose(1, 2), ends_e))
        grad_gate = grad_gate_s.new_zeros(ctx.gates).view(-1).index_copy_(0, order_s, grad_gate_s)
        return grad_x, grad_gate.view(ctx.gates), None, grad_up, grad_down


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
    y: Tensor
    if rms is None:
        y = _Experts.apply(x_nd, gate, (order_s, token_s, ends_e), w_up, w_down)
        return y
    rows = torch.arange(token_s.numel(), device=x_nd.device)
    # Sorted rows of their own: each choice is a token with one expert, whose output can be seen before the gate.
    y_sd = _Experts.apply(x_nd[token_s], x_nd.new_ones(rows.numel(), 1), (rows, rows, ends_e), w_up, w_down)
    # The eps only keeps a dead expert's zero from being divided by zero.
    gated_sd = F.rms_norm(y_sd, y_sd.shape[-1:], eps=1e-12) * (rms * gate.flatten()[order_s, None]).to(x_nd.dtype)
    return torch.zeros_like(x_nd).index_add(0, token_s, gated_sd)
