"""SwiGLU experts on tokens sorted by expert: no padding, no capacity, no token dropped.

The whole layer is one autograd function. Rows are gathered by expert, each expert's products run on its own rows, and
results are added back to their tokens; the backward pass gathers again and does the same in reverse with the gate
folded into the hidden activation, so that nothing of a choice is kept but its gate and up activations.

A CPU goes through a few experts at a time, so that what lies between their products never leaves its caches and no
large temporary is made of fresh memory. In bfloat16 torch's grouped product takes these experts at once, elsewhere it
gains nothing over a loop. Weights of another dtype are converted where they are used.

Shape suffixes: N tokens, K choices per token, S = N K sorted choices, E experts, G experts of one part, R rows of one
part, D model size, H hidden size.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._autograd import Fused, compiling_plainly, device_type, ordinary

_FEW = 16
"""Choices up to which a CPU loses more by sorting the tokens than by taking them one by one."""

_PART = 2 << 20
"""Bytes of gate and up activations that a CPU works on at a time."""


class _Part(NamedTuple):
    """Neighbouring experts and their rows: the sizes for a loop, the ends for torch's grouped product."""

    experts: slice
    rows: slice
    sizes: list[int]
    ends_g: Tensor
    grouped: bool

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Rows times the matrix of their expert: ``(R, .)`` and ``(G, ., .)``."""
        if self.grouped:
            return F.grouped_mm(left, right, offs=self.ends_g)
        result = left.new_empty(left.shape[0], right.shape[2])
        for first, second, to in zip(left.split(self.sizes), right, result.split(self.sizes)):
            torch.mm(first, second, out=to)
        return result

    def outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Expert by expert the product over its rows, ``(., R)`` and ``(R, .)``, into ``out`` of any dtype."""
        if not self.sizes:
            out.copy_(F.grouped_mm(left, right, offs=self.ends_g))
            return
        for first, second, to in zip(left.split(self.sizes, 1), right.split(self.sizes), out):
            # Over no rows this is zero: the gradient of an expert without a token.
            if to.dtype == left.dtype:
                torch.mm(first, second, out=to)
            else:
                to.copy_(torch.mm(first, second))


