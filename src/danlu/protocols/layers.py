"""Layers that a model's configuration chooses, and what they are given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["ActivationConfig", "BalanceConfig", "Cache", "Context", "Joined", "Mixer", "MixerConfig"]


class Cache(Protocol):
    """What one layer keeps of the tokens that it has read. Only ``length``, their number, is read from outside."""

    length: int


@runtime_checkable
class Joined(Protocol):
    """A cache that can be one of several which were filled with texts of unequal length, to decode these together."""

    def joined(self, others: Sequence[Any], capacity: int) -> Any:
        """Return a cache of this one's rows and then those of ``others``, the last tokens of all at the same place.

        Args:
            others: caches of the same layer.
            capacity: tokens that there is to be room for, counted from the first of the longest row.
        """


C = TypeVar("C", bound=Cache)


@dataclass(frozen=True, kw_only=True)
class Context(Generic[C]):
    """What surrounds the tokens that a mixer is given: made once for each layer and forward pass.

    :func:`danlu.nn.attention.context.layer_contexts` makes those of a whole model; for one layer alone give the fields
    that it needs.

    Attributes:
        rope: cosines and sines of the tokens' positions (:mod:`danlu.nn.rotary`), each ``(time, rope_dim)`` or
            ``(batch, time, rope_dim)``; a layer that rotates nothing needs none.
        mask: True where a query may look, broadcastable to ``(batch, heads, time, keys)``, in place of the layer's own
            mask; None: the layer's own.
        documents: document number of each token, int64 ``(batch, time)``; None: each row is one document. Where a
            layer names its mask, documents are part of ``mask`` already.
        positions: the coordinates that ``rope`` was made of, ``(time, axes)`` or ``(batch, time, axes)``; None: tokens
            are counted from the first one in the cache.
        prefix: number of first tokens that all tokens see, for a layer with the mask "prefix"; with a cache, of its
            first call.
        cache: what earlier calls of this layer stored; the layer appends the new tokens to it.
        real: booleans ``(batch, time)``, False for tokens that are padding, which experts leave out of their balance;
            None: there is none. It hides nothing: that is what ``mask`` is for.

    >>> Context(prefix=3).tables(0)[0].shape
    torch.Size([0])
    """

    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    prefix: int | None = None
    cache: C | None = None
    real: Tensor | None = None

    def tables(self, rope_dim: int) -> tuple[Tensor, Tensor]:
        """Return ``rope``, for a layer that rotates ``rope_dim`` coordinates of each head.

        Raises:
            ValueError: there are none, or they are of another size.
        """
        if self.rope is None:
            if rope_dim:
                raise ValueError(f"rope must hold cosines and sines of {rope_dim} coordinates for this layer, got None")
            return _NO_TABLES
        if self.rope[0].shape[-1] != rope_dim:
            raise ValueError(f"rope must be tables of {rope_dim} coordinates, got {self.rope[0].shape[-1]}")
        return self.rope


_NO_TABLES = (torch.empty(0), torch.empty(0))


class Mixer(Protocol):
    """What mixes the tokens of a block: attention, a state space, or a layer of one's own; a ``torch.nn.Module``.

    Activations come in the model's ``compute_dtype``, bfloat16 where that is fast, while weights are float32:
    :class:`danlu.nn.Linear` casts its weight, ``torch.nn.Linear`` does not.

    Attributes:
        rope_dim: coordinates of each head that positions rotate: the size of the tables in ``context.rope``; 0: none.
        mask: which tokens a token sees, one of ``danlu.nn.attention.masks.MASKS``; the model then combines documents
            and it into ``context.mask``. None: the layer tells documents apart by itself, from ``context.documents``.
        num_heads: heads that the mask "mixed-heads" divides; 1 for a layer without heads.

    >>> class Mean(nn.Module):
    ...     rope_dim, mask, num_heads = 0, None, 1
    ...     def forward(self, x: Tensor, context: Context[Any]) -> Tensor:
    ...         return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    ...     def flops_per_token(self, length: int) -> float:
    ...         return 0.0
    ...     def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
    ...         raise NotImplementedError
    >>> mixer: Mixer = Mean()
    >>> mixer(torch.ones(1, 3, 2), Context()).sum()
    tensor(6.)
    """

    @property
    def rope_dim(self) -> int:
        """Coordinates that positions rotate."""

    @property
    def mask(self) -> str | None:
        """Name of the layer's mask."""

    @property
    def num_heads(self) -> int:
        """Number of heads."""

    def __call__(self, x_btd: Tensor, context: Context[Any], /) -> Tensor:
        """Map ``(batch, time, dim)`` to the same."""

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
        """Make an empty cache for ``batch`` sequences of up to ``capacity`` tokens."""

    def flops_per_token(self, length: int) -> float:
        """Operations of a forward pass per token at ``length`` tokens, beside those of two per parameter."""


