"""danlu's own models at the peers' sizes."""

import torch

from benchmarks.peers import Setting, Size
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig, MLAConfig, MoEConfig


def dense(size: Size) -> Transformer:
    """Build the dense decoder with Llama's shapes."""
    return Transformer(
        TransformerConfig(
            vocab_size=size.vocab,
            dim=size.width,
            layers=size.depth,
            attention=GQAConfig(num_heads=size.heads, head_dim=size.head),
            hidden=size.feed_forward,
            tied=True,
        )
    )


def sparse(size: Size) -> Transformer:
    """Build the latent-attention mixture-of-experts decoder with DeepseekV3's shapes."""
    return Transformer(
        TransformerConfig(
            vocab_size=size.vocab,
            dim=size.width,
            layers=size.depth,
            attention=MLAConfig(
                num_heads=size.heads,
                kv_rank=size.latent,
                nope_dim=size.head,
                rope_dim=size.rotary,
                value_dim=size.head,
            ),
            hidden=size.feed_forward,
            experts=MoEConfig(
                num_experts=size.experts,
                top_k=size.experts_per_token,
                hidden=size.expert_width,
                num_shared_experts=size.shared_experts,
                scale=1.0,
            ),
            dense_layers=0,
            tied=True,
        )
    )


def prepare(model: Transformer, setting: Setting) -> Transformer:
    """Set the type of the activations."""
    model.compute_dtype = torch.bfloat16 if setting.bfloat16 == "activations" else None
    return model


def settings(*, compile: bool) -> list[Setting]:
    """Return the settings that could be danlu's fastest; its bfloat16 is float32 weights and bfloat16 activations."""
    eager = [Setting(), Setting(precision="medium"), Setting(bfloat16="activations", precision="medium")]
    compiled = [Setting(precision="medium", compile=True), Setting(bfloat16="activations", compile=True)]
    return [*eager, *compiled] if compile else eager
