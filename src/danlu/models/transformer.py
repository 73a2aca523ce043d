r"""Decoder-only Transformer assembled from ``danlu.nn``: attention or state spaces, experts or dense layers.

Pre-norm blocks ``x += attention(norm(x)); x += feed_forward(norm(x))``, a final norm and a linear head. With
`MLAConfig` and `MoEConfig` it is the architecture of DeepSeek-V3 (Hugging Face ``DeepseekV3ForCausalLM``), with
`GQAConfig` and no experts that of Llama. What mixes the tokens may differ from block to block: `SSMConfig` puts a state
space in attention's place, everywhere or in the blocks that ``mixers`` names.

Initialisation: every weight is normal with mean 0.

=====================================  =========================================
weight                                 standard deviation
=====================================  =========================================
embedding                              1 (tied: ``1 / sqrt(dim)``)
head                                   ``0.5 / sqrt(dim)``
maps that read the residual stream     ``1 / sqrt(fan_in)``
maps that write to it                  ``1 / sqrt(fan_in * 2 * layers)``
router                                 ``1 / sqrt(dim)``
norm gains                             constant 1
=====================================  =========================================

The depth factor keeps the variance of the residual stream at initialisation independent of the number of layers.

Shape suffixes: b batch, t time, d model size, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from danlu._roles import declaration
from danlu._validate import integer, positive
from danlu.nn import (
    FeedForward,
    GQAConfig,
    KVSharedConfig,
    Linear,
    MLAConfig,
    MoE,
    MoEConfig,
    RMSNorm,
    SquarePlusConfig,
    SSMConfig,
    declare,
    layer_contexts,
)
from danlu.nn.effective import effective_weight, is_plain
from danlu.protocols import ActivationConfig, Cache, Context, Mixer, MixerConfig

AnyMixerConfig = MLAConfig | GQAConfig | KVSharedConfig | SSMConfig | MixerConfig
"""The mixers of this package by their short names, or any other configuration of a mixer."""


_OF_A_MIXER = ("rope_dim", "mask", "num_heads", "flops_per_token", "new_cache")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a `Transformer`."""

    vocab_size: int = 4096
    """tokens; a recipe that trains its tokenizer sets this to the tokenizer's size"""
    dim: int = 256
    """model size"""
    layers: int = 6
    """blocks"""
    attention: AnyMixerConfig = MLAConfig()
    """what mixes the tokens: a kind of attention or a state space, and its sizes"""
    mixers: tuple[AnyMixerConfig | None, ...] = (None,)
    """a hybrid's pattern, repeated over the blocks: what mixes the tokens of each, None for ``attention``"""
    hidden: int = 704
    """width of the dense feed-forward layers"""
    activation: SquarePlusConfig | ActivationConfig | None = None
    """in the gate of the dense feed-forward layers; None: SiLU, the only one that experts have"""
    experts: MoEConfig | None = None
    """experts in place of the dense layers; None: dense everywhere"""
    dense_layers: int = 1
    """first blocks that stay dense when there are experts"""
    tied: bool = False
    """head and embedding share one matrix"""
    rope_base: float = 10000.0
    """period scale of the rotary positions"""
    norm_eps: float = 1e-6
    """added to the mean square in every norm (`MLAConfig.norm_eps` says otherwise for those of its latents)"""

    def build(self, **others: Any) -> "Transformer":
        """Make the network with fresh weights."""
        return Transformer(self)


def _check_mixer(layer: object, config: object) -> None:
    """Raise TypeError unless a layer has what `danlu.protocols.Mixer` names: better now than after training."""
    lacking = [name for name in _OF_A_MIXER if not hasattr(layer, name)]
    if lacking or not isinstance(layer, nn.Module):
        what = f"lacks {', '.join(lacking)}" if lacking else "is no torch.nn.Module"
        kind = type(layer).__name__
        raise TypeError(f"{type(config).__name__}.build() made a {kind}, which {what} (see danlu.protocols.Mixer)")


