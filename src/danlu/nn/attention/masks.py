"""Which tokens a query may look at: the masks of decoder-only, encoder and mixed models, and attention under them.

==============  ===============================================================================================
mask            the query ``i`` sees the key ``j``
==============  ===============================================================================================
causal          ``j <= i`` (GPT)
anti-causal     ``j >= i``
bidirectional   always (BERT)
prefix          ``j <= i`` or ``j < m``: the first ``m`` tokens see one another (UniLM, prefix-LM; Raffel 1910.10683)
mixed-heads     causal in the first half of the heads, anti-causal in the others (kexue.fm 9529)
mixed-layers    causal and anti-causal in turn from layer to layer: for a whole model, not for one layer
==============  ===============================================================================================

Boolean masks are True where a query may look. `masked_attention` needs none of them: an anti-causal head is a causal
one read backwards, and a prefix is two fused calls. A mask of time x time booleans is made for packed documents, for
prefixes that differ within a batch, and for a cached chunk behind others: the fused kernels have no other way to be
told.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.nn.attention.blocked import applies, blocked_attention, one_query
from danlu.nn.attention.kernel import scaled_dot_product

Mask = Literal["causal", "anti-causal", "bidirectional", "prefix", "mixed-heads"]
LayeredMask = Literal[Mask, "mixed-layers"]
MASKS: tuple[Mask, ...] = get_args(Mask)


def causal_mask(queries: int, keys: int, *, device: torch.device | None = None) -> Tensor:
    """``(queries, keys)``: the last query sees every key, each earlier one a key less.

    >>> causal_mask(2, 3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def starts_of_documents(documents_bt: Tensor) -> Tensor:
    """Which tokens of ``(batch, time)`` document numbers begin a document: a run of equal numbers.

    >>> starts_of_documents(torch.tensor([[7, 7, 5, 7]])).int().tolist()
    [[1, 0, 1, 1]]
    """
    starts = torch.ones_like(documents_bt, dtype=torch.bool)
    starts[:, 1:] = documents_bt[:, 1:] != documents_bt[:, :-1]
    return starts


def places_in_documents(documents_bt: Tensor) -> Tensor:
    """How many tokens of its own document precede each token, int64 ``(batch, time)``.

    >>> places_in_documents(torch.tensor([[7, 7, 5, 7]])).tolist()
    [[0, 1, 0, 0]]
    """
    here = torch.arange(documents_bt.shape[1], device=documents_bt.device).expand_as(documents_bt)
    return here - torch.where(starts_of_documents(documents_bt), here, 0).cummax(1).values


def document_mask(
    documents_bt: Tensor, mask: Mask = "causal", *, num_heads: int = 2, prefix: int | Tensor | None = None
) -> Tensor:
    """Mask ``(batch, 1 or heads, time, time)`` that keeps packed documents apart.

    Args:
        documents_bt: integer document number of each token, ``(batch, time)``; a document is a run of equal numbers.
        mask: what a token sees of its own document.
        num_heads: number of heads, even; only mixed heads differ.
        prefix: for "prefix" the number of first tokens of each document that all of it sees, or booleans
            ``(batch, time)`` that are True for such tokens.

    Raises:
        ValueError: a shape or a prefix that does not fit the mask.

    >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    if documents_bt.dim() != 2:
        raise ValueError(f"documents must be (batch, time), got shape {tuple(documents_bt.shape)}")
    choice("mask", mask, MASKS)
    check_prefix(prefix, mask)
    time, device = documents_bt.shape[1], documents_bt.device
    runs_bt = starts_of_documents(documents_bt).cumsum(1)
    same = runs_bt[:, None, :, None] == runs_bt[:, None, None, :]
    if mask == "bidirectional":
        return same
    causal = causal_mask(time, time, device=device)
    if mask == "anti-causal":
        return same & causal.T
    if mask == "mixed-heads":
        split_heads(num_heads, num_heads)
        return same & torch.stack((causal, causal.T)).repeat_interleave(num_heads // 2, dim=0)
    if mask == "prefix" and prefix is not None:
        if not isinstance(prefix, Tensor):
            prefix = places_in_documents(documents_bt) < prefix
        elif prefix.shape != documents_bt.shape or prefix.dtype != torch.bool:
            raise ValueError(f"prefix must be booleans {tuple(documents_bt.shape)}, got {tuple(prefix.shape)}")
        return same & (causal | prefix[:, None, None, :])
    return same & causal


def masked_attention(
    q_bhtk: Tensor,
    k_bgtk: Tensor,
    v_bgte: Tensor,
    mask: Mask = "causal",
    *,
    prefix: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention under a mask, by fused kernels or in blocks: nothing of size time x time is made.

    Args:
        q_bhtk: queries ``(batch, heads, time, size)``.
        k_bgtk: keys ``(batch, groups, time, size)``, groups dividing heads.
        v_bgte: values ``(batch, groups, time, value size)``.
        mask: which keys a query sees.
        prefix: for "prefix", how many first tokens all see; None and 0 are causal, ``time`` is bidirectional, exactly.
        scale: factor of the scores; None is ``1 / sqrt(size)``.

    Returns:
        ``(batch, heads, time, value size)``.

    Raises:
        ValueError: an unknown mask, a prefix that does not fit, or heads that cannot be halved.

    >>> q = torch.randn(2, 4, 7, 6)
    >>> masked_attention(q, q, q, "mixed-heads").shape
    torch.Size([2, 4, 7, 6])
    """
    choice("mask", mask, MASKS)
    check_prefix(prefix, mask)
    H, G, T = q_bhtk.shape[1], k_bgtk.shape[1], q_bhtk.shape[2]
    if k_bgtk.shape[2] != T:
        raise ValueError(f"keys must be as many as queries, {T}, got {k_bgtk.shape[2]}")

    def fused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        if applies(q, k):
            return blocked_attention(q, k, v, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale)
        return scaled_dot_product(q, k, v, causal=causal, scale=scale)

    def backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q.flip(2), k.flip(2), v.flip(2), causal=True).flip(2)

    if mask == "anti-causal":
        return backwards(q_bhtk, k_bgtk, v_bgte)
    if mask == "mixed-heads":
        split_heads(H, G)
        first, second = ((t, t) if t.shape[1] == 1 else t.chunk(2, dim=1) for t in (k_bgtk, v_bgte))
        (q_one, q_two), (k_one, k_two), (v_one, v_two) = q_bhtk.chunk(2, dim=1), first, second
        return torch.cat((fused(q_one, k_one, v_one, causal=True), backwards(q_two, k_two, v_two)), dim=1)
    whole = fused(q_bhtk, k_bgtk, v_bgte, causal=mask != "bidirectional" and prefix != T)
    if prefix and prefix < T:
        inner = fused(*(t[:, :, :prefix] for t in (q_bhtk, k_bgtk, v_bgte)), causal=False)
        return torch.cat((inner, whole[:, :, prefix:]), dim=2)
    if prefix and prefix > T:
        raise ValueError(f"prefix must be at most the {T} tokens, got {prefix}")
    return whole


