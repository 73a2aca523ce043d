r"""Causal attention as a recurrent network that reads its past anew for every output (kexue.fm 10017).

For the output at ``i`` the tokens are read backwards, ``j = i, i-1, ..., 1``, into a state of constant size:

    ``(y, z) <- (y, z) + exp(q_i . k_j) (v_j, 1)``, started at ``(0, 0)``, and ``o_i = y / z``.

The exponential overflows (float32 at scores above 88), so the running maximum ``m`` of the scores is carried along and
the state rescaled whenever it grows (Milakov and Gimelshein, 1805.02867). Reading ``block`` tokens at a time gives the
arithmetic of FlashAttention (Dao et al., 2205.14135). All orders and block sizes give the same sums.

A stack of layers can be evaluated this way without a cache: every layer derives what it reads from the layer below,
again and again. `RecomputeStack` does so, with one state a layer, in time of order ``L^(N+1) / (N+1)!``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danlu._validate import integer, positive


def recurrent_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = 64, scale: float | None = None, stable: bool = True
) -> Tensor:
    """Causal softmax attention by the recurrence, ``block`` keys a step.

    Scores of ``block`` keys are all that is ever formed: memory is linear in the length. Sums are in float32 at least.
    Differentiable, any number of times.

    Args:
        q: queries ``(..., t, d)``; the last one sees every key, each earlier one a key less.
        k: keys ``(..., l, d)`` with ``l >= t``.
        v: values ``(..., l, e)``.
        block: keys read in a step; 1 is the recurrence token by token.
        scale: factor of the scores; None is ``1 / sqrt(d)``.
        stable: carry the running maximum; without it scores above 88 (float32) or 709 (float64) give NaN.

    Returns:
        ``(..., t, e)`` in the dtype of ``q``.

    Raises:
        ValueError: sizes that do not fit together, or a block below one.

    >>> q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> k = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
    >>> recurrent_attention(q, k, torch.tensor([[1.0], [2.0], [3.0]]), block=1, scale=1.0)
    tensor([[1.0000],
            [1.8808],
            [1.8453]])
    """
    integer("block", block)
    if min(q.dim(), k.dim(), v.dim()) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v must be (..., t, d), (..., l, d), (..., l, e), got {shapes}")
    queries, keys = q.shape[-2], k.shape[-2]
    if queries > keys:
        raise ValueError(f"there must be a key for every query, got {queries} queries and {keys} keys")
    if scale is not None:
        positive("scale", scale)
    dtype, offset = q.dtype, keys - queries
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(wide) * (scale or q.shape[-1] ** -0.5), k.to(wide), v.to(wide)
    shape = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    # States of the queries that have begun to read, each at its own key: from the last block to the first.
    first = queries
    m, z = q.new_empty((*shape, 0, 1)), q.new_empty((*shape, 0, 1))
    y = q.new_empty((*shape, 0, v.shape[-1]))
    for start in range((keys - 1) // block * block, -1, -block):
        end = min(start + block, keys)
        fresh, first = first - max(start - offset, 0), max(start - offset, 0)
        m = torch.cat((m.new_full((*shape, fresh, 1), -math.inf if stable else 0.0), m), dim=-2)
        y, z = (torch.cat((t.new_zeros((*shape, fresh, t.shape[-1])), t), dim=-2) for t in (y, z))
        scores = q[..., first:, :] @ k[..., start:end, :].mT
        ahead = (
            torch.arange(start, end, device=q.device) > torch.arange(first, queries, device=q.device)[:, None] + offset
        )
        scores = scores.masked_fill(ahead, -math.inf)
        if stable:  # the result does not depend on m, so neither does the gradient
            new = torch.maximum(m, scores.detach().amax(-1, keepdim=True))
            kept = (m - new).exp()
            m, y, z = new, y * kept, z * kept
        weight = (scores - m).exp()
        y, z = y + weight @ v[..., start:end, :], z + weight.sum(-1, keepdim=True)
    return (y / z).to(dtype)


class RecurrentLayer(NamedTuple):
    """One layer of a `RecomputeStack`: maps of a single position's vector ``h``, whose number is ``i``.

    Attributes:
        query: ``(h, i)`` to the query ``(..., d)``, leading dimensions being heads.
        key_value: ``(h, i)`` to the key ``(..., d)`` and the value ``(..., e)``.
        update: ``(h, o)`` to the layer's output, ``o`` ``(..., e)`` being the attention's.
    """

    query: Callable[[Tensor, int], Tensor]
    key_value: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    update: Callable[[Tensor, Tensor], Tensor]


class RecomputeStack:
    """Evaluate a stack of causal attention layers without keeping anything of the past.

    At any time one vector, one query and one state ``(y, z, m)`` a layer are held, however long the sequence. The price
    is time: each layer asks the one below for its whole past at every output.

    Args:
        layers: from the lowest up.
        scale: factor of the scores; None is ``1 / sqrt(d)``.

    Attributes:
        calls: evaluations of each level so far, the inputs first: `recompute_calls` after ``L`` outputs.

    >>> identity = RecurrentLayer(lambda h, i: h, lambda h, i: (h, h), lambda h, o: h + o)
    >>> stack = RecomputeStack([identity, identity])
    >>> outputs = list(stack.outputs(lambda i: torch.ones(2), 3))
    >>> outputs[2].tolist(), stack.calls
    ([4.0, 4.0], [10, 6, 3])
    """

    def __init__(self, layers: Sequence[RecurrentLayer], *, scale: float | None = None) -> None:
        if scale is not None:
            positive("scale", scale)
        self.layers, self.scale = tuple(layers), scale
        self.calls = [0] * (len(self.layers) + 1)

    def outputs(self, inputs: Callable[[int], Tensor], length: int) -> Iterator[Tensor]:
        """Yield the outputs at positions 0 to ``length - 1``.

        Args:
            inputs: gives the lowest layer's vector at a position; it is asked for each many times.
            length: number of outputs.
        """
        integer("length", length, low=0)
        for i in range(length):
            yield self._level(len(self.layers), inputs, i)

    def _level(self, level: int, inputs: Callable[[int], Tensor], i: int) -> Tensor:
        self.calls[level] += 1
        if level == 0:
            return inputs(i)
        layer = self.layers[level - 1]
        h = self._level(level - 1, inputs, i)
        q = layer.query(h, i)
        q = q * (self.scale or q.shape[-1] ** -0.5)
        k, y = layer.key_value(h, i)
        m, z = (q * k).sum(-1, keepdim=True), torch.ones_like(y[..., :1])
        for j in range(i - 1, -1, -1):
            k, v = layer.key_value(self._level(level - 1, inputs, j), j)
            score = (q * k).sum(-1, keepdim=True)
            new = torch.maximum(m, score)
            kept, weight = (m - new).exp(), (score - new).exp()
            m, y, z = new, y * kept + weight * v, z * kept + weight
        return layer.update(h, y / z)


def recompute_calls(layers: int, length: int) -> list[int]:
    """Evaluations of each level of a `RecomputeStack` for ``length`` outputs, the inputs first.

    The level ``m`` below the top is evaluated ``C(length + m, m + 1)`` times.

    >>> recompute_calls(4, 9)
    [1287, 495, 165, 45, 9]
    """
    integer("layers", layers, low=0)
    integer("length", length, low=0)
    return [math.comb(length + below, below + 1) for below in range(layers, -1, -1)]
