"""Layers: attention, state spaces, positions, experts, norms; each usable alone in any PyTorch model."""

from danlu._grid import text_image_grid
from danlu._roles import declare
from danlu.nn.activation import SquarePlus, SquarePlusConfig, squareplus
from danlu.nn.attention import (
    GQA,
    MLA,
    FullAttention,
    GQAConfig,
    KVShared,
    KVSharedConfig,
    LayerCache,
    MLAConfig,
    attend,
    causal_mask,
    document_mask,
    layer_contexts,
    masked_attention,
    recurrent_attention,
)
from danlu.nn.auxiliary_loss import AuxiliaryLossConfig
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.nn.dynamic_experts import DynamicConfig
from danlu.nn.feed_forward import FeedForward, swiglu
from danlu.nn.linear import Linear, as_torch_linear
from danlu.nn.lora import (
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    LoRAStack,
    apply_lora,
    lora_state_dict,
    merge_lora,
)
from danlu.nn.loss_free import LossFreeConfig
from danlu.nn.moe import MoE, MoEConfig, balanced_load, scaling_factor
from danlu.nn.norm import RMSNorm
from danlu.nn.rotary import (
    grid_coordinates,
    rotary_angles,
    rotary_angles_nd,
    rotary_span,
    rotate,
    text_image_coordinates,
    yarn_frequencies,
    yarn_magnitude,
)
from danlu.nn.ssm import SSM, SSMConfig, StateCache

__all__ = [
    "GQA",
    "MLA",
    "SSM",
    "AuxiliaryLossConfig",
    "DynamicConfig",
    "FeedForward",
    "FullAttention",
    "GQAConfig",
    "KVShared",
    "KVSharedConfig",
    "LayerCache",
    "Linear",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAStack",
    "LossFreeConfig",
    "MLAConfig",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "SSMConfig",
    "SquarePlus",
    "SquarePlusConfig",
    "StateCache",
    "apply_lora",
    "as_torch_linear",
    "attend",
    "balanced_load",
    "causal_mask",
    "declare",
    "document_mask",
    "grid_coordinates",
    "layer_contexts",
    "linear_cross_entropy",
    "lora_state_dict",
    "masked_attention",
    "merge_lora",
    "recurrent_attention",
    "rotary_angles",
    "rotary_angles_nd",
    "rotary_span",
    "rotate",
    "scaling_factor",
    "squareplus",
    "swiglu",
    "text_image_coordinates",
    "text_image_grid",
    "yarn_frequencies",
    "yarn_magnitude",
]