class Block(nn.Module):
    """One attention (or what stands in its place) and one feed-forward layer, each on a normalised residual stream."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        c = config
        depth = (2 * c.layers) ** -0.5
        self.attention_norm = RMSNorm(c.dim, eps=c.norm_eps)
        self.feed_forward_norm = RMSNorm(c.dim, eps=c.norm_eps)
        kind = c.mixers[index % len(c.mixers)] or c.attention
        self.attention: Mixer = kind.build(c.dim, out_std=depth / math.sqrt(c.dim), index=index, norm_eps=c.norm_eps)
        _check_mixer(self.attention, kind)
        self.feed_forward: MoE | FeedForward
        if c.experts is not None and index >= c.dense_layers:
            self.feed_forward = c.experts.build(c.dim, out_std=depth / math.sqrt(c.dim))
        else:
            self.feed_forward = FeedForward(
                c.dim, c.hidden, out_std=depth / math.sqrt(c.hidden), activation=c.activation
            )

    def forward(self, x_btd: Tensor, context: Context[Any]) -> Tensor:
        """``(batch, time, dim)`` to the same."""
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), context)
        normed = self.feed_forward_norm(x_btd)
        if context.real is not None and isinstance(self.feed_forward, MoE):
            return x_btd + cast(Tensor, self.feed_forward(normed, real=context.real))
        y: Tensor = x_btd + self.feed_forward(normed)
        return y


class Transformer(nn.Module):
    """Decoder-only Transformer; see the module for architecture and initialisation.

    ``compute_dtype`` is the dtype of the activations (None: that of the weights); weights keep their own.

    Raises:
        ValueError: sizes that do not fit together, naming the field.

    >>> config = TransformerConfig(vocab_size=11, dim=12, layers=2, hidden=8, attention=GQAConfig(num_heads=3))
    >>> model = Transformer(config)
    >>> model(torch.tensor([[1, 2, 3]])).shape, model.parameter_counts()
    (torch.Size([1, 3, 11]), (2052, 2052))
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        for name in ("vocab_size", "dim", "layers", "hidden"):
            integer(name, getattr(c, name))
        integer("dense_layers", c.dense_layers, low=0)
        positive("rope_base", c.rope_base)
        if None not in c.mixers[: c.layers]:
            raise ValueError(
                "mixers must leave a block to attention (None); for one kind everywhere set attention itself"
            )
        if c.experts is not None and c.activation is not None:
            raise ValueError("activation must be None with experts, whose gate is SiLU")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Parameter(torch.empty(c.vocab_size, c.dim))
        declare(self, "embedding", "embedding")
        self.blocks = nn.ModuleList(Block(c, index) for index in range(c.layers))
        self.norm = RMSNorm(c.dim, eps=c.norm_eps)
        self.head = None if c.tied else Linear(c.dim, c.vocab_size, std=0.5 * c.dim**-0.5, role="head")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embedding anew (every layer has its own method)."""
        nn.init.normal_(self.embedding, std=self.config.dim**-0.5 if self.config.tied else 1.0)

    @property
    def mixers(self) -> list[Mixer]:
        """What mixes the tokens in each block."""
        return [cast(Block, block).attention for block in self.blocks]

    @property
    def head_weight(self) -> Tensor:
        """``(vocab, dim)``: the weight that turns hidden states into logits."""
        if self.head is None:
            return self.embedding
        return effective_weight(self.head, self.config.dim, like=self.embedding)

    def hidden(
        self,
        tokens_bt: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Sequence[Cache] | None = None,
        positions: Tensor | None = None,
        prefix: int | Tensor | None = None,
        starts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states ``(batch, time, dim)``, before the head.

        Args:
            tokens_bt: token numbers, int64 ``(batch, time)``, or what is to stand in place of their embeddings,
                ``(batch, time, dim)``.
            documents: document number of each token, ``(batch, time)``; tokens see their own document only.
                None: each row is one document.
            cache: from `new_cache`; the tokens continue those stored in it.
            positions: rotary coordinates of these tokens, ``(time, axes)`` or ``(batch, time, axes)``, several axes in
                the interleaved layout of `danlu.nn.rotary_angles_nd`. None: the tokens are counted from zero.
            prefix: for layers with the mask "prefix", how many first tokens (of each document) all tokens see, or
                booleans ``(batch, time)`` that are True for such tokens; booleans and documents need a mask in memory.
            starts: for a cache of rows of unequal length, the place in it where each row begins, int64 ``(batch,)``;
                the tokens are then counted from there. None: the first.
            real: booleans ``(batch, time)``, False for tokens that are padding, which take no part in the balance of
                experts; None: there is none. Padding behind a text is seen by no token of it; in front of one, give it
                a document number of its own.

        Raises:
            ValueError: documents together with a cache, a shape that does not match, or positions or a prefix where
                no layer takes any.
        """
        given = tokens_bt.is_floating_point()
        if tokens_bt.dim() != 2 + given or (given and tokens_bt.shape[-1] != self.config.dim):
            shape = tuple(tokens_bt.shape)
            raise ValueError(f"tokens must be (batch, time), or (batch, time, {self.config.dim}) floats, got {shape}")
        time = tokens_bt.shape[1]
        if documents is not None and (cache is not None or documents.shape != tokens_bt.shape[:2]):
            raise ValueError("documents must have the shape of tokens, and cannot be combined with a cache")
        if positions is not None and (positions.dim() not in (2, 3) or positions.shape[-2] != time):
            raise ValueError(f"positions must be (time, axes) with time = {time}, got {tuple(positions.shape)}")
        x_btd = tokens_bt if given else nn.functional.embedding(tokens_bt, self.embedding)
        x_btd = x_btd.to(self.compute_dtype or x_btd.dtype)
        contexts = layer_contexts(
            self.mixers,
            x_btd,
            base=self.config.rope_base,
            documents=documents,
            positions=positions,
            prefix=prefix,
            cache=cache,
            starts=starts,
            real=real,
        )
        for block, context in zip(self.blocks, contexts):
            x_btd = block(x_btd, context)
        y: Tensor = self.norm(x_btd)
        return y

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Sequence[Cache] | None = None,
        positions: Tensor | None = None,
        prefix: int | Tensor | None = None,
        starts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(batch, time, vocab)``; arguments as in `hidden`."""
        x_btd = self.hidden(
            tokens_bt,
            documents=documents,
            cache=cache,
            positions=positions,
            prefix=prefix,
            starts=starts,
            real=real,
        )
        if self.head is not None and not is_plain(self.head):  # an adapter or a quantized layer
            return cast(Tensor, self.head(x_btd))
        return nn.functional.linear(x_btd, self.head_weight.to(x_btd.dtype))

    def new_cache(self, batch: int, capacity: int) -> list[Cache]:
        """Empty caches, one per block, for ``batch`` sequences of up to ``capacity`` tokens."""
        dtype, device = self.compute_dtype or self.embedding.dtype, self.embedding.device
        return [mixer.new_cache(batch, capacity, dtype=dtype, device=device) for mixer in self.mixers]

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that one token uses (a routed expert counts if chosen)."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for module in self.modules():
            if isinstance(module, MoE):
                stack = module.w_up.numel() + module.w_down.numel()
                idle += stack - stack * module.config.top_k // module.config.num_experts
        return total, total - idle

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of training one token of a sequence of ``length`` tokens (1 where not given)."""
        return self.flops_per_token(length or 1)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a forward and a backward pass per token at ``length`` tokens.

        Six per parameter in use (the embedding look-up is none, gains are not counted) plus three times the attention
        products, the causal half only, or the convolution.
        """
        _, active = self.parameter_counts()
        gains = sum(
            parameter.numel()
            for module in self.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if declaration(module, name)[0] == "gain"
        )
        looked_up = 0 if self.head is None else self.embedding.numel()
        attention = sum(mixer.flops_per_token(length) for mixer in self.mixers)
        return 6 * (active - gains - looked_up) + 3 * float(attention)