class MixerConfig(Protocol):
    """Configuration of a mixer.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class LinearConfig:
    ...     def build(self, dim: int, *, out_std: float, **others: Any) -> nn.Module:
    ...         layer = nn.Linear(dim, dim)
    ...         nn.init.normal_(layer.weight, std=out_std)
    ...         return layer
    >>> LinearConfig().build(8, out_std=0.1, index=0).weight.shape
    torch.Size([8, 8])
    """

    def build(self, dim: int, *, out_std: float, **others: Any) -> Any:
        """Make the layer; it fits :class:`Mixer` and is a ``torch.nn.Module``.

        Args:
            dim: model size.
            out_std: standard deviation of an output projection that reads ``dim`` features; one that reads ``inner``
                features multiplies it by ``sqrt(dim / inner)``.
            others: among them ``index``, the number of the block (from 0), for layers that alternate, and ``norm_eps``,
                what the model's norms add to the mean square, for layers with norms of their own.

        Raises:
            ValueError, TypeError: sizes that do not fit together, naming the field.
        """


class ActivationConfig(Protocol):
    """Configuration of the activation in the gate of a feed-forward layer."""

    def build(self, **others: Any) -> nn.Module:
        """Make the activation: a module from a tensor of any shape to one of the same."""


class BalanceConfig(Protocol):
    """Configuration of how a `danlu.nn.MoE` layer keeps the load of its experts even.

    A kind of balancing of one's own inherits from this class and overrides what differs: all has a default.

    Attributes:
        thresholds: an expert works on every token whose biased score is above zero, rather than on those that it is
            among the ``top_k`` of.
        auxiliary: :meth:`load_gradient` is added to the gradient of the scores.
        freeze_after: updates after which the biases stay as they are; None: never.
        scheduled: steps of the biases are multiplied by the learning rate's own factor.

    >>> class Upwards(BalanceConfig):
    ...     def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
    ...         return 1e-3 * (counts_e == 0)
    >>> Upwards().step(torch.tensor([3.0, 0.0]), torch.tensor(3.0), 1.0), Upwards().start(2, 1, "sigmoid")
    (tensor([0.0000, 0.0010]), 0.0)
    """

    thresholds: ClassVar[bool] = False
    auxiliary: ClassVar[bool] = False

    @property
    def freeze_after(self) -> int | None:
        """Updates of the biases; None: without end."""
        return None

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate's factor is the biases' too."""
        return False

    def check(self, num_experts: int, top_k: int, *, gate: str, select_by: str, num_groups: int) -> None:
        """Raise ValueError unless this balancing goes with a layer of these options of `danlu.nn.MoEConfig`."""
        return None

    def start(self, num_experts: int, top_k: int, gate: str) -> float:
        """Return what every bias is at the start of training."""
        return 0.0

    def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
        """Return the change of the biases after an optimizer step, ``(experts,)``.

        Args:
            counts_e: choices that fell on each expert, ``(experts,)``.
            tokens: number of tokens that chose, ``()``.
            budget: experts that a token is to use in the mean, ``top_k``.
        """
        return torch.zeros_like(counts_e)

    def load_gradient(self, counts_e: Tensor) -> Tensor:
        """Return the derivative of an auxiliary loss by the load, ``(experts,)``, asked for where ``auxiliary``."""
        return torch.zeros_like(counts_e)
