"""Whole networks assembled from ``danlu.nn``."""

from danlu.models.convnet import ConvNet, ConvNetConfig
from danlu.models.dit import DiT, DiTConfig
from danlu.models.generate import (
    Continuation,
    Drawn,
    generate,
    generate_batch,
    generate_steps,
    ready_to_generate,
)
from danlu.models.gpt import GPT, GPTConfig
from danlu.models.mae import MAE, MAEConfig
from danlu.models.sampling import penalized, sample_token
from danlu.models.text_image import TextImage, TextImageConfig
from danlu.models.transformer import Transformer, TransformerConfig
from danlu.models.unet import UNet, UNetConfig

__all__ = [
    "GPT",
    "MAE",
    "Continuation",
    "ConvNet",
    "ConvNetConfig",
    "DiT",
    "DiTConfig",
    "Drawn",
    "GPTConfig",
    "MAEConfig",
    "TextImage",
    "TextImageConfig",
    "Transformer",
    "TransformerConfig",
    "UNet",
    "UNetConfig",
    "generate",
    "generate_batch",
    "generate_steps",
    "penalized",
    "ready_to_generate",
    "sample_token",
]
