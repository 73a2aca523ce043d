"""A gated state-space layer with the call and the cache of an attention layer.

``y = W_out (silu(g) * (K * u + skip u))`` with ``[u, g] = W_in x``: the convolution along time stands where attention
has its sum over positions. Training convolves with the kernel, decoding carries a state whose size does not depend on
how many tokens there were.

Shape suffixes: B batch, T time, H channels, D model size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._roles import declare
from danlu._validate import integer
from danlu.nn.attention.masks import places_in_documents, starts_of_documents
from danlu.nn.linear import Linear
from danlu.nn.ssm.blocks import Blocks, advance
from danlu.nn.ssm.convolution import causal_convolution, fast_length
from danlu.nn.ssm.rtf import RTFConfig
from danlu.nn.ssm.s4 import S4Config
from danlu.nn.ssm.s4d import S4DConfig
from danlu.protocols import Context

_BLOCK = 32
"""Tokens of a prompt that are taken at once"""


class Space(Protocol):
    """Linear state spaces, one a channel: what an `SSM` layer needs of its kernel, which is a ``torch.nn.Module``.

    What `step` and `blocks` take as ``system`` are constants that `system` forms from the weights once.
    """

    def kernel(self, length: int) -> Tensor:
        """Response to an impulse, ``(channels, length)``."""

    def system(self) -> tuple[Tensor, ...]:
        """Constants of the recurrence."""

    def new_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero state ``(batch, channels, ...)``."""

    def blocks(self, system: tuple[Tensor, ...], size: int) -> Blocks:
        """The recurrence over ``size`` tokens at once, a power of two."""

    def step(self, system: tuple[Tensor, ...], state: Tensor, u_bh: Tensor) -> tuple[Tensor, Tensor]:
        """One token: the new state and the output ``(batch, channels)``."""


class SpaceConfig(Protocol):
    """Configuration of state spaces."""

    def build(self, channels: int, **others: Any) -> Any:
        """Make ``channels`` independent ones; they fit `Space`."""


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """Sizes of an `SSM` layer."""

    kernel: S4DConfig | S4Config | RTFConfig | SpaceConfig = S4DConfig()
    """kind of the state space, and its sizes"""
    channels: int | None = None
    """independent state spaces, one a coordinate; None: as many as the model has dimensions"""

    def build(self, dim: int, *, out_std: float, **others: Any) -> "SSM":
        """Make the layer; see `danlu.protocols.MixerConfig`."""
        return SSM(dim, self, out_std=out_std * math.sqrt(dim / max(self.channels or dim, 1)))


class StateCache:
    """What a state-space layer remembers: a state of constant size, and how many tokens went into it.

    Args:
        state: ``(batch, channels, ...)``.
        system: the step's constants, formed from the weights once.
    """

    def __init__(self, state: Tensor, system: tuple[Tensor, ...]) -> None:
        self.state, self.system, self.length = state, system, 0
        self.blocks: Blocks | None = None

    def joined(self, others: Sequence["StateCache"], capacity: int) -> "StateCache":
        """Return the states of this cache and of ``others`` in one, whatever the number of tokens behind each."""
        caches = (self, *others)
        joined = StateCache(torch.cat([cache.state for cache in caches]), self.system)
        joined.blocks, joined.length = self.blocks, max(cache.length for cache in caches)
        return joined

    def elements(self) -> int:
        """Real numbers stored a sequence, whatever its length."""
        return self.state[0].numel() * (2 if self.state.is_complex() else 1)