def _parts(ends_e: Tensor, rows: int, row_bytes: int, grouped: bool) -> Iterator[_Part]:
    """Cut the experts where a part's rows would exceed `_PART`; one part on a GPU, without waiting for the sizes."""
    experts = len(ends_e)
    # Of meta tensors nobody knows: every expert has the same share.
    ends: list[int] = [rows * e // experts for e in range(1, experts + 1)] if ends_e.is_meta else []
    if device_type(ends_e) != "cpu":
        sizes = [] if grouped else [b - a for a, b in pairwise([0, *(ends or ends_e.tolist())])]
        yield _Part(slice(None), slice(None), sizes, ends_e, grouped)
        return
    ends, most = ends or ends_e.tolist(), max(_PART // row_bytes, 1)
    first = row = 0
    for last, end in enumerate(ends, 1):
        if last == len(ends) or ends[last] - row > most:
            sizes = [b - a for a, b in pairwise([row, *ends[first:last]])]
            yield _Part(slice(first, last), slice(row, end), sizes, ends_e[first:last] - row, grouped)
            first, row = last, end


def _dense(
    x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor, rms: float | None = None
) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen: no size depends on the routing."""
    if chosen.dtype == torch.bool:
        gate_ne = gate * chosen
    else:
        gate_ne = gate.new_zeros(gate.shape[0], w_up.shape[0]).scatter_add(1, chosen, gate)
    gate_en1 = gate_ne.T.unsqueeze(-1).to(x_nd.dtype)
    first, second = (x_nd @ w_up.to(x_nd.dtype).mT).chunk(2, dim=-1)
    if rms is None:
        return (F.silu(first) * second * gate_en1 @ w_down.to(x_nd.dtype).mT).sum(0)
    return (_to_norm(F.silu(first) * second @ w_down.to(x_nd.dtype).mT) * (rms * gate_en1)).sum(0)


def _to_norm(y: Tensor) -> Tensor:
    """Bring every output to root mean square 1; the eps keeps a dead expert's zero from being divided by zero."""
    return F.rms_norm(y, y.shape[-1:], eps=1e-12)


class _Experts(Fused):
    """Gate and up activations are kept, in one tensor a part; everything else is formed again."""

    products = True

    @staticmethod
    def plain(x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        if not compiling_plainly():
            return _dense(x_nd, gate, chosen, w_up, w_down)
        y: Tensor = _opaque(x_nd, gate, chosen, w_up, w_down)[0]
        return y

    @staticmethod
    def fast(ctx: Any, x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, ...]:
        gate_s1, order_s, token_s = _sorted(ctx, x_nd, gate, chosen, w_up, w_down)
        dtype = x_nd.dtype
        y_nd, kept = torch.zeros_like(x_nd), []
        for part in ctx.parts:
            token_r = token_s[part.rows]
            up_gdh, down_ghd = (w[part.experts].to(dtype).transpose(1, 2) for w in (w_up, w_down))
            gate_up = part.product(x_nd.index_select(0, token_r), up_gdh)
            first, second = gate_up.chunk(2, dim=-1)
            hidden_rh = F.silu(first).mul_(second).mul_(gate_s1[part.rows])
            y_nd.index_add_(0, token_r, part.product(hidden_rh, down_ghd))
            kept.append(gate_up)
        return y_nd, gate_s1, order_s, token_s, *kept

    @staticmethod
    def derivative(ctx: Any, grad: Tensor, inputs: Sequence[Any], saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        x_nd, gate, _, w_up, w_down = inputs
        gate_s1, order_s, token_s, *kept = saved
        grad_nd = grad.contiguous()
        grad_x, grad_gate_s = torch.zeros_like(grad_nd), gate_s1.new_empty(gate_s1.shape[0])
        grad_up, grad_down = torch.empty_like(w_up), torch.empty_like(w_down)
        for part, gate_up in zip(ctx.parts, kept):
            token_r, gate_r1 = token_s[part.rows], gate_s1[part.rows]
            up_ghd, down_gdh = (w[part.experts].to(x_nd.dtype) for w in (w_up, w_down))
            grad_rd = grad_nd.index_select(0, token_r)
            first, second = gate_up.chunk(2, dim=-1)
            silu = F.silu(first)
            hidden_rh = silu * second
            grad_rh = part.product(grad_rd, down_gdh)
            torch.linalg.vecdot(grad_rh, hidden_rh, out=grad_gate_s[part.rows])
            part.outer(grad_rd.T, hidden_rh.mul_(gate_r1), grad_down[part.experts])
            grad_gate_up = torch.empty_like(gate_up)
            grad_first, grad_second = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_rh.mul_(gate_r1), silu, out=grad_second)
            torch.ops.aten.silu_backward.grad_input(grad_rh.mul_(second), first, grad_input=grad_first)
            part.outer(grad_gate_up.T, x_nd.index_select(0, token_r), grad_up[part.experts])
            grad_x.index_add_(0, token_r, part.product(grad_gate_up, up_ghd))
        return grad_x, _at_gates(grad_gate_s, order_s, gate.shape).to(gate.dtype), None, grad_up, grad_down


@torch.library.custom_op("danlu::experts", mutates_args=())
def _opaque(x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Call `_Experts.fast` where a compiler cannot look inside, with what it keeps in one tensor.

    The rows of a mask's choices are as many as their numbers say: there nothing is kept, and the pass is run again.
    """
    if not x_nd.numel():
        return torch.zeros_like(x_nd), x_nd.new_empty(0, w_up.shape[1])
    y_nd, _, _, _, *kept = _Experts.fast(SimpleNamespace(), x_nd, gate, chosen, w_up, w_down)
    return y_nd, x_nd.new_empty(0, w_up.shape[1]) if chosen.dtype == torch.bool else torch.cat(kept)


@_opaque.register_fake
def _(x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    rows = 0 if chosen.dtype == torch.bool else chosen.numel()
    return torch.empty_like(x_nd), x_nd.new_empty(rows, w_up.shape[1])


@torch.library.custom_op("danlu::experts_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor, x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not x_nd.numel():
        return torch.zeros_like(x_nd), torch.zeros_like(gate), torch.zeros_like(w_up), torch.zeros_like(w_down)
    ctx = SimpleNamespace()
    if chosen.dtype == torch.bool:
        _, *kept = _Experts.fast(ctx, x_nd, gate, chosen, w_up, w_down)
    else:
        plan = _sorted(ctx, x_nd, gate, chosen, w_up, w_down)
        kept = [*plan, *(rows[part.rows] for part in ctx.parts)]
    inputs = (x_nd, gate, chosen, w_up, w_down)
    grad_x, grad_gate, _, grad_up, grad_down = _Experts.derivative(ctx, grad, inputs, kept)
    return grad_x, grad_gate, grad_up, grad_down  # type: ignore[return-value]


@_opaque_backward.register_fake
def _(
    grad: Tensor, x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        gate.new_empty(gate.shape),
        torch.empty_like(w_up),
        torch.empty_like(w_down),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, grad_gate, grad_up, grad_down = _opaque_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_gate, None, grad_up, grad_down


_opaque.register_autograd(_gradients, setup_context=_keep)


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
        order_s = torch.argsort(flat, stable=True)
        if flat.device.type == "cpu":
            counts_e = torch.bincount(flat, minlength=experts)
        else:  # where a bincount waits to see its largest number
            counts_e = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
        token_s = torch.div(order_s, chosen.shape[1], rounding_mode="floor")
    return order_s, token_s, counts_e.cumsum(0).to(torch.int32)


def _sorted(
    ctx: Any, x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, places and tokens of the choices, sorted by expert; the parts to work in on ``ctx``."""
    order_s, token_s, ends_e = _plan(chosen, w_up.shape[0])
    dtype, (_, dim, hidden) = x_nd.dtype, w_down.shape
    # Rows of the grouped product are multiples of 16 bytes.
    grouped = dtype == torch.bfloat16 and dim % 8 == 0 and hidden % 8 == 0
    ctx.parts = list(_parts(ends_e, order_s.numel(), 2 * hidden * dtype.itemsize, grouped))
    return gate.flatten().index_select(0, order_s)[:, None].to(dtype), order_s, token_s


def routed_experts(
    x_nd: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor, *, rms: float | None = None
) -> Tensor:
    """``y_n = sum over the chosen e of gate_ne * expert_e(x_n)`` for SwiGLU experts.

    Args:
        x_nd: tokens, ``(N, D)``, any float dtype; bfloat16 uses torch's grouped product when the sizes are multiples
            of 8, every other case a loop over experts. The weights may have another dtype, which their gradients keep.
        gate: weights of the choices, ``(N, K)``, or of all experts, ``(N, E)``.
        chosen: expert numbers ``(N, K)``, int64, or a mask ``(N, E)``: any number per token, none as well.
        w_up: gate and up weights ``(E, 2 H, D)``, gate first.
        w_down: ``(E, D, H)``.
        rms: root mean square that every expert's output is brought to; None leaves it as it is.

    Returns:
        ``(N, D)`` in the dtype of ``x_nd``, under ``torch.autocast`` in its dtype. Differentiable any number of times
        in ``x_nd``, ``gate`` and both weights; where a transform or an exporter looks on, and for the derivative of a
        derivative, every expert works on every token.

    >>> x, w_up, w_down = torch.randn(5, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    >>> routed_experts(x, torch.ones(5, 2), torch.tensor([[0, 2]]).expand(5, 2), w_up, w_down).shape
    torch.Size([5, 4])
    """
    plain = not ordinary(x_nd, gate, chosen, w_up, w_down)
    few = chosen.dtype != torch.bool and chosen.numel() <= _FEW and x_nd.device.type == "cpu"
    if few and rms is None and not torch.is_grad_enabled() and not plain and not torch.is_autocast_enabled("cpu"):
        return _few_choices(x_nd, gate, chosen, w_up, w_down)
    if rms is None:
        return _Experts.of(x_nd, gate, chosen, w_up, w_down)
    if compiling_plainly() and chosen.dtype != torch.bool:
        # Each choice is a token with one expert, whose output can be seen before the gate.
        times = chosen.shape[1]
        tokens_sd = x_nd.repeat_interleave(times, 0)
        y_sd = _Experts.of(tokens_sd, torch.ones_like(tokens_sd[:, :1]), chosen.view(-1, 1), w_up, w_down)
        gated_sd = _to_norm(y_sd) * (rms * gate.view(-1, 1)).to(y_sd.dtype)
        return gated_sd.view(-1, times, x_nd.shape[1]).sum(1)
    if plain:
        return _dense(x_nd, gate, chosen, w_up, w_down, rms)
    order_s, token_s, ends_e = _plan(chosen, w_up.shape[0])
    # The same on rows that are sorted already.
    expert_s = torch.repeat_interleave(torch.diff(ends_e, prepend=ends_e.new_zeros(1)), output_size=token_s.numel())
    y_sd = _Experts.of(x_nd[token_s], x_nd.new_ones(token_s.numel(), 1), expert_s[:, None], w_up, w_down)
    gated_sd = _to_norm(y_sd) * (rms * gate.flatten()[order_s, None]).to(y_sd.dtype)
    return torch.zeros_like(x_nd, dtype=y_sd.dtype).index_add(0, token_s, gated_sd)
