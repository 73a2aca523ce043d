"""Training objectives: each holds its network and turns a batch into a summed loss."""

from danlu.objectives.captioning import Captioning, CaptioningConfig
from danlu.objectives.causal_lm import CausalLM, CausalLMConfig
from danlu.objectives.classification import Classification, ClassificationConfig
from danlu.objectives.denoising import Denoising, DenoisingConfig, multiscale_loss
from danlu.objectives.drop_token import drop_tokens, kept_tokens
from danlu.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from danlu.objectives.masked_image import MaskedImage, MaskedImageConfig
from danlu.objectives.masked_lm import MaskedLM, MaskedLMConfig, expected_embedding
from danlu.objectives.meanflow import MeanFlow, MeanFlowConfig, total_derivative
from danlu.objectives.prefix_lm import PrefixLM, PrefixLMConfig, prefix_lengths
from danlu.objectives.score_matching import (
    ScoreMatching,
    ScoreMatchingConfig,
    conditional_loss,
    explicit_loss,
    implicit_loss,
    ratio_score,
    sliced_loss,
)
from danlu.objectives.sid import SiD, SiDConfig, generator_loss
from danlu.objectives.validation import evaluate

__all__ = [
    "Captioning",
    "CaptioningConfig",
    "CausalLM",
    "CausalLMConfig",
    "Classification",
    "ClassificationConfig",
    "Denoising",
    "DenoisingConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "MaskedImage",
    "MaskedImageConfig",
    "MaskedLM",
    "MaskedLMConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "PrefixLM",
    "PrefixLMConfig",
    "ScoreMatching",
    "ScoreMatchingConfig",
    "SiD",
    "SiDConfig",
    "conditional_loss",
    "drop_tokens",
    "evaluate",
    "expected_embedding",
    "explicit_loss",
    "generator_loss",
    "implicit_loss",
    "kept_tokens",
    "multiscale_loss",
    "prefix_lengths",
    "ratio_score",
    "sliced_loss",
    "total_derivative",
]