def rows_of_documents(documents_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of packed rows goes when every document is given a row of its own.

    Args:
        documents_bt: document number of each token, ``(batch, time)``; a document is a run of equal numbers in a row.

    Returns:
        Row and column of each token, both ``(batch, time)``.

    >>> [t.tolist() for t in rows_of_documents(torch.tensor([[4, 4, 9], [4, 4, 4]]))]
    [[[0, 0, 1], [2, 2, 2]], [[0, 1, 0], [0, 1, 2]]]
    """
    starts = starts_of_documents(documents_bt)
    documents = starts.flatten().cumsum(0).view_as(documents_bt) - 1
    return documents, places_in_documents(documents_bt)


class SSM(nn.Module):
    """Gated state-space layer; takes an attention layer's place in a `danlu.models.Transformer`.

    The convolution runs in float32 (float64 for float64 input), whatever the activations' dtype.

    Args:
        dim: model size D.
        config: sizes.
        out_std: standard deviation of the output projection; None means ``1 / sqrt(channels)``.

    Raises:
        ValueError: a size that the kernel rejects.

    >>> layer = SSM(12, SSMConfig(kernel=S4DConfig(state=4)))
    >>> layer(torch.randn(2, 5, 12)).shape
    torch.Size([2, 5, 12])
    """

    rope_dim = 0
    """coordinates rotated by position: none, the state knows the order by itself"""
    mask = None
    """the state of each document starts empty, so that no mask is needed"""
    num_heads = 1

    def __init__(self, dim: int, config: SSMConfig | None = None, *, out_std: float | None = None) -> None:
        super().__init__()
        config = SSMConfig() if config is None else config
        self.channels = dim if config.channels is None else config.channels
        integer("channels", self.channels)
        self.project = Linear(dim, 2 * self.channels, split=(self.channels, self.channels))
        self.space: Space = config.kernel.build(self.channels)
        self.skip = nn.Parameter(torch.ones(self.channels))
        declare(self, "skip", "gain")
        self.out = Linear(self.channels, dim, std=out_std)

    def reset_parameters(self) -> None:
        """Set the skip connection to one (every other part has its own method)."""
        nn.init.ones_(self.skip)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> StateCache:
        """Zero state for ``batch`` sequences, in float32 at least; ``capacity`` tokens take no more room than one.

        The step's constants are formed from the weights here: a cache made before the weights change is out of date.
        """
        integer("capacity", capacity, low=0)
        state = self.space.new_state(batch, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return StateCache(state, self.space.system())

    def flops_per_token(self, length: int) -> float:
        """Operations of the convolution per token: two transforms of twice the length and the product of spectra."""
        size = fast_length(max(2 * length - 1, 2))
        return self.channels * (2 * 2.5 * size * math.log2(size) + 3 * size) / length

    def forward(self, x_btd: Tensor, context: Context[StateCache] | None = None) -> Tensor:
        """Mix along time.

        Args:
            x_btd: ``(batch, time, dim)``.
            context: ``documents``, each of which starts from an empty state, or the ``cache`` of earlier calls, which
                these tokens advance. Positions are not needed.

        Returns:
            ``(batch, time, dim)``.

        Raises:
            ValueError: documents together with a cache, or a mask: a state carries all of the past or none of it.
        """
        context = Context() if context is None else context
        documents, cache = context.documents, context.cache
        if context.mask is not None:
            raise ValueError("mask must be None for a state space, which carries all of the past or none of it")
        if documents is not None and cache is not None:
            raise ValueError("documents cannot be combined with a cache: a state holds one sequence")
        u_bth, gate_bth = self.project(x_btd).chunk(2, dim=-1)
        if u_bth.numel() == 0 and (cache is None or u_bth.shape[1] == 0):
            y_bth = u_bth  # no sequence, or no token of one: nothing to transform and nothing to step through
        else:
            y_bth = self._mix(u_bth, documents) if cache is None else self._advance(u_bth, cache)
        y_bth = torch.addcmul(y_bth, u_bth, self.skip.to(u_bth.dtype)) * F.silu(gate_bth)
        y: Tensor = self.out(y_bth)
        return y

    def _mix(self, u_bth: Tensor, documents: Tensor | None) -> Tensor:
        _, T, H = u_bth.shape
        if documents is None:
            return causal_convolution(u_bth.transpose(1, 2), self.space.kernel(T)).transpose(1, 2)
        row, column = rows_of_documents(documents)
        shape = (int(row[-1, -1]) + 1, int(column.max()) + 1, H)
        alone = u_bth.new_zeros(shape).index_put((row, column), u_bth)
        y = causal_convolution(alone.transpose(1, 2), self.space.kernel(shape[1]))
        return y.transpose(1, 2)[row, column]

    def _advance(self, u_bth: Tensor, cache: StateCache) -> Tensor:
        time = u_bth.shape[1]
        u = u_bth.to(cache.state.real.dtype)
        outputs = []
        for u_bh in u[:, : time % _BLOCK].unbind(1):
            cache.state, y_bh = self.space.step(cache.system, cache.state, u_bh)
            outputs.append(y_bh[:, None])
        if time >= _BLOCK:
            if cache.blocks is None:
                cache.blocks = self.space.blocks(cache.system, _BLOCK)
            cache.state, y_bth = advance(cache.blocks, cache.state, u[:, time % _BLOCK :])
            outputs.append(y_bth)
        cache.length += time
        return torch.cat(outputs, 1).to(u_bth.dtype)