def attention_under(
    q_bhtk: Tensor, k_bgsk: Tensor, v_bgse: Tensor, mask: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention under a mask in memory, True where a query may look; None hides nothing.

    Args:
        q_bhtk: queries ``(batch, heads, time, size)``.
        k_bgsk: keys ``(batch, groups, keys, size)``.
        v_bgse: values ``(batch, groups, keys, value size)``.
        mask: booleans, broadcastable to ``(batch, heads, time, keys)``.
        scale: factor of the scores; None is ``1 / sqrt(size)``.
    """
    if mask is not None and mask.dim() == 4 and applies(q_bhtk, k_bgsk, mask):
        scale = q_bhtk.shape[-1] ** -0.5 if scale is None else scale
        return blocked_attention(q_bhtk, k_bgsk, v_bgse, causal=False, scale=scale, mask=mask)
    (B, H, T, K), G = q_bhtk.shape, k_bgsk.shape[1]
    if mask is None and T == 1 and G < H and q_bhtk.device.type == "cpu":
        # One query: the heads of a group are rows of one product, which reads the keys once, not once a head.
        q, k, v = q_bhtk.reshape(B * G, H // G, K), k_bgsk.flatten(0, 1), v_bgse.flatten(0, 1)
        scale = K**-0.5 if scale is None else scale
        return one_query(q, k, v, scale).view(B, H, 1, v.shape[-1])
    return scaled_dot_product(q_bhtk, k_bgsk, v_bgse, mask=mask, scale=scale)


def mask_of_layer(mask: LayeredMask, index: int | None) -> LayeredMask:
    """Return the mask of the layer with this number where a model's layers take turns; None: of no model.

    >>> [mask_of_layer("mixed-layers", index) for index in range(3)]
    ['causal', 'anti-causal', 'causal']
    """
    if mask != "mixed-layers" or index is None:
        return mask
    return "anti-causal" if index % 2 else "causal"


def check_mask(mask: LayeredMask, heads: int, groups: int) -> Mask:
    """Return the mask of one layer, if it has these heads and groups.

    Raises:
        ValueError: an unknown mask, one for whole models, or heads that cannot be halved.
    """
    if mask == "mixed-layers":
        raise ValueError("mask 'mixed-layers' is for a model of several layers; one is 'causal' or 'anti-causal'")
    choice("mask", mask, MASKS)
    if mask == "mixed-heads":
        split_heads(heads, groups)
    return mask


def check_prefix(prefix: int | Tensor | None, mask: Mask) -> None:
    """Raise unless ``prefix`` can go with ``mask``."""
    if prefix is None:
        return
    if mask != "prefix":
        raise ValueError(f"prefix is for mask 'prefix', got it with {mask!r}")
    if not isinstance(prefix, Tensor):
        integer("prefix", prefix, low=0)


def check_cached(mask: Mask) -> None:
    """Raise unless a layer with this mask can be decoded token by token."""
    if mask not in ("causal", "prefix"):
        raise ValueError(f"a layer with mask {mask!r} keeps no cache: later tokens change what earlier ones gave")


def check_start(prefix: int | None, seen: int) -> None:
    """Raise unless a prefix, if there is one, comes before everything else."""
    if prefix and seen:
        raise ValueError(f"prefix must be given with the first tokens, {seen} are in the cache already")


def split_heads(heads: int, groups: int) -> None:
    """Raise unless the heads, and their groups, fall into halves."""
    if heads % 2:
        raise ValueError(f"num_heads must be even for mask 'mixed-heads', got {heads}")
    if groups % 2 and groups != 1:
        raise ValueError(f"num_kv_heads must be even or 1 for mask 'mixed-heads', got {groups}")


def keys_seen(mask: Mask, length: int) -> float:
    """Keys that a token sees on average among ``length`` (a prefix is counted as causal)."""
    return length if mask == "bidirectional" else (length + 1) / 2
