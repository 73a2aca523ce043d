"""Whole networks assembled from ``danlu.nn``."""

from danlu.models.convnet import ConvNet, ConvNetConfig
from danlu.models.dit import DiT, DiTConfig
from danlu.models.generate import generate, sample_token
from danlu.models.gpt import GPT, GPTConfig
from danlu.models.mae import MAE, MAEConfig
from danlu.models.text_image import TextImage, TextImageConfig
from danlu.models.transformer import Transformer, TransformerConfig
from danlu.models.unet import UNet, UNetConfig

__all__ = [
    "GPT",
    "MAE",
    "ConvNet",
    "ConvNetConfig",
    "DiT",
    "DiTConfig",
    "GPTConfig",
    "MAEConfig",
    "TextImage",
    "TextImageConfig",
    "Transformer",
    "TransformerConfig",
    "UNet",
    "UNetConfig",
    "generate",
    "sample_token",
]
