"""Attention: multi-head, grouped-query, multi-query, latent and key-as-value, with one call and one cache interface."""

from danlu.nn.attention.cache import LayerCache
from danlu.nn.attention.context import layer_contexts
from danlu.nn.attention.full import FullAttention, attend
from danlu.nn.attention.gqa import GQA, GQAConfig
from danlu.nn.attention.kv_shared import KVShared, KVSharedConfig
from danlu.nn.attention.masks import causal_mask, document_mask, masked_attention
from danlu.nn.attention.mla import MLA, MLAConfig
from danlu.nn.attention.recurrent import recurrent_attention

__all__ = [
    "GQA",
    "MLA",
    "FullAttention",
    "GQAConfig",
    "KVShared",
    "KVSharedConfig",
    "LayerCache",
    "MLAConfig",
    "attend",
    "causal_mask",
    "document_mask",
    "layer_contexts",
    "masked_attention",
    "recurrent_attention",
]
