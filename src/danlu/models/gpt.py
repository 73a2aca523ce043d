"""The plain GPT that everything else is compared with (Radford et al., 2019, as most training scripts write it).

Learned positions, LayerNorm before each layer, multi-head attention, a GELU network four times as wide, head tied to
the embedding. Every weight is drawn from N(0, 0.02^2), those that write to the residual stream from
N(0, 0.02^2 / (2 layers)). No biases.

Shape suffixes: b batch, t time, d model size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._validate import integer
from danlu.nn import GQA, GQAConfig, LayerCache, Linear, declare, layer_contexts
from danlu.nn.attention.masks import places_in_documents
from danlu.protocols import Context

_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}

    vocab_size: int = 4096
    """tokens; a recipe that trains its tokenizer sets this to the tokenizer's size"""
    dim: int = 256
    """model size"""
    layers: int = 4
    """blocks"""
    num_heads: int = 4
    """attention heads, a divisor of dim"""
    context: int = 1024
    """longest sequence: positions are learned one by one"""

    def build(self, **others: Any) -> "GPT":
        """Make the network with fresh weights."""
        return GPT(self)


class LayerNorm(nn.Module):
    """LayerNorm with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        declare(self, "weight", "gain")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., dim)``."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype))


class GPTBlock(nn.Module):
    """Attention and a GELU network, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c, out_std = config, _STD * (2 * config.layers) ** -0.5
        self.attention_norm, self.feed_forward_norm = LayerNorm(c.dim), LayerNorm(c.dim)
        self.attention = GQA(c.dim, GQAConfig(num_heads=c.num_heads, rope_dim=0), out_std=out_std)
        nn.init.normal_(self.attention.qkv.weight, std=_STD)
        self.up = Linear(c.dim, 4 * c.dim, std=_STD)
        self.down = Linear(4 * c.dim, c.dim, std=out_std)

    def forward(self, x_btd: Tensor, context: Context[LayerCache]) -> Tensor:
        """``(batch, time, dim)`` to the same."""
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), context)
        y: Tensor = x_btd + self.down(F.gelu(self.up(self.feed_forward_norm(x_btd)), approximate="tanh"))
        return y


class GPT(nn.Module):
    """Plain GPT; the methods are those of `danlu.models.Transformer`.

    Raises:
        ValueError: sizes that do not fit together, or a sequence beyond ``context``.

    >>> model = GPT(GPTConfig(vocab_size=11, dim=12, layers=2, num_heads=3, context=5))
    >>> model(torch.tensor([[1, 2, 3]])).shape, model.parameter_counts()
    (torch.Size([1, 3, 11]), (3708, 3708))
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "dim", "layers", "num_heads", "context"):
            integer(name, getattr(config, name))
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        declare(self, "embedding", "embedding")
        self.positions = nn.Parameter(torch.empty(config.context, config.dim))
        declare(self, "positions", "embedding")
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding and positions anew."""
        nn.init.normal_(self.embedding, std=_STD)
        nn.init.normal_(self.positions, std=_STD)

    @property
    def mixers(self) -> list[GQA]:
        """The attention of each block."""
        return [cast(GPTBlock, block).attention for block in self.blocks]

    @property
    def head_weight(self) -> Tensor:
        """``(vocab, dim)``: the embedding."""
        return self.embedding

    def hidden(
        self,
        tokens_bt: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states ``(batch, time, dim)``; arguments as in `Transformer.hidden`.

        ``positions`` are int64 with one axis; None: the tokens of each document are counted from zero.
        """
        start = cache[0].length if cache is not None else 0
        end = start + tokens_bt.shape[1]
        self._check_context(end)
        if positions is None and starts is not None:
            places = torch.arange(start, end, device=tokens_bt.device) - starts[:, None]
            placed = F.embedding(places, self.positions)
        elif positions is None and documents is not None:
            placed = F.embedding(places_in_documents(documents), self.positions)
        elif positions is None:
            placed = self.positions[start:end]
        else:
            placed = F.embedding(positions[..., 0], self.positions)
        x_btd = F.embedding(tokens_bt, self.embedding) + placed
        x_btd = x_btd.to(self.compute_dtype or x_btd.dtype)
        contexts = layer_contexts(self.mixers, x_btd, documents=documents, cache=cache, starts=starts)
        for block, context in zip(self.blocks, contexts):
            x_btd = block(x_btd, context)
        y: Tensor = self.norm(x_btd)
        return y

    def forward(
        self, tokens_bt: Tensor, *, documents: Tensor | None = None, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Logits ``(batch, time, vocab)``."""
        x_btd = self.hidden(tokens_bt, documents=documents, cache=cache)
        return F.linear(x_btd, self.head_weight.to(x_btd.dtype))

    def new_cache(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty caches, one per block, for ``batch`` sequences of up to ``capacity`` tokens.

        Raises:
            ValueError: more tokens than there are positions.
        """
        self._check_context(capacity)
        dtype, device = self.compute_dtype or self.embedding.dtype, self.embedding.device
        return [attention.new_cache(batch, capacity, dtype=dtype, device=device) for attention in self.mixers]

    def _check_context(self, tokens: int) -> None:
        if tokens > self.config.context:
            raise ValueError(f"this GPT has {self.config.context} positions (context), {tokens} are needed")

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, twice: every one works on every token."""
        total = sum(p.numel() for p in self.parameters())
        return total, total

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of training one token of a sequence of ``length`` tokens (1 where not given)."""
        return self.flops_per_token(length or 1)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a forward and a backward pass per token, as `Transformer.flops_per_token`."""
        linear = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "positions")
        attention = sum(attention.flops_per_token(length) for attention in self.mixers)
        return 6 * linear + 3 * float(attention)
