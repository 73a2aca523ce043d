"""Whole networks assembled from ``danlu.nn``."""

from danlu.models.generate import generate, sample_token
from danlu.models.gpt import GPT, GPTConfig
from danlu.models.transformer import Transformer, TransformerConfig

__all__ = ["GPT", "GPTConfig", "Transformer", "TransformerConfig", "generate", "sample_token"]
